"""A frozen causal language model from transformers: embeddings in, logits or captions out.

Shapes: B samples, P prefix positions, T tokens, L = P + T positions, W channels of the input embeddings, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wlsup.errors import WlsupError, choose
from wlsup.models.caption_tokens import CaptionTokenizer, load_tokenizer, missing, transformers_folder
from wlsup.models.weights import tensors_sha256
from wlsup.sharding import has_shards

__all__ = ["FAMILIES", "GenerationSpec", "LanguageModel", "LanguageSpec", "fuse_gelu"]

FAMILIES = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2")
"""transformers' ``model_type`` of the models whose prefix captioning and generation is tested."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageSpec:
    """Which causal language model, and how long its captions are.

    Args:
        weights: "mini", a hub id of transformers (``openai-community/gpt2``) or a local folder of one.
        max_length: captions are cut to this many tokens, the end token included.
        dtype: of the frozen weights. Half precision halves the memory of a large model; logits are fp32 always.
    """

    weights: str = "mini"
    max_length: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        choose("language dtype", self.dtype, _DTYPES)


@dataclass(frozen=True)
class GenerationSpec:
    """How captions are put into words; the work is done by transformers' own ``generate``.

    Args:
        method: "greedy"; "beam"; or "nucleus" (Holtzman et al. 2020, section 3.1: sample from the smallest set of
            tokens whose probabilities add up to at least ``top_p``).
        max_tokens: tokens of a caption at most, the end token included.
        beams: of beam search, at least 2.
        top_p: of nucleus sampling, in (0, 1].
        temperature: of nucleus sampling, > 0; divides the logits before the nucleus is taken.
        seed: of sampling; the same seed gives the same captions.

    Raises:
        WlsupError: a value out of its range, or an option that the method does not read.
    """

    method: Literal["greedy", "beam", "nucleus"] = "greedy"
    max_tokens: int = 32
    beams: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        choose("generation method", self.method, ("greedy", "beam", "nucleus"))
        if self.max_tokens < 1 or self.beams < 2 or not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise WlsupError(
                "generation needs max_tokens >= 1, beams >= 2, top_p in (0, 1] and temperature > 0, not "
                f"{self.max_tokens}, {self.beams}, {self.top_p} and {self.temperature}."
            )
        for option, method in (("beams", "beam"), *((name, "nucleus") for name in ("top_p", "temperature", "seed"))):
            if self.method != method and getattr(self, option) != getattr(GenerationSpec, option):
                raise WlsupError(
                    f"generation.{option} is of method: {method}; {self.method} does not read it: leave it out."
                )


