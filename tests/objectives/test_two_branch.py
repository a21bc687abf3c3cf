"""The two-branch objective: told reconstruction, untold contrast."""

import pytest
import torch

from wlsup.adapters.film import FiLM
from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.models.heads import ContrastiveHead
from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.vision import VisionSpec
from wlsup.objectives.two_branch import ObjectiveSpec, image_embedding, two_branch_losses

TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3)")


@pytest.fixture
def parts():
    mae = build_mae(TINY, DecoderSpec(width=32, depth=1, heads=2))
    adapter = FiLM(48, 2, condition_width=12).attach(mae.encoder)
    for generator in adapter.generators:
        torch.nn.init.normal_(generator.weight, std=0.2)
    return mae, ContrastiveHead(48, 12, 16), adapter


def captions(pooled):
    count = len(pooled)
    mask = torch.ones(count, 3, dtype=torch.bool)
    return Condition(torch.zeros(count, 3, 12), mask, pooled, torch.ones(count, dtype=torch.bool))


def losses(parts, pooled, **settings):
    mae, head, _ = parts
    torch.manual_seed(7)
    images = torch.randn(6, 3, 32, 32)
    return two_branch_losses(mae, head, images, captions(pooled), ObjectiveSpec(**settings))


def test_the_sum_is_weighted_and_a_weight_of_zero_leaves_the_branch_out(parts):
    pooled = torch.randn(6, 12)
    both = losses(parts, pooled, reconstruction_weight=0.5, contrastive_weight=2.0)
    wanted = 0.5 * both["reconstruction"] + 2.0 * both["contrastive"]
    assert torch.allclose(both["loss"], wanted)
    assert "contrastive" not in losses(parts, pooled, contrastive_weight=0.0)
    assert "reconstruction" not in losses(parts, pooled, reconstruction_weight=0.0)


def test_captions_reach_the_reconstruction_unless_dropped(parts):
    one, other = torch.randn(6, 12), torch.randn(6, 12)
    told = [losses(parts, p, caption_dropout=0.0)["reconstruction"] for p in (one, other)]
    untold = [losses(parts, p, caption_dropout=1.0)["reconstruction"] for p in (one, other)]
    assert not torch.equal(told[0], told[1])
    assert torch.equal(untold[0], untold[1])


def test_the_contrastive_branch_sees_the_view_that_is_set(parts):
    mae, head, _ = parts
    seen = []
    mae.encoder.register_forward_hook(lambda module, args, output: seen.append(output.tokens.shape[1]))
    images = torch.randn(2, 3, 32, 32)  # 16 patches, of which a mask of 0.75 leaves 4
    for view in ("full", "masked"):
        image_embedding(mae, head, images, ObjectiveSpec(contrastive_view=view))
    mae.eval()  # as a frozen encoder is in training too
    image_embedding(mae, head, images, ObjectiveSpec(contrastive_view="masked"))
    head.eval()
    image_embedding(mae, head, images, ObjectiveSpec(contrastive_view="masked"))
    assert seen == [1 + 16, 1 + 4, 1 + 4, 1 + 16]


def test_null_embedding_is_trained_by_the_contrastive_branch(parts):
    adapter = parts[2]
    losses(parts, torch.randn(6, 12), reconstruction_weight=0.0)["loss"].backward()
    assert adapter.embedding.null.grad.abs().sum() > 0


def test_options_of_a_branch_that_is_left_out_are_refused():
    for unread in ({"caption_dropout": 0.1}, {"mask_ratio": 0.5}):
        with pytest.raises(WlsupError, match=f"leave objective.{next(iter(unread))} out"):
            ObjectiveSpec(reconstruction_weight=0.0, **unread)
    assert ObjectiveSpec(reconstruction_weight=0.0, contrastive_view="masked", mask_ratio=0.5).mask_ratio == 0.5


def test_caption_dropout_drops_the_share_it_names():
    kept = captions(torch.randn(4000, 12)).drop(0.3).present.float().mean()
    assert kept == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    "settings",
    [{"mask_ratio": 1.0}, {"caption_dropout": -0.1}, {"contrastive_weight": -1.0},
     {"contrastive_weight": 0.0, "reconstruction_weight": 0.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(WlsupError):
        ObjectiveSpec(**settings)
