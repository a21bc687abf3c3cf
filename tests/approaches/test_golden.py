"""The first 20 losses of every approach, as they were when it was last looked at: a refactoring changes none.

A number copied from the code's own output, and said so: these curves do not show that an approach is right, only that
it is the same. After a change that is meant to move them, write them again and look at the difference:

    python tests/approaches/test_golden.py --write NAME [NAME ...]      (or --write all)
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from wlsup.approaches import APPROACHES, approach_class
from wlsup.batch import CaptionBatch
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.mini import mini_captions, normalised
from wlsup.files import write_json
from wlsup.optim import build_optimizer

GOLDEN = Path(__file__).parent / "golden"
STEPS, BATCH = 20, 8
FIRST, LATER = 1e-3, 2e-2
"""Relative tolerance at the first step and after 20: rounding differs between processors, and training amplifies it."""


@cache
def pairs():
    return mini_captions("train", STEPS * BATCH, 0)


def curve(name):
    """The losses of 20 steps on the first 160 mini pairs, each seen once, at default settings without a schedule.

    And without dropout, whose draws are each torch version's own.
    """
    torch.manual_seed(0)
    approach = approach_class(name)()
    for module in approach.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    approach.setup("fit")
    if hasattr(approach, "prepare"):  # learns from a labelled set of the run's
        data = CaptionDataModule(eval_sets=["mini_shapes", "mini_digits"])
        data.image_spec = approach.image_spec
        approach.prepare(data)
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    scenes, losses = pairs(), []
    for step in range(STEPS):
        some = slice(step * BATCH, (step + 1) * BATCH)
        captions = [several[0] for several in scenes.captions[some]]
        batch = CaptionBatch(normalised(scenes.images[some], approach.image_spec), captions, scenes.keys[some])
        approach.train()
        torch.manual_seed(step)
        parts = approach.losses(batch)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        approach.after_step()
        losses.append({part: value.item() for part, value in parts.items()})
    return {
        "approach": name,
        "bases": {role: base["sha256"] for role, base in approach.bases.items()},
        "losses": {part: [round(step[part], 6) for step in losses] for part in losses[0]},
    }


@pytest.mark.parametrize("name", APPROACHES)
def test_the_first_20_losses_are_the_golden_ones(name):
    path = GOLDEN / f"{name}.json"
    again = f"python tests/approaches/test_golden.py --write {name}"
    if not path.is_file():
        pytest.fail(f"{name} has no golden curve yet. Make it: {again}")
    wanted, found = json.loads(path.read_text()), curve(name)
    assert found["bases"] == wanted["bases"], f"the curve stands on other base weights; write it again: {again}"
    assert found["losses"].keys() == wanted["losses"].keys(), again
    for part, values in wanted["losses"].items():
        for step, (was, now) in enumerate(zip(values, found["losses"][part], strict=True)):
            allowed = FIRST + (LATER - FIRST) * step / (STEPS - 1)
            assert now == pytest.approx(was, rel=allowed, abs=1e-5), f"{part} at step {step + 1}; if meant: {again}"


def test_there_is_no_golden_curve_of_an_approach_that_is_not_there():
    assert {path.stem for path in GOLDEN.glob("*.json")} <= set(APPROACHES)


def main():
    parser = argparse.ArgumentParser(description="Write golden loss curves.")
    parser.add_argument("--write", nargs="+", metavar="NAME", required=True, help="approaches, or: all")
    names = parser.parse_args().write
    for name in APPROACHES if names == ["all"] else names:
        found = curve(name)
        write_json(GOLDEN / f"{name}.json", found)
        losses = found["losses"]["loss"]
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
