"""What magma_moe promises beside the contract: equal active parameters, causal routing, the same ids everywhere."""

import copy
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from wlsup.adapters.language import LanguageAdapterSpec
from wlsup.approaches.checkpoint import saved_names
from wlsup.approaches.magma import Magma
from wlsup.approaches.magma_moe import MagmaMoE
from wlsup.batch import CaptionBatch
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.cli import main
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.models.language import FAMILIES, GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import PrefixSpec
from wlsup.moe import MoE, MoESpec, token_frequencies
from wlsup.moe.hashing import balanced_table
from wlsup.optim import build_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_language import write_family  # noqa: E402

CAPTIONS = ["a red square left of a circle", "a kite", "a large blue dome on sand", "two stars"]
WORDS = ("square", "circle", "star", "ring", "sand", "grass", "water", "brick")
SHORT = PrefixSpec(pool=4, dropout=0.0)
WIDTH, BLOCKS = 128, 4
ROUTERS = ("top_k", "noisy_top_k", "hash")
MIXTURES = ("adapters", "ffn")
PLACES = {
    "adapters": {},
    "attention": {"adapters": LanguageAdapterSpec(mlp="none", attention="scaled_parallel")},
    "ffn": {"mixture": "ffn"},
}


@pytest.fixture
def batch():
    return CaptionBatch(torch.randn(4, 3, 64, 64), CAPTIONS, list("abcd"))


def make(moe=None, prefix=SHORT, encoder_lr=0, **options):
    approach = MagmaMoE(prefix=prefix, encoder_lr=encoder_lr, moe=moe or MoESpec(experts=4, k=2), **options)
    approach.setup("fit")
    return approach.train()


def layers(approach):
    return [module for module in approach.modules() if isinstance(module, MoE)]


def steps(approach, batch, count, lr=3e-3):
    groups = approach.plan.parameter_groups(approach)
    for group in groups:
        group["lr"], group["weight_decay"] = lr, 0.1
    optimizer = build_optimizer(approach.optimizer_spec, groups)
    for _ in range(count):
        optimizer.zero_grad()
        approach.losses(batch)["loss"].backward()
        optimizer.step()
    return approach


def scattered(approach, scale=0.3):
    """Move experts and routers off the start, where experts are all alike."""
    with torch.no_grad():
        for layer in layers(approach):
            for parameter in layer.parameters():
                parameter.add_(scale * torch.randn_like(parameter) * max(float(parameter.std()), 0.1))
    return approach


def logits(approach, front, ids, mask=None):
    language = approach.language
    whole = torch.cat([front, language.embed(ids)], dim=1)
    if mask is not None:
        mask = torch.cat([torch.ones(front.shape[:2]), mask], dim=1)
    return language(whole, mask)


@pytest.mark.parametrize("mixture", ["adapters", "ffn"])
def test_no_two_layers_draw_the_same_jitter(mixture):
    both = LanguageAdapterSpec(attention="sequential") if mixture == "adapters" else LanguageAdapterSpec()
    approach = MagmaMoE(mixture=mixture, adapters=both, moe=MoESpec(experts=4), prefix=SHORT)
    numbers = [layer.router.number for layer in layers(approach)]
    assert len(set(numbers)) == len(numbers) > 1


