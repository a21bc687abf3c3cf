"""What `wlsup export` makes of captioners in a language model: captions, logits and experts stay the run's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from wlsup.approaches.base import Approach
from wlsup.cli import main
from wlsup.cli.export import load_adapter
from wlsup.errors import WlsupError
from wlsup.models.language import GenerationSpec
from wlsup.moe import MoE, checkpoint
from wlsup.moe.checkpoint import load_moe, read_expert
from wlsup.moe.upcycle import moe_layers

SPEC = GenerationSpec(max_tokens=6)
BIAS = ["--model.moe.balance", "bias"]
HASH = ["--model.moe.router", "hash", "--model.moe.hash", "balanced"]
FROZEN, TUNED = ["--model.encoder_lr", "0"], ["--model.encoder_lr", "1e-2"]
RUNS = {
    "magma": ["magma", *TUNED],
    "magma-frozen": ["magma", *FROZEN],
    "adapters": ["magma_moe", *BIAS, *TUNED],
    "adapters-frozen": ["magma_moe", *HASH, *FROZEN, "--model.adapters.attention", "scaled_parallel"],
    "ffn": ["magma_moe", "--model.mixture", "ffn", *HASH, *TUNED],
    "ffn-frozen": ["magma_moe", "--model.mixture", "ffn", *BIAS, *FROZEN],
}


def fit(folder, approach, *options):
    """Three steps through the command line; return the model as training left it in memory, in eval mode."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        after = Approach.after_step
        patch.setattr(Approach, "after_step", lambda self: (kept.append(self), after(self))[1])
        command = [
            "fit", "-c", "experiments/base.yaml", "-c", f"experiments/{approach}.yaml", "--run_dir", str(folder),
            "--data.pairs", "24", "--data.validation_pairs", "8", "--data.batch_size", "8", "--data.eval_sets", "[]",
            "--captioning.pictures", "0", "--captioning.samples", "0", "--trainer.max_epochs", "1",
            "--model.lr", "3e-2", *options,
        ]  # fmt: skip
        assert main(command) == 0
    assert len(kept) == 3
    return kept[-1].cpu().eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of RUNS and what it trained, made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / name
            made[name] = folder, fit(folder, *RUNS[name])
        return made[name]

    return make


def export(run, out, *options):
    assert main(["export", str(run), "-o", str(out), *options]) == 0
    return Path(out)


def layers(approach):
    return {name: part for name, part in approach.named_modules() if isinstance(part, MoE)}


@torch.no_grad()
def logits(approach, images):
    ids = approach.language.tokenizer(["a red square", "two blue stars"]).ids
    front = approach.prefix(approach.encoder(images), approach.encoder.grid_size)
    return approach.language(torch.cat([front, approach.language.embed(ids)], dim=1))


@pytest.mark.parametrize("name", RUNS)
def test_what_trained_alone_on_its_bases_is_the_trained_captioner_bit_for_bit(name, run, tmp_path):
    folder, trained = run(name)
    again, _ = load_adapter(export(folder, tmp_path / "adapter", "--adapter-only"))
    wanted, own = trained.state_dict(), again.state_dict()
    assert own.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(own[key], wanted[key])] == []
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(again, images), logits(trained, images))
    assert again.caption(images, SPEC) == trained.caption(images, SPEC)


