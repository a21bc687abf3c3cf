"""What the language model's adapters promise: published counts, identity at first, the base as it was, in every family.

MAGMA's published configurations are of GPT-J: 28 blocks of width 4,096.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

from wlsup.adapters.language import LanguageAdapters, LanguageAdapterSpec, LanguageBottleneck
from wlsup.errors import WlsupError
from wlsup.models.language import FAMILIES, GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import ImagePrefix, PrefixSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_language import write_family  # noqa: E402

PLACES = ("sequential", "parallel", "scaled_parallel")
METHODS = ("greedy", "beam", "nucleus")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def language(folders, family):
    return LanguageModel(LanguageSpec(weights=str(folders[family]), max_length=16))


def adapt(language, make=None, **spec):
    spec = LanguageAdapterSpec(**spec)
    return LanguageAdapters(language.blocks, language.hidden_size, spec, make).attach(language.blocks)


def move(adapters, std=0.3):
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=std)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


class TestPublishedCounts:
    @pytest.fixture(scope="class")
    def gptj(self):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(GPTJConfig())

    @pytest.mark.parametrize(
        ("spec", "published"),
        [
            (LanguageAdapterSpec(mlp="sequential", factor=4), 235_024_384),
            (LanguageAdapterSpec(mlp="sequential", attention="sequential", factor=8), 235_139_072),
            # ours to compute: a scale for each adapter, and a LayerNorm's 2 D
            (LanguageAdapterSpec(mlp="scaled_parallel", attention="scaled_parallel", factor=8), 235_139_072 + 56),
            (LanguageAdapterSpec(factor=4, layer_norm=True), 235_024_384 + 28 * 8_192),
        ],
    )
    def test_adapters_into_gptj(self, gptj, spec, published):
        with torch.device("meta"):
            adapters = LanguageAdapters(gptj.transformer.h, gptj.config.hidden_size, spec)
        assert count(adapters) == published

    def test_the_map_of_the_resnet_features_and_its_norm(self):
        with torch.device("meta"):
            prefix = ImagePrefix(3072, 4096, PrefixSpec())
        assert count(prefix.project) == 12_587_008
        assert count(prefix.norm) == 8_192


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamilyAndPlace:
    def test_exact_identity_at_step_0_with_a_gradient_and_the_base_again_after_detach(self, language, place):
        language.requires_grad_(False)
        keys, embeddings = list(language.state_dict()), torch.randn(2, 9, language.width)
        before = language(embeddings)
        adapters = adapt(language, mlp=place, attention=place)
        assert list(language.state_dict()) == keys
        now = language(embeddings)
        assert (now - before).abs().max() <= 1e-6
        now.log_softmax(-1)[..., 3].sum().backward()
        for branch in (adapters.mlp, adapters.attention):
            assert all(slot.up.weight.grad.abs().max() > 0 for slot in branch)
        move(adapters)
        assert (language(embeddings) - before).abs().max() > 1e-2
        with adapters.aside():
            assert torch.equal(language(embeddings), before)
        assert (language(embeddings) - before).abs().max() > 1e-2
        adapters.detach()
        assert torch.equal(language(embeddings), before)

    def test_every_slot_moves_what_comes_after_it_only(self, language, place):
        # Two blocks: what a block's slots add shows at its own output, and not before.
        adapters, outputs = adapt(language, mlp=place, attention=place), {}
        for index, block in enumerate(language.blocks):
            block.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output}))

        def run():
            language(embeddings)
            return [output[0] if isinstance(output, tuple) else output for output in outputs.values()]

        with torch.no_grad():
            embeddings, moved = torch.randn(1, 5, language.width), []
            before = run()
            for branch in (adapters.attention, adapters.mlp):
                for slot in branch:
                    nn.init.normal_(slot.up.weight)
                    moved.append([not torch.equal(now, then) for now, then in zip(run(), before, strict=True)])
                    nn.init.zeros_(slot.up.weight)
        assert moved == [[True, True], [False, True]] * 2

    def test_no_position_sees_a_later_one(self, language, place):
        move(adapt(language, mlp=place, attention=place))
        embeddings = torch.randn(2, 9, language.width)
        other = embeddings.clone()
        other[:, 6:] = torch.randn(2, 3, language.width)
        with torch.no_grad():
            assert torch.equal(language(embeddings)[:, :6], language(other)[:, :6])

    @pytest.mark.parametrize("method", METHODS)
    def test_generation_through_the_cache_says_what_whole_passes_say(self, language, place, method, monkeypatch):
        move(adapt(language, mlp=place, attention=place))
        prompt, spec = (
            torch.randint(7, 960, (3, 5)),
            GenerationSpec(method, 6, **({"beams": 3} if method == "beam" else {})),
        )
        prefix, fed = language.embed(prompt).detach(), []
        language.blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        cached, lengths = language.generate(prefix, spec), list(fed)
        fed.clear()
        generate = language.model.generate

        def without_cache(generation_config, inputs_embeds, **inputs):  # transformers can do it from ids only
            generation_config.use_cache = False
            return generate(input_ids=prompt, generation_config=generation_config, **inputs)[:, 5:]

        monkeypatch.setattr(language.model, "generate", without_cache)
        assert language.generate(prefix, spec) == cached
        assert any(cached)
        assert lengths == [5, *[1] * (len(lengths) - 1)]
        assert fed == [5 + step for step in range(len(fed))]


@pytest.fixture
def mini():
    return LanguageModel(LanguageSpec())


class TestFormulas:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("branch", ["mlp", "attention"])
    def test_what_a_slot_adds(self, mini, place, branch):
        block = mini.blocks[0]
        module = {"mlp": block.mlp, "attention": block.attn}[branch]
        x = torch.randn(2, 5, mini.hidden_size)
        seen = {}
        module.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
        module.register_forward_hook(lambda m, args, out: seen.update(f=out[0] if isinstance(out, tuple) else out))
        adapters = adapt(mini, **{"mlp": "none", branch: place})
        move(adapters)
        module.register_forward_hook(lambda m, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            mini(x)
            slot = getattr(adapters, branch)[0]
            read = seen["f"] if place == "sequential" else seen["x"]
            scale = adapters.scales[branch][0] if place == "scaled_parallel" else 1.0
            added = slot.up.weight @ (slot.down.weight @ read.mT + slot.down.bias[:, None]).clamp(min=0)
            wanted = seen["f"] + scale * (added.mT + slot.up.bias)
        assert torch.allclose(seen["y"], wanted, atol=1e-4)

    def test_scales_are_one_at_first_and_learned(self, mini):
        adapters = adapt(mini, mlp="scaled_parallel", attention="scaled_parallel")
        assert torch.equal(adapters.scales["mlp"], torch.ones(4))
        move(adapters)
        mini(torch.randn(1, 3, mini.width))[..., 3].sum().backward()
        assert all((scale.grad != 0).all() for scale in adapters.scales.values())

    def test_magmas_own_first_weights(self):
        bottleneck = LanguageBottleneck(256, 64, layer_norm=True, init="magma")
        assert torch.equal(bottleneck.norm.weight, torch.ones(256))
        for parameter in (*bottleneck.down.parameters(), *bottleneck.up.parameters()):
            assert parameter.abs().max() <= 2e-3
            assert 6e-4 < parameter.std() < 1.2e-3
        clamped = (bottleneck.down.weight.abs() == 2e-3).float().mean()
        assert 0.03 < clamped < 0.06  # what lies beyond two standard deviations: 4.6 %
        change = bottleneck(torch.randn(4, 256))
        assert 0 < change.abs().max() < 5e-2

    def test_layer_norm_is_before_the_map_down(self):
        bottleneck = LanguageBottleneck(32, 8, layer_norm=True, init="magma")
        x = torch.randn(3, 32)
        assert torch.allclose(bottleneck(x), bottleneck(5 * x), atol=1e-6)


class TestAttachment:
    def test_half_precision_weights_under_full_precision_adapters(self):
        language = LanguageModel(LanguageSpec(dtype="bfloat16")).requires_grad_(False)
        embeddings = torch.randn(2, 5, language.width)
        before = language(embeddings)
        adapters = adapt(language, mlp="scaled_parallel", attention="sequential")
        assert torch.equal(language(embeddings), before)
        language(embeddings)[..., 3].sum().backward()
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
        assert all(slot.up.weight.grad.abs().max() > 0 for slot in adapters.mlp)

    def test_a_deep_copy_is_driven_by_its_own_adapters(self, mini):
        model = nn.ModuleDict({"language": mini, "adapters": adapt(mini, attention="parallel")})
        other, embeddings = copy.deepcopy(model), torch.randn(1, 3, mini.width)
        before = mini(embeddings)
        move(other["adapters"])
        assert torch.equal(mini(embeddings), before)
        assert not torch.equal(other["language"](embeddings), before)
        other["adapters"].detach()
        assert torch.equal(other["language"](embeddings), before)

    def test_slots_hold_what_they_are_given_once_for_each_block(self, mini):
        class Shift(nn.Module):
            def __init__(self, index):
                super().__init__()
                self.index, self.shapes = index, []

            def forward(self, x):
                self.shapes.append(tuple(x.shape))
                return torch.full_like(x, 0.1 * self.index)

        adapters, made = None, []

        def make(index):
            made.append(index)
            return Shift(index)

        before = mini(torch.zeros(2, 3, mini.width))
        adapters = adapt(mini, make, mlp="sequential", attention="parallel")
        assert made == [0, 1, 2, 3] * 2
        assert not torch.allclose(mini(torch.zeros(2, 3, mini.width)), before)
        assert all(slot.shapes == [(2, 3, 128)] for slot in [*adapters.mlp, *adapters.attention])

    @pytest.mark.parametrize("place", PLACES)
    def test_slots_see_samples_and_positions_also_where_the_base_runs_them_in_one_row(self, folders, place):
        language, shapes = LanguageModel(LanguageSpec(weights=str(folders["opt"]), max_length=16)), []
        adapters = adapt(language, mlp=place)
        adapters.mlp[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        language(torch.randn(2, 3, language.width))
        assert shapes == [(2, 3, 32)]
        assert language.width == 16

    def test_nothing_read_is_kept_after_a_pass(self, mini):
        adapters = adapt(mini, mlp="parallel", attention="scaled_parallel")
        mini(torch.randn(1, 3, mini.width))
        assert not adapters._read

    def test_names_of_what_trains(self, mini):
        adapters = adapt(mini, attention="scaled_parallel", mlp="sequential")
        names = {name.rsplit(".", 2)[0] for name, _ in adapters.named_parameters() if "scales" not in name}
        assert names == {f"{branch}.{index}" for branch in ("attention", "mlp") for index in range(4)}
        assert {name for name, _ in adapters.named_parameters() if "scales" in name} == {"scales.attention"}


class TestErrors:
    def test_adapters_nowhere(self):
        with pytest.raises(WlsupError, match=r"both 'none'.*sequential.*linear_map"):
            LanguageAdapterSpec(mlp="none")

    @pytest.mark.parametrize("given", [{"mlp": "serial"}, {"attention": "on"}, {"factor": 0}, {"init": "zero"}])
    def test_values_out_of_range(self, given):
        with pytest.raises(WlsupError):
            LanguageAdapterSpec(**given)

    def test_a_factor_that_leaves_no_channel(self, mini):
        with pytest.raises(WlsupError, match=r"factor=256.*128"):
            adapt(mini, factor=256)

    def test_attached_twice_to_another_depth_or_not_at_all(self, mini):
        adapters = adapt(mini)
        with pytest.raises(WlsupError, match="attached already"):
            adapters.attach(mini.blocks)
        adapters.detach()
        with pytest.raises(WlsupError, match="made for 4 blocks; there are 2"):
            adapters.attach(mini.blocks[:2])
        with pytest.raises(WlsupError, match="not attached"), adapters.aside():
            pass

    def test_blocks_of_a_family_that_it_does_not_know(self):
        blocks = nn.ModuleList([nn.ModuleDict({"mixer": nn.Linear(4, 4)})])
        with pytest.raises(WlsupError, match=r"No mlp found in a ModuleDict, which has mixer.*GPT-2"):
            LanguageAdapters(blocks, 4, LanguageAdapterSpec())
