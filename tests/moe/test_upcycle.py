"""Upcycling: the dense function in every combination that keeps it, an error or a known number where none can."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from dense_families import CONFIGS, FAMILIES, VISION, data, make, outputs, relative  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec  # noqa: E402
from wlsup.models.vision import VisionSpec, build_vision  # noqa: E402
from wlsup.moe.layer import MoE, auxiliary_losses  # noqa: E402
from wlsup.moe.sites import weight_of  # noqa: E402
from wlsup.moe.spec import MoESpec  # noqa: E402
from wlsup.moe.token_ids import TokenIds  # noqa: E402
from wlsup.moe.upcycle import UpcycledMLPs, change_of_function, moe_layers, restore, upcycle  # noqa: E402

E = 4
EXACT = 1e-5  # relative error that counts as the same function, in fp32

# What keeps the function: weights that add up to 1 and no dropped token.
KEPT = [
    *(
        {"router": router, "combine": combine, "k": k}
        for router in ("top_k", "noisy_top_k")
        for combine in ("straight_through", "renormalized")
        for k in (1, 2)
    ),
    {"combine": "raw", "k": E},
    {"k": 1, "capacity_factor": float(E)},
    {"k": 2, "capacity_factor": E / 2},
    {"k": 2, "balance": "bias"},
]
KEPT_IN_PICTURES = [
    {"router": "expert_choice", "k": E},
    {"router": "expert_choice", "k": E, "combine": "raw"},
    {"router": "expert_choice", "k": 2, "capacity_factor": E / 2, "combine": "renormalized"},
]
KEPT_IN_WORDS = [{"router": "hash", "k": k} for k in (1, 2)]
DISPATCHES = ("sort", "batched", "loop", "grouped")


def combinations():
    for family in FAMILIES:
        for options in KEPT + (KEPT_IN_PICTURES if family in VISION else KEPT_IN_WORDS):
            yield pytest.param(family, options, id=f"{family}-{'-'.join(map(str, options.values()))}")


def dispatches(family):
    # torch's grouped product of fp32 on a CPU wants rows of 16 bytes; GluMlp and SwiGLU are no known MLPs to it.
    able = hasattr(torch.nn.functional, "grouped_mm") and family not in ("vit_swiglu", "vit_glu")
    return DISPATCHES if able else DISPATCHES[:-1]


@pytest.mark.parametrize(("family", "options"), combinations())
@torch.no_grad()
def test_the_function_is_kept(family, options):
    model, x = make(family), data(family)
    wanted = outputs(model, family, x)
    assert change_of_function(MoESpec(experts=E, **options)) is None
    for dispatch in dispatches(family):
        layers = upcycle(model, [0, 1], MoESpec(experts=E, dispatch=dispatch, **options), seed=0)
        assert relative(outputs(model, family, x), wanted) <= EXACT, dispatch
        assert all((layer.routing.load > 0).sum() > 1 for layer in layers)  # more than one expert computed
        restore(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_kept_in_training_mode_too_where_router_noise_and_jitter_are(family):
    model, x = make(family), data(family)
    for module in model.modules():  # the model's own dropout
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    wanted = outputs(model, family, x)
    layers = upcycle(model, [1], MoESpec(experts=E, router="noisy_top_k", k=2), seed=0)
    assert layers[0].training
    assert relative(outputs(model, family, x), wanted) <= EXACT


CHANGED = [
    # options, family, what the error says, relative error of the last layer's MLP output at step 0
    ({"combine": "raw"}, "vit", "add up to less than 1", (0.5, 0.8)),
    ({"combine": "raw", "k": 2}, "gpt2", "add up to less than 1", (0.3, 0.6)),
    ({"capacity_factor": 0.5}, "vit", "takes at most 12% of the tokens", (0.3, 1.0)),
    ({"router": "expert_choice", "k": 1}, "vit", "what nobody took gets nothing", (0.05, 1.0)),
    ({"router": "soft"}, "vit", "mixes tokens", (0.3, 2.0)),
]


@pytest.mark.parametrize(("options", "family", "why", "bounds"), CHANGED)
@torch.no_grad()
def test_what_cannot_keep_it_says_so_and_is_off_by_a_known_number(options, family, why, bounds):
    model, spec = make(family), MoESpec(experts=E, **options)
    with pytest.raises(WlsupError, match=why) as raised:
        upcycle(model, [1], spec, seed=0)
    assert "exact=False" in str(raised.value)
    assert not moe_layers(model)  # nothing was done
    dense = copy.deepcopy(model.blocks[1].mlp if family == "vit" else model.transformer.h[1].mlp)
    (layer,) = upcycle(model, [1], spec, seed=0, exact=False)
    rows = torch.randn(8, 17, 32)
    low, high = bounds
    assert low < relative(layer(rows), dense(rows)) < high


@torch.no_grad()
def test_raw_is_off_by_exactly_one_minus_the_probability():
    model = make("vit")
    dense = copy.deepcopy(model.blocks[1].mlp)
    (layer,) = upcycle(model, [1], MoESpec(experts=E, combine="raw"), seed=0, exact=False)
    rows = torch.randn(1, 50, 32)
    probability = layer.router.logits(rows).softmax(-1).amax(-1, keepdim=True)
    assert torch.allclose(layer(rows), probability * dense(rows), atol=1e-5)


class TestGradients:
    def loss(self, tokens):
        # Not the squares: after the last layer norm their sum is a constant.
        return (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5))).sum()

    def backward(self, combine, k=1):
        model, x = make("vit"), data("vit")
        layers = upcycle(model, [1], MoESpec(experts=E, combine=combine, k=k), seed=0)
        self.loss(outputs(model, "vit", x)).backward()
        return layers[0]

    @pytest.mark.parametrize("k", [1, 2])
    def test_straight_through_gives_the_router_a_gradient_where_renormalized_has_none(self, k):
        # Identical experts: whatever the weights, the renormalized sum is the same, so nothing is to be learnt from it.
        gradients = {c: self.backward(c, k).router.weight.grad.norm() for c in ("straight_through", "renormalized")}
        assert gradients["straight_through"] > 0.1
        assert gradients["renormalized"] < 1e-3 * gradients["straight_through"]

    def test_where_every_expert_takes_part_identical_ones_leave_nothing_to_learn_at_step_0(self):
        assert self.backward("straight_through", k=E).router.weight.grad.norm() < 1e-3

    def test_experts_get_different_gradients_so_that_copies_part(self):
        layer = self.backward("straight_through")
        grads = [expert.fc1.weight.grad for expert in layer.experts]
        assert all(grad.norm() > 0 for grad in grads)
        assert not torch.allclose(grads[0], grads[1])

    def test_together_they_get_the_dense_gradient(self):
        model, x = make("vit"), data("vit")
        self.loss(outputs(model, "vit", x)).backward()
        wanted = model.blocks[1].mlp.fc1.weight.grad
        given = sum(expert.fc1.weight.grad for expert in self.backward("renormalized").experts)
        assert relative(given, wanted) < 1e-4


class TestTheMiniEncoder:
    @pytest.fixture
    def encoder(self):
        return build_vision(VisionSpec()).eval()

    @pytest.mark.parametrize("options", [{}, {"k": 2}, {"router": "noisy_top_k"}, {"balance": "bias"}])
    def test_its_features_are_the_pretrained_ones_at_step_0_and_its_router_has_a_gradient(self, encoder, options):
        images = torch.randn(4, 3, 64, 64)
        wanted = encoder.features(images).detach()
        layers = upcycle(encoder, None, MoESpec(**options), seed=0)
        assert list(moe_layers(encoder)) == [f"backbone.blocks.{index}.mlp" for index in (1, 3, 5)]
        features = encoder.features(images)
        assert (features - wanted).abs().max() <= 1e-6
        assert relative(features, wanted) <= EXACT
        (features * torch.randn(features.shape)).sum().backward()
        assert all(layer.router.weight.grad.norm() > 1e-4 for layer in layers)

    def test_masked_encoding_is_kept_as_well(self, encoder):
        images, keep = torch.randn(2, 3, 64, 64), torch.randperm(64)[:16].expand(2, -1)
        wanted = encoder(images, ids_keep=keep).tokens
        upcycle(encoder, None, seed=0)
        assert relative(encoder(images, ids_keep=keep).tokens, wanted) <= EXACT

    def test_a_few_steps_move_experts_apart_and_what_is_upcycled_trains(self, encoder):
        layers = upcycle(encoder, [5], MoESpec(experts=2), seed=0)
        optimizer = torch.optim.AdamW(layers[0].parameters(), lr=1e-3)
        images, target = torch.randn(8, 3, 64, 64), torch.randn(8, 96)
        losses = []
        for _ in range(5):
            task = (encoder.features(images) - target).square().mean()
            loss = task + sum(auxiliary_losses(encoder).values())
            losses.append(float(task.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        first, second = layers[0].experts
        assert not torch.allclose(first.fc1.weight, second.fc1.weight)
        with pytest.raises(WlsupError, match=r"blocks.5.mlp cannot be made dense: its experts differ"):
            restore(encoder)


class TestTheMiniLanguageModel:
    @torch.no_grad()
    def test_logits_generation_and_padding(self):
        language = LanguageModel(LanguageSpec())
        tokens = language.tokenizer(["a red square left of a blue circle", "a dog"])
        embeddings = language.embed(tokens.ids)
        wanted = language(embeddings, tokens.mask)
        said = language.generate(embeddings[:, :3], GenerationSpec(max_tokens=8))
        layers = upcycle(language, None, MoESpec(experts=E, k=2), seed=0)
        given = language(embeddings, tokens.mask)
        assert relative(given[tokens.mask], wanted[tokens.mask]) <= EXACT
        assert layers[0].causal
        assert language.generate(embeddings[:, :3], GenerationSpec(max_tokens=8)) == said
        assert language.generate(embeddings[:, :3], GenerationSpec(method="beam", max_tokens=8)) != []

    @pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
    @torch.no_grad()
    def test_padding_counts_for_nothing(self, family):
        model, ids = make(family), data(family)
        mask = torch.ones_like(ids)
        mask[:, 8:] = 0
        layers = upcycle(model, [1], MoESpec(experts=E, capacity_factor=1.0), seed=0, exact=False)
        loads = []
        for given, attention in ((ids, mask), (ids[:, :8], mask[:, :8])):
            for called in (model, model.base_model):  # OPT's head passes its base model over
                called(input_ids=given, attention_mask=attention, use_cache=False)
                loads.append((layers[0].routing.load, layers[0].routing.dropped))
        for load, dropped in loads[1:]:  # padded or cut: the same load, and the same drops
            assert torch.equal(load, loads[0][0])
            assert torch.equal(dropped, loads[0][1])
        model(input_ids=ids, use_cache=False)
        assert not torch.equal(layers[0].routing.load, loads[0][0])

    @pytest.mark.parametrize("family", list(CONFIGS))
    @torch.no_grad()
    def test_samples_do_not_share_capacity(self, family):
        # OPT hands its MLP the whole batch as one row of tokens.
        model, ids = make(family), data(family)
        upcycle(model, [1], MoESpec(experts=E, capacity_factor=1.0), seed=0, exact=False)
        together = outputs(model, family, ids)
        alone = torch.cat([outputs(model, family, row[None]) for row in ids])
        assert relative(together, alone) <= EXACT

    @pytest.mark.parametrize("family", list(CONFIGS))
    @pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0, "k": 2}, {"router": "hash"}])
    @torch.no_grad()
    def test_a_later_token_changes_nothing_before_it(self, family, options):
        model, ids = make(family), data(family)
        upcycle(model, [0, 1], MoESpec(experts=E, **options), seed=0, exact=False)
        before = outputs(model, family, ids)
        for position in (4, 11):
            other = ids.clone()
            other[:, position] = (other[:, position] + 1) % 90
            after = outputs(model, family, other)
            assert torch.allclose(after[:, :position], before[:, :position], atol=1e-5)
            assert not torch.allclose(after[:, position], before[:, position])

    @pytest.mark.parametrize("router", ["expert_choice", "soft"])
    def test_routers_that_look_ahead_are_refused(self, router):
        with pytest.raises(WlsupError, match="not causal"):
            upcycle(make("gpt2"), [1], MoESpec(experts=E, router=router), exact=False)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames past_key_values
    @pytest.mark.parametrize("family", list(CONFIGS))
    @torch.no_grad()
    def test_hash_routes_by_the_ids_fed_also_through_the_cache(self, family):
        model, ids = make(family), data(family, 1)
        (layer,) = upcycle(model, [1], MoESpec(experts=E, router="hash"), seed=0)
        for number, expert in enumerate(layer.experts):  # so different that a wrong id would show
            weight_of(getattr(expert, "fc2", None) or next(m for m in expert.modules() if hasattr(m, "weight"))).mul_(
                number + 1
            )
        whole = outputs(model, family, ids)[:, -1]
        step = model(input_ids=ids[:, :8], use_cache=True)
        for position in range(8, 12):
            step = model(input_ids=ids[:, position : position + 1], past_key_values=step.past_key_values)
        assert relative(step.logits[:, -1], whole) <= EXACT

    @torch.no_grad()
    def test_hash_with_a_prefix(self):
        language = LanguageModel(LanguageSpec())
        ids = language.tokenizer(["a red square"]).ids
        embeddings = torch.cat([torch.randn(1, 5, language.width), language.embed(ids)], dim=1)
        wanted = language(embeddings)
        said = language.generate(embeddings[:, :5], GenerationSpec(max_tokens=6))
        token_ids = TokenIds(language.vocabulary, positions=5)
        layers = upcycle(language, [1], MoESpec(experts=E, router="hash"), token_ids=token_ids)
        with token_ids.holding(token_ids.with_prefix(ids)):
            assert relative(language(embeddings), wanted) <= EXACT
        assert layers[0].router.table.shape == (965, 1)
        with token_ids.holding(token_ids.with_prefix(ids[:, :0])):
            assert language.generate(embeddings[:, :5], GenerationSpec(max_tokens=6)) == said


class TestOutside:
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_keys_stay_the_function_is_kept_and_detach_gives_the_original_back(self, family):
        model, x = make(family), data(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wanted = outputs(model, family, x)
        upcycled = UpcycledMLPs(model, [1], MoESpec(experts=E), seed=0).attach(model)
        assert list(model.state_dict()) == list(before)
        assert relative(outputs(model, family, x), wanted) <= EXACT
        (layer,) = upcycled.layers.values()
        assert layer.routing is not None  # it was the layer that computed
        for expert in layer.experts:
            for parameter in expert.parameters():
                parameter.mul_(1.5)
        assert relative(outputs(model, family, x), wanted) > 1e-3
        upcycled.detach()
        assert torch.equal(outputs(model, family, x), wanted)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    def test_its_own_keys(self):
        model = make("vit")
        keys = UpcycledMLPs(model, [1], MoESpec(experts=2)).state_dict()
        assert {name.split(".")[1] for name in keys} == {"blocks_1_mlp"}
        assert "layers.blocks_1_mlp.experts.1.fc1.weight" in keys

    def test_twice_or_to_another_model_is_refused(self):
        model = make("vit")
        upcycled = UpcycledMLPs(model, [1], MoESpec(experts=2)).attach(model)
        with pytest.raises(WlsupError, match="attached already"):
            upcycled.attach(model)
        upcycled.detach()
        with pytest.raises(WlsupError, match=r"made from blocks_1_mlp; the model has transformer.h.1.mlp"):
            upcycled.attach(make("gpt2"))


class TestWhatIsMade:
    @torch.no_grad()
    def test_copies_drop_nothing_out_whatever_the_dense_model_does_in_training(self):
        model = make("gpt2")
        mlp = copy.deepcopy(model.transformer.h[1].mlp)
        assert mlp.dropout.p > 0
        (layer,) = upcycle(model, [1], MoESpec(experts=2, jitter=0.0))
        x = torch.randn(2, 5, 32)
        assert relative(layer.train()(x), mlp.eval()(x)) <= EXACT

    def test_experts_are_bit_for_bit_copies_with_memory_of_their_own(self):
        model = make("gpt2")
        dense = copy.deepcopy(model.transformer.h[1].mlp.state_dict())
        (layer,) = upcycle(model, [1], MoESpec(experts=E))
        for expert in layer.experts:
            assert all(torch.equal(tensor, dense[name]) for name, tensor in expert.state_dict().items())
        assert len({p.data_ptr() for p in layer.experts.parameters()}) == E * len(dense)

    def test_the_same_seed_gives_the_same_and_disturbs_nobody(self):
        routers = []
        for seed in (3, 3, 4):
            torch.manual_seed(9)
            (layer,) = upcycle(make("vit"), [1], MoESpec(experts=E), noise=0.1, seed=seed)
            routers.append((layer.router.weight, layer.experts[1].fc1.weight))
        torch.manual_seed(1)
        wanted = torch.rand(1)
        torch.manual_seed(1)
        upcycle(copy.deepcopy(model := make("vit")), [1], MoESpec(experts=E), seed=3)
        torch.manual_seed(1)
        upcycle(model, [1], MoESpec(experts=E), seed=3)
        assert torch.equal(torch.rand(1), wanted)
        assert all(torch.equal(one, two) for one, two in zip(routers[0], routers[1], strict=True))
        assert not any(torch.equal(one, two) for one, two in zip(routers[0], routers[2], strict=True))

    def test_without_a_seed_the_router_follows_the_global_one(self):
        (one,), (two,) = (upcycle(make("vit"), [1], MoESpec(experts=E)) for _ in range(2))
        torch.manual_seed(1)  # make() sets this seed; the draws after it are the router's
        assert torch.equal(one.router.weight, two.router.weight)
        torch.manual_seed(5)
        (three,) = upcycle(copy.deepcopy(make("vit")), [1], MoESpec(experts=E), seed=None)
        model = make("vit")
        torch.manual_seed(6)
        (four,) = upcycle(model, [1], MoESpec(experts=E))
        assert not torch.equal(three.router.weight, four.router.weight)

    @torch.no_grad()
    def test_noise_is_relative_to_each_matrix_and_leaves_biases(self):
        model = make("vit")
        weight, bias = model.blocks[1].mlp.fc1.weight.clone(), model.blocks[1].mlp.fc1.bias.clone()
        (layer,) = upcycle(model, [1], MoESpec(experts=E), noise=0.05, seed=0)
        for expert in layer.experts:
            assert float((expert.fc1.weight - weight).std() / weight.std()) == pytest.approx(0.05, rel=0.1)
            assert torch.equal(expert.fc1.bias, bias)
        assert not torch.equal(layer.experts[0].fc1.weight, layer.experts[1].fc1.weight)

    def test_a_frozen_model_gives_trainable_layers_in_its_own_mode_and_dtype(self):
        model = make("gpt2").to(torch.bfloat16).requires_grad_(False)
        (layer,) = upcycle(model, [1], MoESpec(experts=E))
        assert not layer.training
        assert all(parameter.requires_grad for parameter in layer.parameters())
        assert next(layer.experts.parameters()).dtype == torch.bfloat16
        assert layer.router.weight.dtype == torch.float32
        assert outputs(model, "gpt2", data("gpt2")).dtype == torch.bfloat16

    @pytest.mark.parametrize("family", FAMILIES)
    def test_restored_it_is_the_dense_model_bit_for_bit(self, family):
        model, x = make(family), data(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wanted = outputs(model, family, x)
        upcycle(model, [0, 1], MoESpec(experts=E))
        restore(copy.deepcopy(model))
        assert restore(model) is model
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(outputs(model, family, x), wanted)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    @torch.no_grad()
    def test_a_deep_copy_is_on_its_own(self):
        model, x = make("opt"), data("opt")
        upcycle(model, [1], MoESpec(experts=E, router="hash"), seed=0)
        other = copy.deepcopy(model)
        wanted = outputs(model, "opt", x)
        model.model.decoder.layers[1].fc1.experts[0].fc1.weight.zero_()
        assert torch.equal(outputs(other, "opt", x), wanted)
        assert torch.equal(outputs(other, "opt", x[:2, :5]), outputs(other, "opt", x[:2, :5]))


class TestErrors:
    def test_twice(self):
        model = make("vit")
        upcycle(model, [1], MoESpec(experts=2))
        with pytest.raises(WlsupError, match=r"Block 1 \(Block\) has no dense MLP.*a MoE"):
            upcycle(model, [1], MoESpec(experts=2))

    def test_hash_in_pictures(self):
        with pytest.raises(WlsupError, match="patches do not have"):
            upcycle(make("vit"), [1], MoESpec(experts=2, router="hash"))

    def test_a_block_out_of_range_and_negative_noise(self):
        with pytest.raises(WlsupError, match="0 to 1"):
            upcycle(make("vit"), [2], MoESpec(experts=2))
        with pytest.raises(WlsupError, match="noise must be 0 or more"):
            upcycle(make("vit"), [1], MoESpec(experts=2), noise=-1)

    def test_nothing_to_restore(self):
        with pytest.raises(WlsupError, match="no.*nothing to restore|nothing to restore"):
            restore(make("vit"))

    def test_a_layer_is_an_moe(self):
        assert all(isinstance(layer, MoE) for layer in upcycle(make("vit"), None, MoESpec(experts=2)))