@pytest.mark.parametrize("name", RUNS)
def test_training_had_moved_all_that_the_export_must_hold(name, run):
    """Or the test above would pass without it."""
    from wlsup.cli.configuration import untrained_run

    folder, trained = run(name)
    before, after = untrained_run(folder).state_dict(), trained.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    parts = {"prefix", "adapters" if name.startswith("magma") else "mixtures"}
    assert {key.partition(".")[0] for key in moved} == parts | (set() if name.endswith("frozen") else {"vision"})
    buffers = [key for key in after if key.endswith(("router.bias_steps", "router.table"))]
    assert len(buffers) == len(layers(trained))
    assert moved.issuperset(buffers)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("adapters", {"block": 2}),
        ("adapters-frozen", {"block": 0, "slot": "mlp"}),
        ("adapters-frozen", {"block": 3, "slot": "attention"}),
        ("ffn", {"block": 3}),
        ("ffn-frozen", {"block": 1}),
    ],
)
def test_one_expert_of_what_trained_alone(name, at, run, tmp_path, monkeypatch):
    folder, trained = run(name)
    adapter, read = export(folder, tmp_path / "adapter", "--adapter-only"), []

    class Spy:
        def __init__(self, *inputs, **named):
            self.file = opened(*inputs, **named)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    opened = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    slot = at.get("slot", "mlp")
    place = f"layers.model_transformer_h_{at['block']}_mlp" if name.startswith("ffn") else f"{slot}.{at['block']}"
    layer = trained.mixtures.get_submodule(place)
    tensors = read_expert(adapter, expert=2, **at)
    wanted = layer.experts[2].state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in tensors.items())
    assert sorted(read) == sorted(f"mixtures.{place}.experts.2.{key}" for key in wanted)  # and nothing else
    assert not all(torch.equal(tensor, layer.experts[0].state_dict()[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", ["ffn", "ffn-frozen"])
@torch.no_grad()
def test_the_language_model_with_its_experts_computes_as_in_the_run(name, run, tmp_path, capsys):
    folder, trained = run(name)
    capsys.readouterr()
    out = export(folder, tmp_path / "moe", "--language", "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["files"]) == ("language", sorted(path.name for path in out.iterdir()))
    again = load_moe(out)
    ids = torch.randint(7, 900, (2, 9))
    computed, wanted = (language.model(input_ids=ids).logits for language in (again, trained.language))
    # transformers before 5 takes another attention kernel for a model that it makes of a configuration
    kernels = {language.model.config._attn_implementation for language in (again, trained.language)}
    torch.testing.assert_close(computed, wanted, rtol=0, atol=0 if len(kernels) == 1 else 1e-5)
    with trained._without():
        assert not torch.allclose(trained.language.model(input_ids=ids).logits, wanted, atol=1e-3)
    for own, layer in zip(moe_layers(again).values(), layers(trained).values(), strict=True):
        state = layer.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in own.state_dict().items())
    expert = layers(trained)["mixtures.layers.model_transformer_h_3_mlp"].experts[1].state_dict()
    tensors = read_expert(out, block=3, expert=1)
    assert tensors.keys() == expert.keys()
    assert all(torch.equal(tensor, expert[key]) for key, tensor in tensors.items())


def test_the_line_that_loads_the_language_model(run, tmp_path, capsys, monkeypatch):
    folder, _ = run("ffn-frozen")
    capsys.readouterr()
    export(folder, tmp_path / "moe", "--language")
    lines = [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    scope = {"ids": torch.tensor([[7, 8, 9]])}
    exec("\n".join(lines), scope)
    assert scope["logits"].shape == (1, 3, scope["language"].vocabulary)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("magma-frozen", ["--language"], "this run of 'magma' has no experts in the places"),
        ("adapters", ["--language"], "--language is for runs of magma_moe with mixture: ffn"),
        ("ffn-frozen", ["--language", "--adapter-only"], "not allowed with"),
        ("ffn-frozen", ["--language", "--licence", "mit"], "which --language does not write"),
        ("ffn-frozen", ["--language", "--alpha", "0.5"], "Leave --alpha out"),
    ],
)
def test_mistakes_are_one_message(name, options, said, run, tmp_path, capsys):
    folder, _ = run(name)
    capsys.readouterr()
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_blocks_slots_and_experts_that_there_are_not(run, tmp_path):
    adapter = export(run("adapters-frozen")[0], tmp_path / "adapter", "--adapter-only")
    with pytest.raises(WlsupError, match=r"Block 9 of .* at its mlp, .* are: 0 \(attention\), 0, 1 \(attention\), 1"):
        read_expert(adapter, 9, 0)
    with pytest.raises(WlsupError, match="no expert 4: .* has experts 0 to 3"):
        read_expert(adapter, 1, 4)
    dense = export(run("magma-frozen")[0], tmp_path / "magma", "--adapter-only")
    with pytest.raises(WlsupError, match="Block 1 of .* those that are: none"):
        read_expert(dense, 1, 0)
    weights = shutil.copytree(adapter, tmp_path / "damaged") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WlsupError, match="adapter_model.safetensors is damaged"):
        read_expert(weights.parent, 1, 0)
    (weights.parent / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(WlsupError, match=r"No such file: .*config\.json"):
        read_expert(weights.parent, 1, 0)