class TestWhatTrains:
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_a_token_meets_as_many_parameters_as_in_magma(self, k):
        approach = make(MoESpec(experts=8, k=k))
        slots = Magma(prefix=SHORT, encoder_lr=0).adapters.mlp
        for layer, slot in zip(layers(approach), slots, strict=True):
            expert = sum(p.numel() for p in layer.experts[0].parameters())
            magma = sum(p.numel() for p in slot.parameters())
            assert k * expert == magma + (k - 1) * WIDTH  # each expert has a bias of its output
            total = sum(p.numel() for p in layer.parameters())
            assert total == 8 * expert + 8 * WIDTH

    def test_with_adapters_experts_routers_and_the_map(self):
        approach = make(MoESpec(experts=4, k=2))
        expert = 2 * WIDTH * 16 + 16 + WIDTH
        wanted = BLOCKS * (4 * expert + 4 * WIDTH) + 96 * WIDTH + WIDTH + 2 * WIDTH
        assert approach.plan.describe(approach)["trained"] == wanted
        assert {n.partition(".")[0] for n in approach.plan.trained_names(approach)} == {"mixtures", "prefix"}

    @pytest.mark.parametrize(("every", "blocks"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (4, [3])])
    def test_with_ffn_copies_of_every_nth_mlp(self, every, blocks):
        approach = make(mixture="ffn", every=every)
        assert approach.mixtures.blocks == blocks
        mlp = sum(p.numel() for p in approach.language.blocks[0].mlp.parameters())
        prefix = 96 * WIDTH + WIDTH + 2 * WIDTH
        assert approach.plan.describe(approach)["trained"] == len(blocks) * 4 * (mlp + WIDTH) + prefix

    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_real_steps_move_nothing_of_the_language_model(self, batch, mixture):
        approach = make(MoESpec(experts=2, k=1), mixture=mixture, encoder_lr=1e-4)
        before = copy.deepcopy(approach.state_dict())
        steps(approach, batch, 2)
        moved = {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.partition(".")[0] for name in moved} == {"mixtures", "prefix", "vision"}
        assert all(parameter.grad is None for parameter in approach.language.parameters())
        for name, tensor in LanguageModel(LanguageSpec()).state_dict().items():
            assert torch.equal(approach.language.state_dict()[name], tensor), name

    def test_options_of_the_other_mixture_are_refused(self):
        with pytest.raises(WlsupError, match="ffn has no adapters"):
            MagmaMoE(mixture="ffn", adapters=LanguageAdapterSpec(factor=8))
        for options in ({"every": 1}, {"noise": 0.1}, {"cluster_energy": 0.9}):
            with pytest.raises(WlsupError, match=r"are of mixture: ffn"):
                MagmaMoE(**options)
        with pytest.raises(WlsupError, match="leave out language.dtype: float16"):  # copies would train in it
            MagmaMoE(mixture="ffn", language=LanguageSpec(dtype="float16"))
        with pytest.raises(WlsupError, match=r"moe\.k=4 leave no channel"):
            MagmaMoE(prefix=SHORT, moe=MoESpec(k=4), adapters=LanguageAdapterSpec(factor=64))

    @pytest.mark.parametrize("router", ["expert_choice", "soft"])
    def test_routers_that_are_not_causal_are_refused_in_one_message(self, router, capsys):
        recipes = ["-c", "experiments/base.yaml", "-c", "experiments/magma_moe.yaml", "--model.moe.k", "1"]
        assert main(["inspect", "magma_moe", *recipes, "--model.moe.router", router]) != 0
        said = capsys.readouterr().err
        assert "not causal" in said
        assert "top_k, noisy_top_k or hash" in said
        assert "Traceback" not in said


