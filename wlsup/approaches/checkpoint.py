"""What a checkpoint of an approach holds, trained tensors and on what they stand, and which ones it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wlsup.errors import WlsupError

if TYPE_CHECKING:
    from wlsup.approaches.base import Approach

__all__ = ["check_checkpoint", "pack_checkpoint", "saved_names"]


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
