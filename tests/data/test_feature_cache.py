"""Cached features: computed once, the same result, no picture read afterwards."""

import time
from types import SimpleNamespace

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.dataset import CaptionDataset
from wlsup.data.feature_cache import FeatureCache, _free_bytes
from wlsup.data.transforms import EvalTransform
from wlsup.errors import WlsupError
from wlsup.models.prefix import PrefixSpec


@pytest.fixture(scope="module")
def lit():
    torch.manual_seed(0)
    module = approach_class("lit")()
    module.setup("fit")
    return module


def data_for(module, cache=True):
    data = CaptionDataModule(pairs=64, validation_pairs=16, batch_size=16, cache_features=cache)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.setup()
    return data


def plain_dataset(data, training=False):
    source, spec = data._train, data._spec()
    return CaptionDataset(source.keys, source.captions, source.pictures, EvalTransform(spec), spec, data.seed)


def losses(module, batches, steps=8):
    """Losses of a few steps from the same start."""
    heads = {name: tensor.clone() for name, tensor in module.head.state_dict().items()}
    optimizer = torch.optim.SGD(module.head.parameters(), lr=0.1)
    found = []
    for batch in batches[:steps]:
        optimizer.zero_grad()
        loss = module.losses(batch)["loss"]
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    module.head.load_state_dict(heads)
    return found


def test_training_gives_the_same_as_without_the_cache_and_without_augmentation(lit):
    data = data_for(lit)
    cached = list(data.train_dataloader())
    dataset = plain_dataset(data)
    position = {key: index for index, key in enumerate(dataset.keys)}
    uncached = []
    for batch in cached:
        other = dataset.__getitems__([position[key] for key in batch.keys])
        other.captions = batch.captions
        uncached.append(other)
        assert batch.images.shape == (16, 0)
    assert losses(lit, cached) == pytest.approx(losses(lit, uncached), rel=1e-5)


@pytest.mark.usefixtures("few_mini_pictures")
@pytest.mark.parametrize("name", ["lit", "linear_map", "magma", "magma_moe", "cross_modal_reprogramming"])
def test_every_approach_that_reads_a_locked_encoder_has_the_same_loss_and_gradients(name):
    options = {"encoder_lr": 0.0} if name.startswith("magma") else {}
    if name in ("magma", "linear_map"):
        options["prefix"] = PrefixSpec(pool=2)
    torch.manual_seed(0)
    module = approach_class(name)(**options)
    module.setup("fit")
    module.train()
    data = data_for(module)
    if name == "cross_modal_reprogramming":  # its classifier is fitted first
        data.eval_sets = ["mini_shapes"]
        module.prepare(data)
    (cached, *_), dataset = list(data.train_dataloader()), plain_dataset(data)
    if hasattr(module, "prefix"):  # no more is kept than the map reads
        assert cached.encoded.tokens.shape[1:] == (
            module.prefix.positions(module.encoder.grid_size),
            module.encoder.embed_dim,
        )
    position = {key: index for index, key in enumerate(dataset.keys)}
    uncached = dataset.__getitems__([position[key] for key in cached.keys])
    uncached.captions = cached.captions
    found = []
    for batch in (cached, uncached):
        module.zero_grad()
        torch.manual_seed(1)
        loss = module.losses(batch)["loss"]
        loss.backward()
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) <= 1e-4


@pytest.mark.usefixtures("few_mini_pictures")
def test_another_approach_has_a_cache_of_its_own():
    first, second = (approach_class("linear_map")(prefix=PrefixSpec(pool=pool)) for pool in (2, 4))
    data = data_for(first)
    counts = []
    for module in (first, second):
        data.trainer.lightning_module = module
        counts.append(next(iter(data.train_dataloader())).encoded.tokens.shape[1])
    assert counts == [16, 4]
    data.trainer = None
    assert next(iter(data.train_dataloader())).encoded.tokens.shape[1] == 4


def test_captions_are_still_drawn_each_epoch_as_without_the_cache(lit):
    cached, plain = (list(data_for(lit, cache).train_dataloader()) for cache in (True, False))
    assert [batch.captions for batch in cached] == [batch.captions for batch in plain]
    assert [batch.keys for batch in cached] == [batch.keys for batch in plain]


def test_the_encoder_runs_once_and_no_picture_is_read_after_that(lit, monkeypatch):
    data = data_for(lit)
    data.train_dataloader()
    calls = []
    monkeypatch.setattr(lit.mae.encoder, "forward", lambda *a, **k: calls.append(1))
    monkeypatch.setattr(type(data._train.pictures), "read", lambda *a: calls.append(1))
    for _ in range(2):
        for batch in data.train_dataloader():
            lit.losses(batch)
    assert not calls


def test_where_no_picture_is_looked_at_none_is_encoded_to_be_kept_nor_read_again(monkeypatch):
    module = approach_class("cross_modal_reprogramming")(compare=False)
    data, calls = data_for(module), []
    monkeypatch.setattr(type(module.encoder), "forward", lambda *a, **k: calls.append(1))
    first = next(iter(data.train_dataloader()))
    monkeypatch.setattr(type(data._train.pictures), "read", lambda *a: calls.append(1))
    second = next(iter(data.train_dataloader()))
    assert first.encoded.pooled.shape == (16, 0) and first.captions and second.captions
    assert not calls


@pytest.mark.parametrize(("name", "options"), [("lit", {}), ("selective_k", {"k": 0})])
def test_captions_are_read_once_too_and_give_the_same(name, options, monkeypatch):
    torch.manual_seed(0)
    module = approach_class(name)(**options)
    module.setup("fit")
    data = data_for(module)
    batches = list(data.train_dataloader())
    wanted = losses(module, batches)
    module._trainer = SimpleNamespace(datamodule=data_for(module, False))
    module.on_fit_start()  # without cached features captions are read as ever
    assert losses(module, batches) == wanted
    module._trainer = SimpleNamespace(datamodule=data)
    module.on_fit_start()
    monkeypatch.setattr(module.text, "forward", lambda captions: pytest.fail("read again"))
    assert losses(module, batches) == pytest.approx(wanted, rel=1e-5)


