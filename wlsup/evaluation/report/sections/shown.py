"""What models make of pictures: reconstructions, and captions."""

from __future__ import annotations

from collections.abc import Sequence

from wlsup.evaluation.report.blocks import Block, Cell, Pictures, Section, Shown, Table, Text
from wlsup.evaluation.report.groups import Group
from wlsup.evaluation.report.pictures import Picture, logged_pictures, shown

__all__ = ["captions", "reconstructions"]


def reconstructions(groups: Sequence[Group]) -> Section:
    """Return the MAE's grids before training and after, of each group's first seed that has them."""
    found = []
    for group in groups:
        what = "input, masked, prediction, and the prediction pasted into what was seen"
        pictures = _ends(group, "reconstructions", f"Masked pictures and what {group.name} makes of them: {what}")
        if pictures:
            found.append(Shown(_steps(group.name, pictures), pictures))
    if not found:
        none = "No run logged reconstructions: approaches without a masked autoencoder show none."
        return Section("reconstructions", "Reconstructions", [Text(none)])
    text = "A row a picture: input, masked, prediction, prediction pasted into what was seen. Masks are the same."
    return Section(
        "reconstructions", "Reconstructions", [Text(text), Pictures("Before training and after", tuple(found))]
    )


def captions(groups: Sequence[Group]) -> Section:
    """Return what each captioner says of held-out pictures, beside what people say."""
    blocks: list[Block] = []
    for group in groups:
        run = next((run for run in group.runs if (run.results.get("captioning") or {}).get("samples")), None)
        if run is None:
            continue
        pictures = _ends(
            group, "captions", f"Held-out pictures with the captions of {group.name} and of people beside them"
        )
        if pictures:
            blocks.append(
                Pictures(f"{group.name}: before training and after", (Shown(_steps("", pictures), pictures),))
            )
        rows = tuple(
            (Cell(sample["key"]), Cell(sample["generated"] or "(nothing)"), Cell(" / ".join(sample["references"])))
            for sample in run.results["captioning"]["samples"]
        )
        caption = f"Captions of {group.name}, seed {run.seed}, by {run.results['captioning'].get('generation')}."
        blocks.append(Table(caption, ("picture", "generated", "human"), rows, words=3))
    return Section("captions", "Captions", blocks or [Text("No run puts pictures into words.")])


def _ends(group: Group, tag: str, what: str) -> tuple[Picture, ...]:
    for run in group.runs:
        found = [
            shown(data, f"{what}; step {step}, seed {run.seed}.", step)
            for step, data in logged_pictures(run.folder, tag)
        ]
        kept = tuple(picture for picture in found if picture is not None)
        if kept:
            return kept
    return ()


def _steps(name: str, pictures: Sequence[Picture]) -> str:
    steps = " and ".join(f"step {picture.step}" for picture in pictures)
    return f"{name}: {steps}" if name else steps
