"""Sparse upcycling: a dense model's MLPs become mixtures of copies of themselves, and back where nothing was trained.

Two forms. `upcycle` puts MoE layers in the MLPs' places: a model of its own, for MoE checkpoints. `UpcycledMLPs` holds
them outside: the dense model keeps its keys and tensors, its MLPs only let the MoE layers compute for them while
attached, until `UpcycledMLPs.replace` makes the first form of the second. The optimizer's state starts from scratch in
both, since every parameter is a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.moe.context import SequenceContext
from wlsup.moe.layer import MoE
from wlsup.moe.prefix_ids import PrefixTokenIds
from wlsup.moe.sites import LooseMLP, Site, blocks_of, choose_blocks, language_model_of, sites_of
from wlsup.moe.spec import MoESpec
from wlsup.moe.token_ids import TokenIds

__all__ = ["UpcycledMLPs", "add_noise", "change_of_function", "moe_layers", "restore", "upcycle"]


def upcycle(
    module: nn.Module,
    blocks: Sequence[int] | None = None,
    spec: MoESpec = MoESpec(),
    *,
    noise: float = 0.0,
    seed: int | None = None,
    exact: bool = True,
    token_ids: TokenIds | None = None,
    frequencies: Tensor | None = None,
) -> list[MoE]:
    """Replace the dense MLPs of some blocks by MoE layers whose experts are copies of them.

    Source: Komatsuzaki et al. 2023, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", section 3:
    experts are identical copies, the router is fresh, all else is taken over. With weights that add up to 1 (their
    "combine weights normalised") and no dropped token the layer computes what the MLP did.

    Args:
        module: a timm ViT, a `VisionEncoder`, a causal language model of transformers or a `LanguageModel`; changed in
            place. ``blocks.1.mlp.fc1.weight`` becomes ``blocks.1.mlp.experts.{e}.fc1.weight``, and so on.
        blocks: positions of the blocks; None: every second (see `choose_blocks`).
        spec: of the layers.
        noise: standard deviation of Gaussian noise on every matrix of every expert, relative to that matrix's own. It
            sets the copies apart before training does, and ends the exactness.
        seed: of router and noise, whatever the global random state; None: drawn from the global random state.
        exact: refuse a ``spec`` under which even identical copies would not compute the dense function.
        token_ids: of hash routing in a language model, where the model gets a prefix of embeddings; None: the ids that
            its input embedding is fed, which suffices without a prefix.
        frequencies: of the balanced hash, how often each id occurs.

    Returns:
        The layers, in the blocks' order. In a language model they find padding by its ``attention_mask``.

    Raises:
        WlsupError: see ``exact``; a router that is not causal in a language model; blocks that there are not or that
            have no dense MLP.
    """
    mlps = UpcycledMLPs(
        module, blocks, spec, noise=noise, seed=seed, exact=exact, token_ids=token_ids, frequencies=frequencies
    )
    mlps.replace(module)
    return list(mlps.layers.values())


def restore(module: nn.Module) -> nn.Module:
    """Put dense MLPs back where `upcycle` put MoE layers, bit for bit: the way back where no expert was trained.

    Their tensors are; dropout, which copies have none of, does not come back.

    Args:
        module: as `upcycle` left it; changed in place.

    Returns:
        The module.

    Raises:
        WlsupError: no MoE layer is there, or the experts of one are no longer (or never were) the same.
    """
    found = moe_layers(module)
    if not found:
        raise WlsupError(f"No block of this {type(module).__name__} has an MoE layer: there is nothing to restore.")
    for name, layer in found.items():
        if apart := _first_difference(layer):
            raise WlsupError(
                f"{name} cannot be made dense: its experts differ ({apart}). Only where they are identical copies is "
                "there one dense MLP that computes the same."
            )
    _, there = blocks_of(module)
    if language_model_of(module) is not None:
        SequenceContext.remove(_stack(module))
        for token_ids in {id(layer.token_ids): layer.token_ids for layer in found.values()}.values():
            if token_ids is not None:
                token_ids.unwatch()
            if isinstance(token_ids, PrefixTokenIds):
                token_ids.unfollow()
    for name, layer in found.items():
        *_, index, attribute = name.split(".")
        block, dense = there[int(index)], layer.experts[0]
        SequenceContext.remove(block)
        if isinstance(dense, LooseMLP):
            for part, inner in dense.named_children():
                setattr(block, part, inner)
        else:
            setattr(block, attribute, dense)
    return module


def moe_layers(module: nn.Module) -> dict[str, MoE]:
    """Return the MoE layers of a module's blocks by their paths, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, MoE)}