def test_no_worker_process_copies_what_lies_in_memory(lit):
    data, plain = data_for(lit), data_for(lit, False)
    data.num_workers = plain.num_workers = 2
    assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == 0
    assert plain.train_dataloader().num_workers == plain.val_dataloader().num_workers == 2


def test_held_out_pairs_come_from_a_cache_too_with_first_captions(lit):
    cached, plain = data_for(lit), data_for(lit, False)
    for one, other in zip(cached.val_dataloader(), plain.val_dataloader(), strict=True):
        assert one.captions == other.captions
        assert torch.allclose(one.encoded.pooled, lit.encode(other).pooled, atol=1e-5)


def test_the_encoder_part_of_later_epochs_is_100_times_faster(lit):
    data = data_for(lit)
    data.train_dataloader()
    cache = data._caches["train"][1].cache
    batch, positions = plain_dataset(data).__getitems__(list(range(64))), list(range(64))

    def fastest(work):
        times = []
        for _ in range(5):
            begin = time.process_time_ns()
            work()
            times.append(time.process_time_ns() - begin)
        return max(min(times), 1)

    with torch.no_grad():
        ratio = fastest(lambda: lit.encoder(batch.images)) / fastest(lambda: cache.take(positions))
    assert ratio >= 100


def test_tokens_are_kept_where_they_are_asked_for(lit):
    data, cache = data_for(lit), FeatureCache("tokens")
    dataset = plain_dataset(data)
    cache.fill(dataset, lit.eval().encoder, "cpu", batch_size=16)
    batch = dataset.__getitems__([3, 5])
    output, kept = lit.encoder(batch.images), cache.take([3, 5])
    assert torch.allclose(kept.tokens, output.tokens, atol=1e-5)
    assert torch.allclose(kept.patch_tokens, output.patch_tokens, atol=1e-5)


def test_more_than_fits_into_memory_is_refused(lit, monkeypatch):
    monkeypatch.setattr("wlsup.data.feature_cache._free_bytes", lambda: 1000)
    with pytest.raises(WlsupError, match=r"data\.pairs"):
        data_for(lit).train_dataloader()


def test_every_process_of_the_machine_keeps_its_own(lit, monkeypatch):
    dataset = plain_dataset(data_for(lit))
    needed = 4 * len(dataset) * lit.encoder.embed_dim
    monkeypatch.setattr("wlsup.data.feature_cache._free_bytes", lambda: 2 * needed)
    FeatureCache().fill(dataset, lit.eval().encoder, "cpu", processes=1)
    with pytest.raises(WlsupError, match="in each of 2 processes"):
        FeatureCache().fill(dataset, lit.eval().encoder, "cpu", processes=2)
    data = data_for(lit)
    data.trainer.num_devices = 2
    with pytest.raises(WlsupError, match="in each of 2 processes"):
        data.train_dataloader()
    monkeypatch.setattr("wlsup.data.feature_cache._free_bytes", lambda: None)  # not known: not refused
    FeatureCache().fill(dataset, lit.eval().encoder, "cpu", processes=2)


def machine(folder, monkeypatch, membership, **files):
    """A stand-in for /proc and /sys/fs/cgroup, of which 6 GiB are free and 9 are available."""
    for name, text in {"meminfo": "MemFree: 6291456 kB\nMemAvailable: 9437184 kB\n", "cgroup": membership}.items():
        (folder / name).write_text(text)
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, file in (("_MEMORY", "meminfo"), ("_MEMBERSHIP", "cgroup"), ("_GROUPS", "groups")):
        monkeypatch.setattr(f"wlsup.data.feature_cache.{name}", folder / file)
    return _free_bytes()


GIB = 2**30


def test_free_memory_counts_files_kept_at_hand_and_heeds_the_control_groups_limits(tmp_path, monkeypatch):
    assert machine(tmp_path, monkeypatch, "0::/\n") == 9 * GIB
    stat = f"anon 5\ninactive_file {GIB}\n"
    two = {"job/memory.max": f"{8 * GIB}", "job/memory.current": f"{6 * GIB}", "job/memory.stat": stat}
    step = {"job/step/memory.max": "max\n", "job/step/memory.current": "7", "job/step/memory.stat": stat}
    assert machine(tmp_path, monkeypatch, "0::/job/step\n", **two, **step) == 3 * GIB  # a parent's limit holds
    one = {"limit_in_bytes": 4 * GIB, "usage_in_bytes": 3 * GIB, "stat": f"total_inactive_file {GIB}\ninactive_file 0"}
    one = {f"memory/memory.{name}": f"{value}" for name, value in one.items()}
    membership = "3:cpu,cpuacct:/x\n2:hugetlb,memory:/seen/from/outside\n0::/\n"
    assert machine(tmp_path, monkeypatch, membership, **one) == 2 * GIB


def test_where_nothing_says_how_much_is_free_nothing_is_refused(tmp_path, monkeypatch):
    for name in ("_MEMORY", "_MEMBERSHIP"):
        monkeypatch.setattr(f"wlsup.data.feature_cache.{name}", tmp_path / "lacking")
    assert _free_bytes() is None


@pytest.mark.parametrize("name", ["full", "film"])
def test_an_approach_that_changes_its_encoder_is_refused(name):
    with pytest.raises(WlsupError, match=f"{name} trains the encoder"):
        data_for(approach_class(name)()).train_dataloader()