class LanguageModel(nn.Module):
    """A causal language model whose weights are only read, while gradients pass through it to what is in front.

    Freezing is the plan's (``Freeze("language.*")``): nothing here switches gradients off, so that adapters may be
    attached and a plan may train them. The state dict is ``model.`` + transformers' keys.

    Args:
        spec: which one.

    Raises:
        WlsupError: the folder or hub id holds no causal language model and tokenizer, an incomplete one, or one of a
            family that is not in `FAMILIES`.
    """

    def __init__(self, spec: LanguageSpec) -> None:
        super().__init__()
        self.spec = spec
        family = _family(spec.weights)
        self.tokenizer: CaptionTokenizer = load_tokenizer(spec.weights, spec.max_length)
        self.model = _load(spec, family).eval()
        self.base = {"id": spec.weights, "sha256": tensors_sha256(self.model.state_dict())}

    @property
    def width(self) -> int:
        """Channels W of the input embeddings; not always the hidden size (OPT-350M: 512 and 1,024)."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def hidden_size(self) -> int:
        """Channels of the blocks' hidden states: what adapters read and change."""
        return int(self.model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number V of token ids that the logits are over."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def positions(self) -> int:
        """Number of positions that the model was made for."""
        return int(self.model.config.max_position_embeddings)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: where adapters go."""
        depth = self.model.config.num_hidden_layers
        return next(
            module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
        )

    def check_length(self, prefix_length: int, generation: GenerationSpec | None = None) -> None:
        """Refuse a prefix that leaves no room for the captions, neither for people's nor for generated ones.

        Raises:
            WlsupError: with the positions that there are, and what to lower.
        """
        longest = {"language.max_length": self.tokenizer.max_length}
        if generation is not None:
            longest["generation.max_tokens"] = generation.max_tokens
        for option, length in longest.items():
            if prefix_length + length > self.positions:
                raise WlsupError(
                    f"{prefix_length} picture tokens and captions of {length} tokens need {prefix_length + length} "
                    f"positions; language model {self.spec.weights!r} has {self.positions}. Lower {option}, or "
                    "shorten the prefix (prefix.pool, prefix.tokens: pooled)."
                )

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, W), in fp32."""
        return self.model.get_input_embeddings()(ids).float()

    def forward(self, embeddings: Tensor, mask: Tensor | None = None, keep: int = 0) -> Tensor:
        """Return the logits of the next token at each position.

        Args:
            embeddings: (B, L, W), a prefix followed by embedded ids.
            mask: (B, L), 0 or False at padding; None: all real.
            keep: give the logits of the last ``keep`` positions only; 0: of all. A prefix of picture tokens predicts
                nothing but the first word, and its logits over a large vocabulary would cost more than the model.

        Returns:
            (B, L, V) or (B, keep, V), fp32.
        """
        body, head = self.model.base_model, self.model.get_output_embeddings()
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
        hidden = body(
            inputs_embeds=embeddings.to(head.weight.dtype), attention_mask=mask.to(torch.int64), use_cache=False
        )[0]
        return head(hidden[:, -keep:].contiguous()).float()  # of a view it would be a product a sample

    @torch.no_grad()
    def generate(self, embeddings: Tensor, spec: GenerationSpec, mask: Tensor | None = None) -> list[str]:
        """Put what comes after a prefix into words, one token a step through the KV cache.

        Args:
            embeddings: (B, L, W) picture tokens, and embedded words of a prompt if there is one.
            spec: how.
            mask: (B, L), 0 or False at padding, which must be on the left; None: all real.

        Returns:
            B captions, without what was given.

        Raises:
            WlsupError: prefix and caption need more positions than the model has.
        """
        from transformers import GenerationConfig
        from transformers.utils import logging

        if embeddings.shape[1] + spec.max_tokens > self.positions:
            raise WlsupError(
                f"A prefix of {embeddings.shape[1]} positions and {spec.max_tokens} tokens are more than the "
                f"{self.positions} positions of language model {self.spec.weights!r}. Lower generation.max_tokens."
            )
        sampled = spec.method == "nucleus"
        config = GenerationConfig(
            max_new_tokens=spec.max_tokens,
            num_beams=spec.beams if spec.method == "beam" else 1,
            do_sample=sampled,
            # transformers' default is top_k = 50; outside sampling it warns of any of the three.
            **({"top_p": spec.top_p, "temperature": spec.temperature, "top_k": 0} if sampled else {}),
            eos_token_id=self.tokenizer.end_id,
            pad_token_id=self.tokenizer.pad_id,
            bos_token_id=self.tokenizer.start_id,
            use_cache=True,
        )
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
        weight = self.model.get_output_embeddings().weight
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of the padding that it puts behind finished captions itself
        try:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(spec.seed)
                ids = self.model.generate(
                    inputs_embeds=embeddings.to(weight.dtype),
                    attention_mask=mask.to(torch.int64),
                    generation_config=config,
                    # of a shared out model all processes take each step, until the last one is done
                    synced_gpus=(has_shards(self.model) and dist.get_world_size() > 1) or None,
                )
        finally:
            logging.set_verbosity(verbosity)
        return self.tokenizer.decode(ids)


def _family(weights: str) -> str:
    from transformers import AutoConfig

    try:
        family = AutoConfig.from_pretrained(transformers_folder(weights)).model_type
    except WlsupError:
        raise
    except Exception as error:  # transformers and the hub's client raise their own by turns
        raise missing("causal language model", weights, error) from error
    return choose("language model family", family, FAMILIES, hint="It must be a causal language model.")


def _load(spec: LanguageSpec, family: str) -> nn.Module:
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    try:
        place = transformers_folder(spec.weights)
        model, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and the hub's client raise their own by turns
        raise missing("causal language model", spec.weights, error) from error
    # transformers draws tensors at random that the file lacks, and only warns.
    if lacking := sorted(report["missing_keys"]):
        raise WlsupError(
            f"The weights of {spec.weights!r} lack {len(lacking)} tensors of a {family}, first {lacking[0]!r}: the "
            "file is of another model, or incomplete. Copy it again."
        )
    model.generation_config = transformers.GenerationConfig()  # a folder's own would change what greedy and beam mean
    fuse_gelu(model)
    return model.to(_DTYPES[spec.dtype])


def fuse_gelu(model: nn.Module) -> None:
    """Put torch's tanh GELU in place of transformers', which takes eight elementwise steps and keeps what each made.

    The function is the same, to rounding. GPT-2, GPT-Neo and GPT-J use it.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ in ("NewGELUActivation", "FastGELUActivation"):
                setattr(module, name, nn.GELU(approximate="tanh"))