class UpcycledMLPs(nn.Module):
    """Upcycled MoE layers held outside of the dense model, which keeps its keys, its tensors and the way back.

    While attached, the chosen MLPs let these layers compute in their place. Hooks on the MLPs, by which adapters are
    attached, go on working. The layer of ``blocks.1.mlp`` has the keys ``layers.blocks_1_mlp.*`` here.

    Args:
        module: the dense model, as for `upcycle`; it is not changed.
        blocks: see `upcycle`; so are the others.
        spec: of the layers.
        noise: relative noise on the experts.
        seed: of router and noise.
        exact: refuse a ``spec`` that cannot keep the function.
        token_ids: of hash routing.
        frequencies: of the balanced hash.

    Raises:
        WlsupError: as `upcycle`.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[int] | None = None,
        spec: MoESpec = MoESpec(),
        *,
        noise: float = 0.0,
        seed: int | None = None,
        exact: bool = True,
        token_ids: TokenIds | None = None,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()
        sites = _sites(module, blocks)
        self.token_ids = _token_ids(module, spec, token_ids)
        layers = _layers(module, sites, spec, noise, seed, exact, self.token_ids, frequencies)
        self.blocks = [site.index for site in sites]
        self.layers = nn.ModuleDict(
            {site.name.replace(".", "_"): layer for site, layer in zip(sites, layers, strict=True)}
        )
        self._undo: list[Callable[[], None]] = []

    def attach(self, module: nn.Module) -> UpcycledMLPs:
        """Let the layers compute for the MLPs of ``module``; return self.

        Raises:
            WlsupError: attached already, or a model with other blocks than these were made from.
        """
        sites, layers = self._own_sites(module), list(self.layers.values())
        self._undo += _surround(module, sites, layers, self.token_ids)
        self._undo += [site.divert(layer) for site, layer in zip(sites, layers, strict=True)]
        return self

    def detach(self) -> None:
        """Let the dense MLPs compute again: the model is the dense one, bit for bit."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def replace(self, module: nn.Module) -> None:
        """Put the layers in the MLPs' places for good: ``module`` is then as `upcycle` leaves it.

        Raises:
            WlsupError: as `attach`.
        """
        sites, layers = self._own_sites(module), list(self.layers.values())
        _surround(module, sites, layers, self.token_ids)
        for site, layer in zip(sites, layers, strict=True):
            site.replace(layer)

    def _own_sites(self, module: nn.Module) -> list[Site]:
        if self._undo:
            raise WlsupError("These upcycled MLPs are attached already; detach() them first.")
        sites = sites_of(module, self.blocks)
        if [site.name.replace(".", "_") for site in sites] != list(self.layers):
            raise WlsupError(
                f"These upcycled MLPs were made from {', '.join(self.layers)}; the model has "
                f"{', '.join(site.name for site in sites)}."
            )
        return sites


def change_of_function(spec: MoESpec) -> str | None:
    """Say why identical experts under ``spec`` would not compute the dense function; None where they do.

    What decides is whether each token's weights add up to 1: of the experts that it is sent to, none of which may drop
    it.
    """
    share = spec.k * (1.0 if spec.capacity_factor is None else spec.capacity_factor) / spec.experts
    if spec.router == "soft":
        return "soft routing mixes tokens before the experts, so that each sees averages of tokens"
    if spec.router == "expert_choice":
        if share >= 1:
            return None
        return (
            f"each expert takes the {share:.0%} of the tokens that are most its own, and what nobody took gets nothing "
            f"from the layer; only k * capacity_factor = experts leaves none out"
        )
    if spec.capacity_factor is not None and share < 1:
        return (
            f"an expert takes at most {share:.0%} of the tokens, and choices beyond that are dropped; capacity_factor "
            f"null (dropless) or {spec.experts / spec.k:g} drops none"
        )
    if spec.router != "hash" and spec.combine == "raw" and spec.k < spec.experts:
        return (
            "combine 'raw' scales the output by the router's probabilities, which add up to less than 1 over the "
            f"{spec.k} chosen of {spec.experts} experts; 'straight_through' and 'renormalized' keep it"
        )
    return None


