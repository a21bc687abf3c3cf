"""What a checkpoint of an approach holds, trained tensors and on what they stand, and which ones it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.models.weights import tensors_sha256

if TYPE_CHECKING:
    from wlsup.approaches.base import Approach

__all__ = ["StartingPoint", "check_checkpoint", "pack_checkpoint", "saved_names"]


@dataclass
class StartingPoint:
    """Where training started: the pretrained end of WiSE-FT's curve, and a fingerprint by which it is known again.

    A checkpoint does not hold these tensors, since the run's seed makes them again; it holds their SHA-256.

    Args:
        held: globs over names of trained tensors that WiSE-FT does not blend but takes from the fine-tuned end.
        keep: whether to remember the tensors, for who draws the curve when training ends.
        sha256: of the trained parameters as they were before step 1; "" where nobody wrote it down.
        tensors: what a checkpoint would have held before step 1; empty unless remembered.
    """

    held: tuple[str, ...] = ()
    keep: bool = False
    sha256: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note(self, approach: Approach) -> None:
        """Take the fingerprint, and the tensors where they are to be kept; later calls do nothing."""
        if self.sha256:
            return
        if self.keep:
            self.remember(approach)
        self.sha256 = tensors_sha256(_trained(approach))

    def remember(self, approach: Approach) -> None:
        """Keep the tensors as they are now."""
        state = approach.state_dict()
        self.tensors = {name: state[name].detach().clone() for name in sorted(saved_names(approach))}

    def check(self, approach: Approach) -> bool:
        """Return whether the remembered tensors are known to be the run's own start; False if nobody wrote it down.

        Raises:
            WlsupError: they are not.
        """
        if not self.sha256:
            return False
        own = tensors_sha256({name: self.tensors[name] for name in _trained(approach)})
        if own != self.sha256:
            raise WlsupError(
                f"The start that was made again ({own[:12]}) is not the one that this run was trained from "
                f"({self.sha256[:12]}), so there is no curve between the two. Use the run's own config.yaml, with its "
                "seed, and the versions in its env.json."
            )
        return True


def _trained(approach: Approach) -> dict[str, Tensor]:
    parameters = dict(approach.named_parameters())
    return {name: parameters[name].detach() for name in approach.plan.trained_names(approach)}


def saved_names(approach: Approach) -> set[str]:
    """Return the names of what a checkpoint holds: trained parameters, and the buffers that belong to them.

    Those are the buffers of a module that owns a trained parameter, and, of one without parameters (a table of hash
    routing), those right inside a module of which all parameters train.
    """
    trained = set(approach.plan.trained_names(approach))
    modules = dict(approach.named_modules())
    owners = {name.rpartition(".")[0] for name in trained}
    for owner in {name.rpartition(".")[0] for name, _ in approach.named_buffers()} - owners:
        parent = owner.rpartition(".")[0]
        around = [f"{parent}.{name}" for name, _ in modules[parent].named_parameters()]
        if around and trained.issuperset(around) and not any(True for _ in modules[owner].parameters()):
            owners.add(owner)
    buffers = {name for name, _ in approach.named_buffers() if name.rpartition(".")[0] in owners}
    return (trained | buffers) & set(approach.state_dict(keep_vars=True))


def pack_checkpoint(approach: Approach, checkpoint: dict[str, Any]) -> None:
    """Keep trained tensors only, and say on what they stand."""
    keep = saved_names(approach)
    checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in keep}
    checkpoint["wlsup"] = {
        "approach": approach.name,
        "bases": approach.bases,
        "plan": approach.plan.describe(approach),
        "start_sha256": approach.start.sha256,
    }


def check_checkpoint(approach: Approach, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another approach, of another base model, or with other tensors.

    Raises:
        WlsupError: naming the approach, the base model or the tensors that differ.
    """
    said = checkpoint.get("wlsup")
    if said is None:
        raise WlsupError("This checkpoint was not written by wlsup: it does not say its approach and base model.")
    if said["approach"] != approach.name:
        raise WlsupError(f"This checkpoint is of approach {said['approach']!r}; the run is of {approach.name!r}.")
    for role, base in approach.bases.items():
        theirs = said["bases"].get(role, {"id": "none", "sha256": ""})
        if theirs["sha256"] != base["sha256"]:
            raise WlsupError(
                f"This checkpoint stands on another {role}: {theirs['id']} ({theirs['sha256'][:12]}), not "
                f"{base['id']} ({base['sha256'][:12]}). Resume with the same base weights."
            )
    saved = saved_names(approach)
    shapes = {name: tuple(t.shape) for name, t in approach.state_dict().items() if name in saved}
    given = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
    if differing := sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)):
        raise WlsupError(
            f"This checkpoint does not fit the configuration: {len(differing)} tensors differ, first "
            f"{differing[0]} ({given.get(differing[0])} saved, {shapes.get(differing[0])} here). "
            "Use the run's own config.yaml."
        )
    approach.start.sha256 = said.get("start_sha256", "")  # the run's, whatever this process would have begun at
