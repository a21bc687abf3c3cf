"""What merged_attention promises beside the contract."""

import pytest
import torch

from wlsup.approaches.merged_attention import MergedAttentionApproach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.fusion.base import FusionSpec


def test_captions_condition_the_reconstruction_and_pictures_are_contrasted_under_null():
    approach, conditions = MergedAttentionApproach(), []
    approach.encoder.blocks[0].register_forward_hook(
        lambda module, inputs, output: conditions.append((approach.encoder.condition_slot.value, output.shape[1]))
    )
    approach.losses(CaptionBatch(torch.randn(2, 3, 64, 64), ["a red square", "a star"], ["a", "b"]))
    (told, visible), (null, all_patches) = conditions
    assert told is not None and visible == 1 + 16
    assert null is None and all_patches == 1 + 64


def test_another_strategys_kind_is_refused():
    with pytest.raises(WlsupError, match="Valid: merged"):
        MergedAttentionApproach(fusion=FusionSpec(kind="co"))


def test_layers_stand_behind_every_so_many_blocks():
    assert MergedAttentionApproach(fusion=FusionSpec(every=3)).fusion.places == [2, 5]
    assert MergedAttentionApproach(fusion=FusionSpec(every=4)).fusion.places == [3]