@torch.no_grad()
def add_noise(experts: Iterable[nn.Module], noise: float, seed: int | None = None) -> None:
    """Add Gaussian noise to every matrix of every expert, in place; vectors stay.

    Args:
        experts: of one layer or of several: no two get the same draw.
        noise: standard deviation, relative to each matrix's own; 0 changes and draws nothing.
        seed: whatever the global random state; None: drawn from the global random state.

    Raises:
        WlsupError: noise below 0.
    """
    if noise < 0:
        raise WlsupError(f"noise must be 0 or more, not {noise:g}.")
    if not noise:
        return
    with _seeded(seed):
        for expert in experts:
            for parameter in expert.parameters():
                if parameter.ndim > 1:
                    parameter += noise * parameter.std() * torch.randn_like(parameter)


def _sites(module: nn.Module, blocks: Sequence[int] | None) -> list[Site]:
    _, there = blocks_of(module)
    return sites_of(module, choose_blocks(len(there), blocks=blocks))


def _token_ids(module: nn.Module, spec: MoESpec, given: TokenIds | None) -> TokenIds | None:
    """Return where the layers find token ids; None where they need none."""
    model = language_model_of(module)
    if spec.router != "hash" or model is None:
        return given
    return given or PrefixTokenIds(model.get_input_embeddings().weight.shape[0])


def _layers(
    module: nn.Module,
    sites: Sequence[Site],
    spec: MoESpec,
    noise: float,
    seed: int | None,
    exact: bool,
    token_ids: TokenIds | None,
    frequencies: Tensor | None,
) -> list[MoE]:
    causal = language_model_of(module) is not None
    if causal:
        spec.check_causal()
    elif spec.router == "hash":
        raise WlsupError(
            "Hash routing keys on token ids, which a picture's patches do not have. Choose top_k, noisy_top_k or "
            "expert_choice for a vision encoder."
        )
    if exact and (why := change_of_function(spec)):
        raise WlsupError(
            f"The upcycled model would not compute what the dense one does: {why}. Choose another spec, or accept the "
            "change with exact=False (--allow-change)."
        )
    rows = None if token_ids is None else token_ids.rows
    layers = []
    with _seeded(seed):
        for site in sites:
            experts = [site.expert() for _ in range(spec.experts)]
            add_noise(experts, noise)
            layer = MoE(experts, site.width, spec, causal, rows, frequencies, token_ids, site.index)
            device = next(site.mlp().parameters()).device
            layers.append(layer.to(device).requires_grad_(True).train(site.block.training))
    return layers


def _surround(
    module: nn.Module, sites: Sequence[Site], layers: Sequence[MoE], token_ids: TokenIds | None
) -> list[Callable[[], None]]:
    """Let the layers of a language model know what they need; return what undoes it."""
    model = language_model_of(module)
    if model is None:
        return []
    undo = [handle.remove for handle in SequenceContext().attach(_stack(module), sites, layers)]
    if token_ids is not None:
        token_ids.watch(model.get_input_embeddings())
        undo.append(token_ids.unwatch)
    if isinstance(token_ids, PrefixTokenIds) and not token_ids.following:
        token_ids.follow(model)
        undo.append(token_ids.unfollow)
    return undo


def _stack(module: nn.Module) -> nn.Module:
    """Return the module that holds the list of blocks (of OPT the decoder: its model is passed over by its head)."""
    path, _ = blocks_of(module)
    return module.get_submodule(path.rpartition(".")[0])


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` and leave the global random state as it was; None draws from that."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _first_difference(layer: MoE) -> str | None:
    """Name the first tensor in which an expert differs from expert 0."""
    first = layer.experts[0].state_dict()
    for number, expert in enumerate(layer.experts):
        for name, tensor in expert.state_dict().items():
            if not torch.equal(tensor, first[name]):
                return f"{name} of expert {number}"
    return None