class TestStep0:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("router", ROUTERS)
    def test_the_language_model_computes_what_the_pretrained_one_does(self, batch, place, router):
        approach = make(MoESpec(experts=4, k=2, router=router), **PLACES[place])
        front = approach._front(approach.encode(batch))
        captions = approach.language.tokenizer(CAPTIONS)
        with torch.no_grad():
            mixed = logits(approach, front, captions.ids, captions.mask)
            with approach._without():
                plain = logits(approach, front, captions.ids, captions.mask)
        real = torch.cat([torch.ones(front.shape[:2], dtype=torch.bool), captions.mask], dim=1)
        if place == "ffn":
            assert (mixed - plain)[real].abs().max() <= 1e-5 * plain.abs().max()
        else:
            assert torch.equal(mixed[real], plain[real])

    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_noise_sets_copies_apart_by_its_share_of_each_matrix_spread(self, noise):
        approach = make(mixture="ffn", noise=noise)
        for block, layer in zip(approach.mixtures.blocks, layers(approach), strict=True):
            for name, dense in approach.language.blocks[block].mlp.named_parameters():
                copies = torch.stack([expert.get_parameter(name) for expert in layer.experts])
                if noise and dense.ndim > 1:
                    draws = ((copies - dense) / dense.std()).flatten(1)
                    assert draws.std(1).tolist() == pytest.approx([noise] * 4, rel=0.05)
                    assert (draws.corrcoef() - torch.eye(4)).abs().max() < 0.1  # each expert its own
                else:
                    assert torch.equal(copies, dense.expand_as(copies))

    @pytest.mark.parametrize("energy", [1.0, 0.9])
    def test_clusters_of_the_runs_captions_set_routers_and_part_the_copies(self, energy):
        approach = make(mixture="ffn", cluster_energy=energy)
        dense = {n: p.clone() for n, p in approach.language.named_parameters()}
        approach.part_experts(f"a red {one} on {other}" for one in WORDS for other in WORDS)
        for layer in layers(approach):
            assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(4))  # unit centroids
            one, other = (layer.experts[i].c_fc.weight for i in (0, 1))
            assert torch.equal(one, other) == (energy == 1)
        weight = approach.language.blocks[1].mlp.c_fc.weight
        assert torch.equal(layers(approach)[0].experts[0].c_fc.weight, weight) == (energy == 1)
        assert all(torch.equal(p, dense[n]) for n, p in approach.language.named_parameters())

    def test_clusters_come_before_noise_and_what_cannot_be_is_refused(self):
        approach = make(mixture="ffn", cluster_energy=1.0, noise=0.1)
        approach.part_experts(iter(CAPTIONS * 20))
        dense = approach.language.blocks[1].mlp.c_fc.weight
        for expert in layers(approach)[0].experts:
            assert float(((expert.c_fc.weight - dense) / dense.std()).std()) == pytest.approx(0.1, rel=0.05)
        with pytest.raises(WlsupError, match="between 0 .no clusters. and 1"):
            MagmaMoE(mixture="ffn", cluster_energy=1.5)
        with pytest.raises(WlsupError, match="which hash routing does not have"):
            MagmaMoE(mixture="ffn", cluster_energy=0.9, moe=MoESpec(router="hash"))

    def test_with_zero_up_experts_captioning_moves_experts_at_once_and_the_router_a_step_later(self, batch):
        spec = MoESpec(experts=4, k=2, balance="none", z_weight=0.0)
        approach = make(spec)
        approach.losses(batch)["loss"].backward()
        for layer in layers(approach):
            assert not layer.router.weight.grad.any()  # what experts add is 0 whatever the weights
            assert any(expert.up.weight.grad.abs().max() > 0 for expert in layer.experts)
        steps(approach, batch, 1)
        approach.zero_grad()
        approach.losses(batch)["loss"].backward()
        assert all(layer.router.weight.grad.abs().max() > 0 for layer in layers(approach))

    def test_the_auxiliary_losses_move_the_router_at_step_0(self, batch):
        approach = make()
        approach.losses(batch)["loss"].backward()
        assert all(layer.router.weight.grad.abs().max() > 0 for layer in layers(approach))

    @pytest.mark.parametrize(("combine", "moves"), [("straight_through", True), ("renormalized", False)])
    def test_upcycled_experts_give_the_router_a_gradient_at_step_0_only_straight_through(self, batch, combine, moves):
        spec = MoESpec(experts=4, k=2, combine=combine, balance="none", z_weight=0.0)
        approach = make(spec, mixture="ffn")
        approach.losses(batch)["loss"].backward()
        for layer in layers(approach):
            assert (float(layer.router.weight.grad.abs().max()) > 1e-4) == moves

    def test_a_spec_that_would_change_the_function_is_refused(self):
        with pytest.raises(WlsupError, match="would not begin as the pretrained language model: combine 'raw' scales"):
            make(MoESpec(experts=4, k=2, combine="raw"), mixture="ffn")


class TestLosses:
    def test_auxiliary_losses_are_there_by_name_and_in_the_sum(self, batch):
        parts = {name: value.detach() for name, value in make().losses(batch).items()}
        assert set(parts) == {"loss", "captioning", "balance", "router_z"}
        assert float(parts["loss"]) == pytest.approx(sum(float(parts[n]) for n in parts if n != "loss"), rel=1e-6)
        assert set(make(MoESpec(experts=4, k=2, router="hash")).losses(batch)) == {"loss", "captioning"}
        assert set(make(MoESpec(experts=4, balance="bias")).losses(batch)) == {"loss", "captioning", "router_z"}

    @pytest.mark.parametrize("mixture", MIXTURES)
    @pytest.mark.parametrize("router", ["top_k", "hash"])
    def test_padding_is_routed_nowhere_and_counts_in_no_loss(self, batch, mixture, router):
        approach = scattered(make(MoESpec(experts=4, k=2, router=router), mixture=mixture)).eval()
        with torch.no_grad():
            parts = approach.losses(batch)
            together = [layer.routing for layer in layers(approach)]
            number, loads, squares = 0, 0, 0
            for i in range(4):
                one = CaptionBatch(batch.images[i : i + 1], CAPTIONS[i : i + 1], ["x"])
                alone = approach.losses(one)
                real = 4 + int(approach.language.tokenizer(CAPTIONS[i : i + 1]).mask.sum())
                number += real
                loads += real * torch.stack([layer.routing.load for layer in layers(approach)])
                squares += real * float(alone.get("router_z", 0.0))
        assert torch.allclose(torch.stack([one.load for one in together]), loads / number, atol=1e-5)
        assert float(parts.get("router_z", 0.0)) == pytest.approx(squares / number, rel=1e-4)


