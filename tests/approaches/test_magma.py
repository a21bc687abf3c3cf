"""What magma promises beside the contract: the language model's weights never move, and its captions end."""

import copy
import sys
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F

from wlsup.adapters.language import LanguageAdapterSpec
from wlsup.approaches.linear_map import LinearMap
from wlsup.approaches.mae_lm import MaeLM
from wlsup.approaches.magma import Magma
from wlsup.approaches.magma_moe import MagmaMoE
from wlsup.batch import CaptionBatch
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.models.language import FAMILIES, GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import PrefixSpec
from wlsup.optim import build_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_language import write_family  # noqa: E402

CAPTIONS = ["a red square left of a circle", "a kite", "a large blue dome on sand", "two stars"]
SHORT = PrefixSpec(pool=2, dropout=0.0)
BOTH = LanguageAdapterSpec(attention="scaled_parallel", factor=8)
ADAPTERS = 4 * (2 * 128 * 32 + 32 + 128)  # four blocks of width 128, factor 4
MAP = 96 * 128 + 128 + 2 * 128


@pytest.fixture
def batch():
    return CaptionBatch(torch.randn(4, 3, 64, 64), CAPTIONS, list("abcd"))


def make(prefix=SHORT, **options):
    approach = Magma(prefix=prefix, **options)
    approach.setup("fit")
    return approach.train()


def steps(approach, batch, count, lr=3e-3):
    groups = approach.plan.parameter_groups(approach)
    for group in groups:
        group["lr"] = lr
        group["weight_decay"] = 0.1
    optimizer = build_optimizer(approach.optimizer_spec, groups)
    for _ in range(count):
        optimizer.zero_grad()
        approach.losses(batch)["loss"].backward()
        optimizer.step()


class TestWhatTrains:
    def test_exactly_adapters_and_map_with_a_frozen_encoder(self):
        approach = make(encoder_lr=0)
        assert approach.plan.describe(approach)["trained"] == ADAPTERS + MAP == 46_080
        assert {n.partition(".")[0] for n in approach.plan.trained_names(approach)} == {"adapters", "prefix"}

    def test_and_the_encoder_but_its_positions_at_a_rate_of_its_own(self):
        approach = make(lr=1e-3, encoder_lr=1e-5)
        encoder = sum(p.numel() for n, p in approach.vision.named_parameters() if "pos_embed" not in n)
        assert approach.plan.describe(approach)["trained"] == ADAPTERS + MAP + encoder
        rates = {g["name"]: g["lr"] for g in approach.plan.parameter_groups(approach)}
        assert {name: rate for name, rate in rates.items() if "vision" in name} == {
            name: 1e-5 for name in rates if "vision" in name
        }
        assert {rate for name, rate in rates.items() if "vision" not in name} == {1e-3}

    @pytest.mark.parametrize("encoder_lr", [0, 1e-4])
    def test_real_steps_move_all_of_it_and_nothing_of_the_language_model(self, batch, encoder_lr):
        approach = make(encoder_lr=encoder_lr, adapters=BOTH)
        before = copy.deepcopy(approach.state_dict())
        steps(approach, batch, 3)
        moved = {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == set(approach.plan.trained_names(approach))
        assert not any(name.startswith("language.") for name in moved)
        assert any(name.startswith("vision.") for name in moved) == bool(encoder_lr)
        assert all(parameter.grad is None for parameter in approach.language.parameters())
        fresh = LanguageModel(LanguageSpec())
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(approach.language.state_dict()[name], tensor), name

    def test_the_encoder_never_sees_a_caption(self, batch):
        approach, conditions = make(), []
        approach.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: conditions.append((len(args), kwargs)), with_kwargs=True
        )
        approach.losses(batch)
        assert conditions == [(1, {})]

    def test_captions_reach_the_encoder_as_a_loss(self, batch):
        approach = make()
        approach.losses(batch)["loss"].backward()
        assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in approach.encoder.blocks)


class TestLabels:
    def test_the_loss_is_over_words_and_the_end_token_and_no_padding(self, batch):
        approach = make().eval()
        language = approach.language
        with torch.no_grad():
            front = approach.prefix(approach.encoder(batch.images), approach.encoder.grid_size)
            nats, count = 0.0, 0
            for row, caption in zip(front, CAPTIONS, strict=True):
                ids = language.tokenizer([caption]).ids[0]
                assert ids[-1] == language.tokenizer.end_id
                whole = torch.cat([row[None], language.embed(ids[None])], dim=1)
                logits = language.model(inputs_embeds=whole).logits[0]
                nats += float(F.cross_entropy(logits[len(row) - 1 : -1], ids, reduction="sum"))
                count += len(ids)
            assert float(approach.losses(batch)["loss"]) == pytest.approx(nats / count, rel=1e-5)

    def test_what_it_learned_it_says_and_stops(self):
        torch.manual_seed(1)
        pairs = CaptionBatch(torch.randn(2, 3, 64, 64), ["a red square left of a circle", "two stars"], ["a", "b"])
        approach = make(PrefixSpec(pool=4, dropout=0.0), encoder_lr=0)
        steps(approach, pairs, 60, lr=5e-3)
        approach.eval()
        assert float(approach.losses(pairs)["loss"].detach()) < 0.1
        assert approach.caption(pairs.images) == pairs.captions
        for generation in (GenerationSpec("beam"), GenerationSpec("nucleus", top_p=0.5)):
            assert approach.caption(pairs.images, generation) == pairs.captions
        assert approach.caption(pairs.images.flip(0)) == pairs.captions[::-1]


