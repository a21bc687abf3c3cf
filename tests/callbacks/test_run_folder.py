"""What a run's folder says beside k-NN: what the approach measured of itself, and the memory it took."""

import subprocess
import sys
from types import SimpleNamespace

import torch

from wlsup.callbacks.run_folder import RunFolder, toys_told


class Measuring(torch.nn.Module):
    name = "measuring"

    def measure(self, datamodule):
        self.asked = datamodule, self.training
        return {"title": "t", "rows": [{"what": "w", "value": 1.0, "unit": "%", "chance": None}], "note": ""}


def test_the_approach_is_measured_when_trained_in_eval_mode_on_the_first_rank_only(tmp_path):
    for rank_zero in (True, False):
        folder, module = RunFolder(tmp_path, "", {}, {}), Measuring().train()
        data = SimpleNamespace(skipped={})
        folder.on_train_end(SimpleNamespace(is_global_zero=rank_zero, datamodule=data, world_size=1), module)
        assert bool(folder.task) == rank_zero
        assert folder.memory["resident"] > 0
        assert not rank_zero or module.asked == (data, False)


def test_peak_memory_is_in_mebibytes():
    code = (
        "import torch; from wlsup.callbacks.run_folder import peak_memory; before = peak_memory()['resident'];"
        "held = torch.ones(64 * 2**20); print(peak_memory()['resident'] - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 240 < float(done.stdout) < 300  # 64 Mi numbers of four bytes: 256 MiB


def test_pictures_that_any_process_could_not_read_are_told_also_by_a_resumed_run(tmp_path, monkeypatch):
    def gather(everyones, own):
        everyones[:] = [own, {"picture1": "torn"}]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    callback = RunFolder(tmp_path, "", {}, {})
    data = SimpleNamespace(skipped={"picture0": "torn"})
    callback.on_train_epoch_end(SimpleNamespace(world_size=2, datamodule=data), None)
    resumed = RunFolder(tmp_path, "", {}, {})
    resumed.load_state_dict(callback.state_dict())
    assert resumed.skipped == {"picture0": "torn", "picture1": "torn"}


def test_captions_of_ones_own_on_the_toys_are_told_with_their_cure():
    toy, real = {"id": "mini"}, {"id": "timm:vit_base_patch16_224.dino"}
    mine = SimpleNamespace(source="table", eval_sets=["mini_shapes", "mini_digits"])
    told = toys_told(SimpleNamespace(bases={"encoder": toy, "text": real}), mine)
    assert "mini encoder model, evaluation sets" in told
    assert "--model.encoder.weights, --data.eval_sets" in told
    mine.eval_sets = ["mini_shapes", SimpleNamespace(name="xrays")]
    assert toys_told(SimpleNamespace(bases={"encoder": real, "text": real}), mine) == ""
    assert toys_told(SimpleNamespace(bases={"encoder": toy}), SimpleNamespace(source="mini", eval_sets=[])) == ""