class TestCausal:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("capacity", [None, 2.0])
    @pytest.mark.parametrize("router", ROUTERS)
    def test_a_later_token_changes_no_logits_before_it(self, batch, place, router, capacity):
        spec = MoESpec(experts=4, k=2, router=router, capacity_factor=capacity)
        approach = scattered(make(spec, **PLACES[place])).eval()
        if capacity:  # so tight that choices are dropped; the function at step 0 is not what is tested here
            for layer in layers(approach):
                layer.spec = layer.router.spec = MoESpec(experts=4, k=2, router=router, capacity_factor=0.6)
        ids = approach.language.tokenizer(["a large red square left of a small blue circle on sand"]).ids
        with torch.no_grad():
            front = approach._front(approach.encode(batch))[:1]
            before = logits(approach, front, ids)
            with approach._without():
                assert (logits(approach, front, ids) - before).abs().max() > 1e-3  # the mixtures take part
            if capacity:
                assert max(float(layer.routing.dropped) for layer in layers(approach)) > 0
            for place in range(ids.shape[1]):
                other = ids.clone()
                other[0, place] = (ids[0, place] + 17) % 900 + 20
                after = logits(approach, front, other)
                seen = front.shape[1] + place
                assert (after - before)[:, :seen].abs().max() <= 1e-5
                assert (after - before)[:, seen:].abs().max() > 1e-3


