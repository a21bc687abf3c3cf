"""MoE checkpoints: what is written is what is read, whole or by the expert, and the dense model comes back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from dense_families import CONFIGS, make, relative  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.models.caption_tokens import MINI_LANGUAGE  # noqa: E402
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec  # noqa: E402
from wlsup.models.vision import VisionSpec, build_vision  # noqa: E402
from wlsup.moe.checkpoint import load_moe, read_expert, save_dense, save_moe  # noqa: E402
from wlsup.moe.spec import MoESpec  # noqa: E402
from wlsup.moe.token_ids import TokenIds  # noqa: E402
from wlsup.moe.upcycle import moe_layers, upcycle  # noqa: E402


def trained(layers):
    """As if experts and routers had been trained."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.fixture
def vision():
    encoder = build_vision(VisionSpec()).eval()
    trained(upcycle(encoder, [1, 4], MoESpec(experts=3, k=2), seed=0))
    return encoder


def family_folder(family, place):
    make(family).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI_LANGUAGE / name, place / name)
    return place


class TestVision:
    @torch.no_grad()
    def test_loaded_it_computes_the_same_and_has_the_same_tensors(self, vision, tmp_path):
        images = torch.randn(2, 3, 64, 64)
        again = load_moe(save_moe(vision, tmp_path / "moe", made_by={"seed": 0})).eval()
        assert torch.equal(again.features(images), vision.features(images))
        one, two = vision.state_dict(), again.state_dict()
        assert list(one) == list(two)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        assert again.base_id == "mini"
        assert again.base_sha256 == vision.base_sha256
        assert list(moe_layers(again)) == ["backbone.blocks.1.mlp", "backbone.blocks.4.mlp"]
        assert next(iter(moe_layers(again).values())).spec == MoESpec(experts=3, k=2)

    def test_one_expert_alone(self, vision, tmp_path, monkeypatch):
        folder = save_moe(vision, tmp_path / "moe")
        monkeypatch.setattr("wlsup.moe.checkpoint.read_weights", None)  # the whole file is not read
        layer = moe_layers(vision)["backbone.blocks.4.mlp"]
        tensors = read_expert(folder, block=4, expert=2)
        assert set(tensors) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
        assert all(torch.equal(tensor, layer.experts[2].state_dict()[name]) for name, tensor in tensors.items())
        layer.experts[0].load_state_dict(tensors)

    def test_half_precision_on_disk_leaves_the_router_alone(self, vision, tmp_path):
        layer = moe_layers(vision)["backbone.blocks.1.mlp"]
        folder = save_moe(vision, tmp_path / "moe", torch.float16)
        assert (folder / "model.safetensors").stat().st_size < 0.55 * sum(
            4 * tensor.numel() for tensor in vision.state_dict().values()
        )
        again = moe_layers(load_moe(folder))["backbone.blocks.1.mlp"]
        assert torch.equal(again.router.weight, layer.router.weight)
        assert 0 < relative(again.experts[0].fc1.weight, layer.experts[0].fc1.weight) < 1e-3

    @torch.no_grad()
    def test_untrained_the_dense_encoder_comes_back_bit_for_bit(self, tmp_path):
        encoder = build_vision(VisionSpec()).eval()
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        upcycle(encoder, None, MoESpec(experts=2))
        dense = save_dense(load_moe(save_moe(encoder, tmp_path / "moe")), tmp_path / "dense")
        again = build_vision(VisionSpec(weights=str(dense)))
        assert list(again.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
        assert again.image_spec == encoder.image_spec

    def test_trained_there_is_no_dense_encoder(self, vision, tmp_path):
        with pytest.raises(WlsupError, match="its experts differ"):
            save_dense(vision, tmp_path / "dense")
        assert not (tmp_path / "dense").exists()


class TestLanguage:
    @pytest.mark.parametrize("family", list(CONFIGS))
    @torch.no_grad()
    def test_loaded_it_computes_the_same(self, family, tmp_path):
        language = LanguageModel(LanguageSpec(weights=str(family_folder(family, tmp_path)), max_length=16))
        trained(upcycle(language, [1], MoESpec(experts=2, k=1), seed=0))
        again = load_moe(save_moe(language, tmp_path / "moe"))
        ids = torch.randint(7, 97, (2, 9))
        computed, wanted = again(again.embed(ids)), language(language.embed(ids))
        kernels = {model.model.config._attn_implementation for model in (again, language)}
        if len(kernels) == 1:
            assert torch.equal(computed, wanted)
        else:  # transformers before 5 takes another attention kernel for a model that it makes of a configuration
            torch.testing.assert_close(computed, wanted, rtol=1e-5, atol=1e-5)
        assert again.base == language.base
        one, two = language.state_dict(), again.state_dict()
        assert list(one) == list(two)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

    @torch.no_grad()
    def test_of_a_base_in_half_precision_no_bit_is_lost(self, tmp_path):
        family_folder("llama", tmp_path)
        make("llama").to(torch.bfloat16).save_pretrained(tmp_path)
        language = LanguageModel(LanguageSpec(weights=str(tmp_path), max_length=16))
        trained(upcycle(language, [1], MoESpec(experts=2, k=1), seed=0))
        again = load_moe(save_moe(language, tmp_path / "moe")).state_dict()
        for name, tensor in language.state_dict().items():
            assert again[name].dtype == tensor.dtype
            assert torch.equal(again[name], tensor)

    @torch.no_grad()
    def test_the_mini_model_says_the_same_and_tied_tensors_are_written_once(self, tmp_path):
        language = LanguageModel(LanguageSpec(max_length=20))
        trained(upcycle(language, [3], MoESpec(experts=2), seed=0))
        folder = save_moe(language, tmp_path / "moe")
        again = load_moe(folder)
        prefix = torch.randn(2, 4, language.width)
        assert again.generate(prefix, GenerationSpec(max_tokens=8)) == language.generate(
            prefix, GenerationSpec(max_tokens=8)
        )
        assert again.tokenizer.max_length == again.spec.max_length == 20
        assert again.tokenizer.base["sha256"] == language.tokenizer.base["sha256"]
        distinct = sum(4 * parameter.numel() for parameter in language.parameters())
        assert (folder / "model.safetensors").stat().st_size < 1.05 * distinct
        assert again.model.lm_head.weight is again.model.transformer.wte.weight

    @torch.no_grad()
    def test_hash_tables_come_back_also_with_a_prefix_and_frequencies(self, tmp_path):
        language = LanguageModel(LanguageSpec())
        token_ids = TokenIds(language.vocabulary, positions=3)
        spec = MoESpec(experts=4, router="hash", hash="balanced")
        frequencies = torch.rand(token_ids.rows)
        (layer,) = upcycle(language, [1], spec, token_ids=token_ids, frequencies=frequencies)
        (again,) = moe_layers(load_moe(save_moe(language, tmp_path / "moe"))).values()
        assert torch.equal(again.router.table, layer.router.table)
        assert again.token_ids.positions == 3

    @pytest.mark.parametrize("positions", [0, 1, 4])
    @torch.no_grad()
    def test_loaded_a_hash_finds_its_ids_in_every_generation(self, positions, tmp_path):
        language = LanguageModel(LanguageSpec())
        token_ids = TokenIds(language.vocabulary, positions)
        upcycle(language, [1], MoESpec(experts=4, router="hash"), token_ids=token_ids)
        again = load_moe(save_moe(language, tmp_path / "moe"))
        (layer,) = moe_layers(again).values()
        routed = []
        layer.router.register_forward_pre_hook(lambda router, inputs: routed.append(inputs[0]))
        first = list(range(again.vocabulary, again.vocabulary + positions)) or [7, 7]
        for _ in range(2):  # what the first one was fed last is not the second one's
            routed.clear()
            front = torch.randn(2, positions, again.width) if positions else again.embed(torch.full((2, 2), 7))
            again.generate(front, GenerationSpec(max_tokens=4))
            assert routed[0].tolist() == [first, first]
            assert all(step.shape == (2, 1) and step.max() < again.vocabulary for step in routed[1:])

    @torch.no_grad()
    def test_untrained_the_dense_model_comes_back_for_transformers(self, tmp_path):
        language = LanguageModel(LanguageSpec())
        before = {name: tensor.clone() for name, tensor in language.state_dict().items()}
        upcycle(language, None, MoESpec(experts=2))
        dense = save_dense(load_moe(save_moe(language, tmp_path / "moe")), tmp_path / "dense")
        again = LanguageModel(LanguageSpec(weights=str(dense)))
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


class TestErrors:
    def test_a_dense_model_is_no_moe_checkpoint(self, tmp_path):
        with pytest.raises(WlsupError, match="no MoE layer"):
            save_moe(build_vision(VisionSpec()), tmp_path / "moe")
        mixed = build_vision(VisionSpec())
        for block, k in ((1, 1), (3, 2)):
            upcycle(mixed, [block], MoESpec(experts=4, k=k))
        with pytest.raises(WlsupError, match=r"different settings, first backbone.blocks.3.mlp"):
            save_moe(mixed, tmp_path / "moe")
        with pytest.raises(WlsupError, match="is no MoE checkpoint"):
            load_moe(MINI_LANGUAGE)
        with pytest.raises(WlsupError, match="No such file"):
            load_moe(tmp_path / "nowhere")

    def test_blocks_and_experts_that_it_does_not_have(self, vision, tmp_path):
        folder = save_moe(vision, tmp_path / "moe")
        with pytest.raises(WlsupError, match="Block 2 of .* is no MoE layer; those that are: 1, 4"):
            read_expert(folder, 2, 0)
        with pytest.raises(WlsupError, match="no expert 3: .* has experts 0 to 2"):
            read_expert(folder, 1, 3)

    def test_damaged_files(self, vision, tmp_path):
        folder = save_moe(vision, tmp_path / "moe")
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        flipped = bytearray(whole)
        flipped[-5] ^= 1
        weights.write_bytes(flipped)
        with pytest.raises(WlsupError, match="is damaged: model.safetensors is not the file"):
            load_moe(folder)
        weights.write_bytes(whole[: len(whole) // 2])
        for read in (lambda: load_moe(folder), lambda: read_expert(folder, 1, 0)):
            with pytest.raises(WlsupError, match="damaged|truncated"):
                read()

    def test_one_of_a_version_to_come(self, vision, tmp_path):
        folder = save_moe(vision, tmp_path / "moe")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"version": 2}))
        with pytest.raises(WlsupError, match="by a newer wlsup .version 2 of wlsup-moe.: update this one"):
            load_moe(folder)

    def test_an_incomplete_description(self, vision, tmp_path):
        folder = save_moe(vision, tmp_path / "moe")
        config = json.loads((folder / "config.json").read_text())
        del config["spec"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(WlsupError, match="incomplete: it lacks spec"):
            load_moe(folder)