class TestAdapters:
    def test_at_step_0_the_language_model_is_the_pretrained_one_and_its_adapters_have_a_gradient(self, batch):
        approach = make(adapters=BOTH)
        before = approach.losses(batch)["loss"]
        with approach.adapters.aside():
            assert torch.equal(approach.losses(batch)["loss"], before)
        before.backward()
        assert all(
            slot.up.weight.grad.abs().max() > 0 for slot in [*approach.adapters.mlp, *approach.adapters.attention]
        )

    def test_a_checkpoint_brings_them_back(self, batch):
        approach = make(adapters=BOTH)
        steps(approach, batch, 2)
        checkpoint = {"state_dict": dict(approach.state_dict())}
        approach.on_save_checkpoint(checkpoint)
        fresh = make(adapters=BOTH)
        fresh.on_load_checkpoint(checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"], strict=False)
        assert torch.equal(fresh.eval().losses(batch)["loss"], approach.eval().losses(batch)["loss"])
        with pytest.raises(WlsupError, match="tensors differ"):
            make().on_load_checkpoint(checkpoint)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family(self, family, tmp_path, batch):
        language = LanguageSpec(weights=str(write_family(tmp_path, family)), max_length=16)
        approach = make(language=language, adapters=BOTH)
        before = copy.deepcopy(approach.language.state_dict())
        start = float(approach.losses(batch)["loss"].detach())
        steps(approach, batch, 5)
        assert float(approach.losses(batch)["loss"].detach()) < start
        assert all(torch.equal(tensor, before[name]) for name, tensor in approach.language.state_dict().items())
        assert len(approach.eval().caption(batch.images, GenerationSpec(max_tokens=4))) == 4


def fit(encoder_lr=1e-4, validation_pairs=16, cache_features=False):
    torch.manual_seed(0)
    approach = Magma(prefix=PrefixSpec(pool=4), lr=5e-3, encoder_lr=encoder_lr, language=LanguageSpec(max_length=24))
    data = CaptionDataModule(
        pairs=32, validation_pairs=validation_pairs, batch_size=16, eval_sets=[], cache_features=cache_features
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(approach, data)
    return approach.eval(), data


class TestCache:
    def test_a_frozen_encoder_runs_once_over_all_pictures(self):
        approach, data = fit(encoder_lr=0, cache_features=True)
        [batch] = list(data.val_dataloader())
        assert batch.images.numel() == 0
        runs = []
        approach.encoder.register_forward_hook(lambda *_: runs.append(1))
        measured = approach.measure(data)
        assert not runs
        with torch.no_grad():
            assert measured["rows"][0]["value"] == pytest.approx(float(approach.losses(batch)["loss"]), abs=1e-5)
        assert all(slot.up.weight.abs().max() > 0 for slot in approach.adapters.mlp)

    def test_a_tuned_one_says_that_it_cannot(self):
        with pytest.raises(WlsupError, match=r"cache_features.*magma trains the encoder"):
            fit(encoder_lr=1e-4, cache_features=True)

    def test_each_approach_speaks_for_itself(self):
        frozen, tuned = Magma(encoder_lr=0), Magma()
        assert (frozen.untouched, frozen.cacheable) == (True, "tokens")
        assert (tuned.untouched, tuned.cacheable) == (False, "")
        assert not Magma.untouched


class TestMeasure:
    @pytest.fixture(scope="class")
    def run(self):
        return fit()

    def test_rows_are_what_they_say(self, run):
        approach, data = run
        before = {name: tensor.clone() for name, tensor in approach.state_dict().items()}
        measured = approach.measure(data)
        assert [row["unit"] for row in measured["rows"]] == ["nats", "nats", "nats", "%"]
        values = {row["what"]: row["value"] for row in measured["rows"]}
        [batch] = list(data.val_dataloader())
        with torch.no_grad():
            assert values["this captioner"] == pytest.approx(float(approach.losses(batch)["loss"]), abs=1e-5)
            moved = CaptionBatch(batch.images.roll(1, 0), batch.captions, batch.keys)
            other = float(approach.losses(moved)["loss"])
            plain = LanguageModel(LanguageSpec(max_length=24))
            captions = plain.tokenizer(batch.captions)
            start = torch.full((16, 1), plain.tokenizer.start_id)
            logits = plain(plain.embed(torch.cat([start, captions.ids], dim=1)))[:, :-1]
            alone = F.cross_entropy(logits[captions.mask], captions.ids[captions.mask])
        assert values["this captioner, the next pair's picture"] == pytest.approx(other, abs=1e-5)
        assert values["the language model alone"] == pytest.approx(float(alone), abs=1e-5)
        assert other != values["this captioner"]
        assert len(measured["captions"]) == 4
        assert all(pair["generated"] in measured["note"] for pair in measured["captions"])
        assert approach.measure(data) == measured  # adapters attached as before
        assert all(torch.equal(tensor, before[name]) for name, tensor in approach.state_dict().items())

    def test_nothing_held_out_is_nothing_measured(self):
        approach, data = fit(validation_pairs=0)
        assert approach.measure(data) == {}


def test_no_room_for_the_captions_is_refused():
    with pytest.raises(WlsupError, match=r"need \d+ positions"):
        Magma(language=LanguageSpec(max_length=80), prefix=PrefixSpec())


@pytest.mark.parametrize("captioner", [Magma, MagmaMoE, LinearMap, MaeLM])
def test_no_room_for_what_is_generated_is_refused_before_anything_trains(captioner):
    with pytest.raises(WlsupError, match=r"need \d+ positions.*Lower generation.max_tokens"):
        captioner(generation=GenerationSpec(max_tokens=80))
