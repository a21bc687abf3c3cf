"""What co_attention promises beside the contract, which covers the reading "co": the same of METER's."""

import copy

import torch

from wlsup.approaches.co_attention import CoAttentionApproach
from wlsup.batch import CaptionBatch
from wlsup.fusion.base import FusionSpec
from wlsup.fusion.co import MeterLayer
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.optim import build_optimizer

CAPTIONS = ["a red square", "a blue circle above a star", "green", "a small star left of a night"]


def test_the_contract_holds_for_meters_reading():
    approach = CoAttentionApproach(fusion=FusionSpec(kind="co_meter"))
    assert all(type(layer) is MeterLayer for layer in approach.fusion.layers)
    images, batch = torch.randn(2, 3, 64, 64), CaptionBatch(torch.randn(4, 3, 64, 64), CAPTIONS, list("abcd"))
    approach.setup("fit")
    start = approach.eval().features(images)
    assert (start - build_vision(VisionSpec()).eval().features(images)).abs().max() <= 1e-6
    trained, before = set(approach.plan.trained_names(approach)), copy.deepcopy(approach.state_dict())
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    for _ in range(3):
        approach.train()
        optimizer.zero_grad()
        approach.losses(batch)["loss"].backward()
        optimizer.step()
    assert {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])} == trained
    assert (approach.eval().features(images) - start).abs().max() > 1e-4
    assert torch.equal(
        approach.embed(batch)[0], approach.embed(CaptionBatch(batch.images, CAPTIONS[::-1], batch.keys))[0]
    )