class TestIds:
    """Hash routing sees the id of every token, however it came."""

    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_in_training_words_by_their_ids_and_the_prefix_by_its_positions(self, batch, mixture):
        approach, seen = make(MoESpec(experts=4, k=1, router="hash"), mixture=mixture), []
        for layer in layers(approach):
            layer.router.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
        approach.losses(batch)
        captions = approach.language.tokenizer(CAPTIONS)
        vocabulary = approach.language.vocabulary
        for ids, mask in seen:
            assert torch.equal(ids[:, :4], vocabulary + torch.arange(4).expand(4, -1))
            assert torch.equal(ids[:, 4:], captions.ids)
            assert mask[:, :4].all()
            assert torch.equal(mask[:, 4:], captions.mask)
        assert len(seen) == len(layers(approach)) > 0

    @pytest.mark.parametrize("mixture", MIXTURES)
    @pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
    def test_in_generation_those_that_are_fed(self, batch, mixture, method):
        approach = scattered(make(MoESpec(experts=4, k=1, router="hash"), mixture=mixture)).eval()
        approach.losses(batch)  # what was seen last must not matter
        fed, seen = [], []
        approach.language.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: fed.append(inputs[0])
        )
        layers(approach)[-1].router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        approach.caption(
            batch.images, GenerationSpec(method=method, max_tokens=6, **({"beams": 3} if method == "beam" else {}))
        )
        prefix, *words = seen
        assert torch.equal(prefix, approach.language.vocabulary + torch.arange(4).expand(len(prefix), -1))
        fed = [ids for ids in fed if ids.numel()]
        assert len(words) == len(fed) >= 2
        assert all(torch.equal(a, b) for a, b in zip(words, fed, strict=True))
        assert len(words[0]) == (12 if method == "beam" else 4)

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("router", ROUTERS)
    def test_greedy_captions_are_those_of_whole_passes(self, batch, place, router):
        approach = scattered(make(MoESpec(experts=4, k=2, router=router), **PLACES[place])).eval()
        tokenizer = approach.language.tokenizer
        with torch.no_grad():
            front = approach._front(approach.encode(batch))
            ids = torch.empty(4, 0, dtype=torch.int64)
            for _ in range(8):
                ids = torch.cat([ids, logits(approach, front, ids)[:, -1:].argmax(-1)], dim=1)
        assert approach.caption(batch.images, GenerationSpec(max_tokens=8)) == tokenizer.decode(ids)

    def test_pictures_of_another_size_have_positions_that_the_table_does_not(self):
        approach = make(MoESpec(experts=4, router="hash")).eval()
        with pytest.raises(WlsupError, match="give pictures of 64 pixels"):
            approach.caption(torch.randn(1, 3, 96, 96))

    def test_a_prefix_of_one_position_is_not_taken_for_the_word_embedded_last(self, batch):
        approach, seen = make(MoESpec(experts=4, router="hash"), prefix=PrefixSpec(tokens="pooled")).eval(), []
        layers(approach)[0].router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        approach.language.embed(torch.full((4, 1), approach.language.tokenizer.start_id))
        approach.caption(batch.images, GenerationSpec(max_tokens=2))
        assert seen[0].tolist() == [[approach.language.vocabulary]] * 4
        assert all((ids < approach.language.vocabulary).all() for ids in seen[1:])

    def test_a_copy_is_driven_by_its_own_ids(self, batch):
        approach = scattered(make(MoESpec(experts=4, k=2, router="hash"))).eval()
        other = copy.deepcopy(approach)
        with torch.no_grad():
            wanted = approach.losses(batch)["loss"]
            approach.language.embed(torch.tensor([[1, 2, 3]]))
            assert torch.equal(other.losses(batch)["loss"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, batch):
    language = LanguageSpec(weights=str(write_family(tmp_path, family)), max_length=16)
    for mixture in MIXTURES:
        approach = make(MoESpec(experts=2, k=1, router="hash"), language=language, mixture=mixture)
        start = float(approach.losses(batch)["loss"].detach())
        steps(approach, batch, 4)
        assert float(approach.losses(batch)["loss"].detach()) < start
        assert len(approach.eval().caption(batch.images, GenerationSpec(max_tokens=3))) == 4


class Cut(Callback):
    """Break a run off when its second epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("cut off")


def fit(folder, spec, cut=False, resume=None, accumulate=1, callbacks=(), mixture="adapters", energy=0.0, **data):
    torch.manual_seed(0)
    approach = MagmaMoE(
        prefix=PrefixSpec(pool=4),
        mixture=mixture,
        moe=spec,
        lr=5e-3,
        encoder_lr=0,
        language=LanguageSpec(max_length=24),
        cluster_energy=energy,
    )
    module = CaptionDataModule(pairs=64, validation_pairs=8, batch_size=16, eval_sets=[], cache_features=True, **data)
    checkpoints = [ModelCheckpoint(folder, filename="last", enable_version_counter=False)] if folder else []
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(folder),
        callbacks=[KeyedRandomness(0), *callbacks, *checkpoints, *([Cut()] if cut else [])],
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if cut:
        with pytest.raises(RuntimeError, match="cut off"):
            trainer.fit(approach, module)
    else:
        trainer.fit(approach, module, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return approach, module


BIAS = MoESpec(experts=4, k=2, balance="bias", router="noisy_top_k")
BALANCED = MoESpec(experts=4, k=2, router="hash", hash="balanced")


class TestRuns:
    @pytest.mark.parametrize("mixture", MIXTURES)
    @pytest.mark.parametrize("spec", [BIAS, BALANCED], ids=["bias", "hash"])
    def test_a_run_cut_off_and_resumed_ends_as_the_unbroken_one(self, spec, mixture, tmp_path):
        whole, _ = fit(tmp_path / "whole", spec, mixture=mixture)
        fit(tmp_path / "cut", spec, mixture=mixture, cut=True)
        saved = tmp_path / "cut" / "last.ckpt"
        buffer = "bias_steps" if spec is BIAS else "table"
        kept = torch.load(saved, weights_only=True)["state_dict"]
        mixtures = BLOCKS if mixture == "adapters" else BLOCKS // 2
        assert sum(name.endswith(f"router.{buffer}") for name in kept) == mixtures
        resumed, _ = fit(tmp_path / "cut", spec, mixture=mixture, resume=str(saved))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name

    def test_a_run_from_clusters_resumes_and_its_start_is_known_again(self, tmp_path):
        spec = MoESpec(experts=4, k=2)
        whole, data = fit(tmp_path / "whole", spec, mixture="ffn", energy=0.9)
        one, other = (
            whole._parted[f"layers.{next(iter(whole.mixtures.layers))}.experts.{e}.c_fc.weight"] for e in (0, 1)
        )
        assert not torch.equal(one, other)  # the command's way: nobody called part_experts here
        trained = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        whole.trainer.validate(whole, data, verbose=False)  # sets up anew
        assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in trained.items())
        fit(tmp_path / "cut", spec, mixture="ffn", energy=0.9, cut=True)
        saved = tmp_path / "cut" / "last.ckpt"
        resumed, _ = fit(tmp_path / "cut", spec, mixture="ffn", energy=0.9, resume=str(saved))
        assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in trained.items())
        torch.manual_seed(0)
        options = {"mixture": "ffn", "moe": spec, "encoder_lr": 0, "language": LanguageSpec(max_length=24)}
        fresh = MagmaMoE(prefix=PrefixSpec(pool=4), cluster_energy=0.9, **options)
        fresh.on_load_checkpoint(torch.load(saved, weights_only=True))
        fresh.start.remember(fresh)
        assert fresh.start.check(fresh)  # WiSE-FT's pretrained end is where the run began

    def test_clusters_without_captions_are_refused(self):
        approach = MagmaMoE(prefix=SHORT, mixture="ffn", cluster_energy=0.9)
        approach._trainer = SimpleNamespace(datamodule=None)
        with pytest.raises(WlsupError, match="this one has none"):
            approach.setup("fit")

    def test_a_checkpoint_routes_as_it_was_trained_whatever_the_captions(self, tmp_path):
        trained, _ = fit(tmp_path, BALANCED)
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        fresh = make(BALANCED, prefix=PrefixSpec(pool=4))
        assert not torch.equal(layers(fresh)[0].router.table, layers(trained)[0].router.table)
        fresh.on_load_checkpoint(checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"], strict=False)
        assert torch.equal(layers(fresh)[0].router.table, layers(trained)[0].router.table)

    def test_the_balanced_hash_is_of_the_runs_own_captions(self):
        approach, data = fit(None, BALANCED)
        tokenizer = approach.language.tokenizer
        counted = token_frequencies(
            (tokenizer([caption]).ids[0] for caption in chain.from_iterable(data.captions)), approach.token_ids
        )
        assert counted[approach.language.vocabulary :].tolist() == [sum(map(len, data.captions))] * 4
        wanted = balanced_table(counted, 4, 2)
        for layer in layers(approach):
            assert torch.equal(layer.router.table, wanted)
            loads = torch.zeros(4, dtype=torch.float64).index_add(0, wanted.flatten(), counted.repeat_interleave(2))
            assert loads.max() / loads.mean() < 1.15

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_biases_move_once_an_optimizer_step(self, accumulate):
        taken = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                taken.append((trainer.global_step, layers(pl_module)[0].router.bias_steps.clone()))

        fit(None, BIAS, accumulate=accumulate, callbacks=[Watch()])
        assert taken[-1][0] == 8 // accumulate
        last_step, last = 0, torch.zeros(4, dtype=torch.int64)
        for step, bias in taken:
            assert (bias - last).abs().max() <= step - last_step
            last_step, last = step, bias
        assert last.any()

    def test_a_batch_that_is_not_finite_moves_no_weight_and_no_bias(self):
        states = []

        class Spoil(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == 3:
                    batch.encoded = replace(batch.encoded, tokens=batch.encoded.tokens * float("nan"))

            def on_train_batch_end(self, trainer, pl_module, *_):
                states.append({name: pl_module.state_dict()[name].clone() for name in saved_names(pl_module)})

        guards = Guards()
        fit(None, BIAS, callbacks=[Spoil(), guards])
        assert guards.skipped == 1
        for name, tensor in states[3].items():
            assert torch.equal(tensor, states[2][name]), name
            assert torch.isfinite(states[-1][name]).all()
        assert any(not torch.equal(states[1][n], states[2][n]) for n in states[1] if n.endswith("bias_steps"))

    def test_a_cached_run_measures_itself(self):
        approach, data = fit(None, MoESpec(experts=4, k=2))
        approach.eval()
        runs = []
        approach.encoder.register_forward_hook(lambda *_: runs.append(1))
        measured = approach.measure(data)
        assert not runs
        values = {row["what"]: row["value"] for row in measured["rows"]}
        [batch] = list(data.val_dataloader())
        with torch.no_grad():
            assert values["this captioner"] == pytest.approx(float(approach.losses(batch)["captioning"]), abs=1e-5)
        with approach._without(), torch.no_grad():
            without = float(approach.losses(batch)["captioning"])
        assert abs(values["this captioner"] - without) > 1e-4  # which is better, two steps do not say
        assert approach.measure(data) == measured  # the mixtures are attached as before

    def test_each_speaks_for_itself(self):
        frozen, tuned = MagmaMoE(encoder_lr=0), MagmaMoE()
        assert (frozen.untouched, frozen.cacheable) == (True, "tokens")
        assert (tuned.untouched, tuned.cacheable) == (False, "")
