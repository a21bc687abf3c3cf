"""The model card of an export: what it is, how to load it, what taught it, what it scores and where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wlsup.evaluation.table import knn_markdown

__all__ = ["loading_lines", "model_card"]

_KIND = {"timm": "timm", "program": "pytorch", "adapter": "wlsup"}


def loading_lines(kind: str, folder: str) -> list[str]:
    """Return the lines of Python that load an export and use it.

    Args:
        kind: "timm", "program", "adapter" or "language".
        folder: its name; the lines run beside it.
    """
    if kind == "timm":
        return [
            "import timm",
            f'encoder = timm.create_model("local-dir:{folder}", pretrained=True).eval()',
            "features = encoder(images)",
        ]
    if kind == "program":
        return [
            "import torch",
            f'encoder = torch.export.load("{folder}/encoder.pt2").module()',
            "features = encoder(images)",
        ]
    if kind == "language":
        return [
            "from wlsup.moe.checkpoint import load_moe",
            f'language = load_moe("{folder}")',
            "logits = language.model(input_ids=ids).logits",
        ]
    return [
        "from pathlib import Path; from wlsup.cli.export import load_adapter",
        f'approach, data = load_adapter(Path("{folder}"))',
        "features = approach.features(images)",
    ]


def model_card(
    export: Mapping[str, Any], folder: str, results: Mapping[str, Any], curve: Mapping[str, Any], licence: str
) -> str:
    """Return README.md of an export.

    Args:
        export: what was written: kind, what, approach, alpha, bases, image, width, max_difference.
        folder: the export's name.
        results: the run's results.json, or nothing.
        curve: the run's wise_ft.json, or nothing.
        licence: an identifier of the Hugging Face hub's, or "other".
    """
    base, image, alpha = export["bases"]["encoder"], export["image"], export["alpha"]
    size, table, lost = image["size"], *_scores(results, curve, alpha)
    taught = f"taught with captions: {export['approach']}"
    title = f"{base['id']} {taught}" if alpha else f"{base['id']} from before it was {taught}"
    place = f"WiSE-FT alpha {alpha:g}: (1 - {alpha:g}) pretrained + {alpha:g} fine-tuned. " if alpha != 1 else ""
    captions = results.get("captions", {})
    sections = {
        "How to load it": [
            "```python",
            *loading_lines(export["kind"], folder),
            "```",
            "",
            f"`images` are (B, 3, {size}, {size}), `features` (B, {export['width']}). Resize the shorter side to "
            f"{image['resize']} pixels ({image['interpolation']}), crop the centre, scale to [0, 1], subtract the mean "
            f"{list(image['mean'])} and divide by {list(image['std'])}. Compare features by their cosine.",
            *(
                [f"The lines above give the features of {_whose(alpha)} to {export['max_difference']:.0e}."]
                if export["max_difference"] is not None
                else ["The command `wlsup knn " + folder + "` scores it."]
            ),
        ],
        "What it was taught with" if alpha else "What taught the run, and is not in these weights": [
            f"* base model: `{base['id']}`, sha256 `{base['sha256']}`",
            *(f"* {role}: `{b['id']}`, sha256 `{b['sha256']}`" for role, b in export["bases"].items() if b is not base),
            f"* captions: source `{captions.get('source', 'unknown')}`, {captions.get('pairs', 'unknown')} pictures, "
            f"sha256 of the list of their keys (manifest) `{captions.get('manifest_sha256', 'unknown')}`",
            f"* {_parameters(results)}",
        ],
        "What it scores": [table],
        "Limits": [
            "* It sees pictures only: no caption goes in, and what it learned from captions is in its weights.",
            lost,
            "* The scores are of these sets alone, from one run, one seed. On other pictures they say little: score "
            "it on your own before you rely on it.",
            "* It repeats what its captions and pictures left out or got wrong. It was not tested for decisions about "
            "people.",
        ],
        "Licence": [
            f"{licence}. The terms of the base model and of the captions apply as well."
            if licence != "other"
            else "Not stated. The terms of the base model and of the captions apply."
        ],
    }
    front = ["---", f"license: {licence}", f"library_name: {_KIND[export['kind']]}", "tags:"]
    front += ["- image-feature-extraction", "- wlsup", "---"]
    lines = [*front, f"# {title}", "", f"{place}{export['what'][0].upper()}{export['what'][1:]}."]
    for heading, body in sections.items():
        lines += ["", f"## {heading}", "", *body]
    return "\n".join(lines) + "\n"


def _whose(alpha: float) -> str:
    return "the trained encoder" if alpha == 1 else f"the encoder at alpha {alpha:g}"


def _parameters(results: Mapping[str, Any]) -> str:
    if not results:
        return "training: this run has no results.json, so nobody knows how long it trained"
    parameters = results["parameters"]
    return (
        f"training: seed {results['seed']}, {results['steps']:,} steps, {results['samples_seen']:,} pictures seen, "
        f"{parameters['trained']:,} of {parameters['total']:,} parameters"
    )


def _scores(results: Mapping[str, Any], curve: Mapping[str, Any], alpha: float) -> tuple[str, str]:
    """Return the k-NN table at alpha, and the line of what was lost."""
    entries, protocol = results.get("knn", {}), results.get("protocol", "")
    if alpha != 1:
        entries, protocol = _at(curve, alpha), curve.get("protocol", "")
    if not entries:
        said = "The run's k-NN was not measured" + (
            f" at alpha {alpha:g}: `wlsup wise-ft RUN --alphas {_grid(alpha)}` does." if alpha != 1 else "."
        )
        return said, "* Nobody has measured what it gained and lost."
    lost = [
        f"{name} ({100 * entry['delta']:+.1f} points, 95% interval {100 * entry['ci95'][0]:+.1f} to "
        f"{100 * entry['ci95'][1]:+.1f})"
        for name, entry in entries.items()
        if entry["ci95"][1] < 0
    ]
    identity = {name: results[name] for name in ("approach", "preset", "seed") if name in results}
    table = knn_markdown({**identity, "knn": entries, "protocol": protocol})
    if lost:
        return table, f"* It is worse than its base model on {', '.join(lost)}."
    return table, "* On none of these sets does the interval say that it is worse than its base model."


def _grid(alpha: float) -> str:
    return ",".join(f"{place:g}" for place in sorted({0, alpha, 1}))


def _at(curve: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Return wise_ft.json's figures at one alpha in the form of results.json's; nothing if it has none there."""
    if alpha not in curve.get("alphas", ()):
        return {}
    position = curve["alphas"].index(alpha)
    return {
        name: {
            "domain": entry["domain"],
            "k": entry["k"],
            "test": entry["test"],
            "pretrained": entry["accuracy"][0],
            "finetuned": entry["accuracy"][position],
            "delta": entry["delta"][position],
            "ci95": entry["ci95"][position],
        }
        for name, entry in curve["sets"].items()
    }
