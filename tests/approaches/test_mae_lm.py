"""What mae_lm promises beside the contract: both captioners train the encoder, which never sees a caption."""

import copy

import pytest
import torch

from wlsup.approaches.mae_lm import MaeLM
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.caption_tokens import load_tokenizer
from wlsup.models.language import GenerationSpec
from wlsup.models.prefix import PrefixSpec
from wlsup.objectives.captioning import CaptioningSpec
from wlsup.optim import build_optimizer

CAPTIONS = ["a red square left of a circle", "a kite", "a large blue dome on sand", "two stars"]
SHORT = PrefixSpec(pool=2)


@pytest.fixture
def batch():
    return CaptionBatch(torch.randn(4, 3, 64, 64), CAPTIONS, list("abcd"))


def make(prefix=SHORT, **objective):
    approach = MaeLM(objective=CaptioningSpec(**objective), prefix=prefix)
    approach.setup("fit")
    return approach.train()


def steps(approach, batch, count, lr=3e-3):
    groups = approach.plan.parameter_groups(approach)
    for group in groups:
        group["lr"] = lr
    optimizer = build_optimizer(approach.optimizer_spec, groups)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        parts = approach.losses(batch)
        parts["loss"].backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in parts.items()})
    return losses


@pytest.mark.parametrize("captioning", ["prefix", "parallel"])
class TestBothCaptioners:
    def test_what_the_plan_trains_moves_and_nothing_else(self, captioning, batch):
        approach = make(captioning=captioning)
        before = copy.deepcopy(approach.state_dict())
        steps(approach, batch, 3)
        trained = set(approach.plan.trained_names(approach))
        moved = {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == trained

    def test_captions_reach_the_encoder_as_a_loss(self, captioning, batch):
        approach = make(captioning=captioning, reconstruction_weight=0.0)
        if captioning == "parallel":
            torch.nn.init.normal_(approach.captioner.predict.weight)  # at zero the first gradient stops here
        approach.losses(batch)["loss"].backward()
        assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in approach.encoder.blocks)
        if captioning == "prefix":
            assert all(parameter.grad is None for parameter in approach.language.parameters())

    def test_the_image_tower_never_sees_a_caption(self, captioning, batch):
        approach, conditions, seen = make(captioning=captioning), [], []

        def note_condition(module, args, kwargs):
            conditions.append(kwargs.get("condition", args[1] if len(args) > 1 else None))

        approach.encoder.register_forward_pre_hook(note_condition, with_kwargs=True)
        approach.encoder.register_forward_hook(lambda module, args, output: seen.append(output.tokens))
        for captions in (CAPTIONS, CAPTIONS[::-1]):
            torch.manual_seed(0)
            approach.losses(CaptionBatch(batch.images, captions, batch.keys))
        assert conditions == [None] * 4
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])

    def test_a_batch_repeated_is_learned(self, captioning, batch):
        losses = steps(make(captioning=captioning), batch, 25)
        assert losses[-1]["captioning"] < losses[0]["captioning"] - 0.5

    def test_captions_for_any_picture(self, captioning, batch):
        approach = make(captioning=captioning).eval()
        said = approach.caption(batch.images)
        assert len(said) == 4
        assert all(isinstance(caption, str) for caption in said)

    def test_each_branch_can_be_left_out(self, captioning, batch):
        assert set(make(captioning=captioning, captioning_weight=0).losses(batch)) == {"loss", "reconstruction"}
        assert set(make(captioning=captioning, reconstruction_weight=0).losses(batch)) == {"loss", "captioning"}

    def test_weights_weigh(self, captioning, batch):
        approach = make(captioning=captioning, captioning_weight=2.0, reconstruction_weight=0.5)
        parts = approach.losses(batch)
        assert torch.allclose(parts["loss"], 2 * parts["captioning"] + 0.5 * parts["reconstruction"])

    def test_the_masked_view_is_the_reconstructions_own_and_one_pass(self, captioning, batch):
        approach, passes = make(PrefixSpec(), captioning=captioning, caption_view="masked"), []
        approach.encoder.register_forward_hook(lambda module, args, output: passes.append(output.tokens.shape[1]))
        approach.losses(batch)
        assert passes == [1 + 16]
        alone = make(PrefixSpec(), captioning=captioning, caption_view="masked", reconstruction_weight=0)
        assert set(alone.losses(batch)) == {"loss", "captioning"}


def test_masked_and_full_view_differ_in_what_the_captioner_gets(batch):
    lengths = []
    for view in ("full", "masked"):
        approach = make(PrefixSpec(), caption_view=view)
        approach.prefix.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
        approach.losses(batch)
    assert lengths == [64, 16]


def test_squares_of_masked_patches_are_refused_before_anything_runs():
    with pytest.raises(WlsupError, match="set prefix.pool to 1"):
        MaeLM(objective=CaptioningSpec(caption_view="masked"), prefix=SHORT)
    for fine in ({"captioning": "parallel"}, {"captioning_weight": 0.0}):
        MaeLM(objective=CaptioningSpec(caption_view="masked", **fine), prefix=SHORT)


def test_parallel_loads_no_language_model_but_names_the_tokenizer():
    approach = make(captioning="parallel")
    assert not [name for name, _ in approach.named_parameters() if name.startswith("language")]
    assert approach.bases["tokenizer"] == load_tokenizer("mini", 32).base
    assert set(make().bases) == {"encoder", "language"}


def test_parallel_captions_do_not_depend_on_their_neighbours_length(batch):
    approach = make(captioning="parallel", reconstruction_weight=0, parallel_fraction=1.0).eval()
    torch.nn.init.normal_(approach.captioner.predict.weight)
    both = approach.losses(CaptionBatch(batch.images[:2], CAPTIONS[:2], ["a", "b"]))["captioning"]
    tokens = approach.tokenizer(CAPTIONS[:2]).mask.sum(1)
    alone = [
        approach.losses(CaptionBatch(batch.images[i : i + 1], [CAPTIONS[i]], ["a"]))["captioning"] * tokens[i]
        for i in range(2)
    ]
    assert torch.allclose(both, sum(alone) / tokens.sum(), atol=1e-4)


@pytest.mark.parametrize(("fraction", "at_once"), [(1.0, True), (0.75, False)])
def test_decoding_is_the_way_that_was_trained(batch, monkeypatch, fraction, at_once):
    approach, asked = make(captioning="parallel", parallel_fraction=fraction).eval(), []
    generate = approach.captioner.generate

    def noted(memory, end_id, parallel):
        asked.append(parallel)
        return generate(memory, end_id, parallel)

    monkeypatch.setattr(approach.captioner, "generate", noted)
    approach.caption(batch.images)
    assert asked == [at_once]


def test_generation_follows_its_specification(batch):
    approach = make().eval()
    long, short = (approach.caption(batch.images, GenerationSpec(max_tokens=n)) for n in (32, 1))
    assert all(len(s.split()) <= 1 for s in short)
    assert any(len(one) > len(two) for one, two in zip(long, short, strict=True))
