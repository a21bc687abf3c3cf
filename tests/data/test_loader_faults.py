"""A worker that dies, a source that stalls: one sentence in a short time, never a hang."""

import os
import signal
import time

import pytest

from wlsup.batch import ImageSpec
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.feature_cache import FeatureCache
from wlsup.data.image_datamodule import ImageDataModule
from wlsup.data.loader import make_loader
from wlsup.data.sampler import EpochSampler
from wlsup.errors import WlsupError


class Source:
    """Eight numbers; the batch that holds number 5 does something."""

    def __init__(self, do):
        self.do = do

    def __len__(self):
        return 8

    def __getitems__(self, items):
        numbers = [index for _, index in items]
        if 5 in numbers:
            self.do()
        return numbers


def stall():
    read, _ = os.pipe()
    os.read(read, 1)  # nobody ever writes


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def read(do, workers, patience):
    sampler = EpochSampler(8, batch_size=2, shuffle=False)
    return list(make_loader(Source(do), sampler, 2, workers, None, patience))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stalled_source_ends_in_a_sentence(workers):
    started = time.monotonic()
    with pytest.raises(WlsupError, match=r"No batch came in 1 s.*--resume auto"):
        read(stall, workers, 1)
    assert time.monotonic() - started < 30


def test_a_worker_that_is_killed_ends_in_a_sentence():
    with pytest.raises(WlsupError, match=r"was killed, as .*memory"):
        read(die, 1, 60)


def test_a_worker_that_crashes_is_not_blamed_on_memory():
    with pytest.raises(WlsupError, match=r"died of Aborted, .*num_workers 0"):
        read(os.abort, 1, 60)


def test_a_slow_step_is_not_a_stalled_source():
    sampler = EpochSampler(8, batch_size=2, shuffle=False)
    seen = []
    for batch in make_loader(Source(lambda: None), sampler, 2, 0, None, 0.3):
        seen += batch
        time.sleep(0.4)
    assert seen == list(range(8))


def test_a_handler_of_alarms_is_put_back():
    before = signal.getsignal(signal.SIGALRM)
    assert len(read(lambda: None, 0, 5)) == 4
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_cache_of_features_does_not_wait_for_ever_either():
    with pytest.raises(WlsupError, match="No batch came in 1 s"):
        FeatureCache().fill(Source(stall), lambda images: None, "cpu", batch_size=8, patience=1)


@pytest.mark.parametrize("module", [ImageDataModule, CaptionDataModule])
def test_both_data_modules_wait_as_long_as_they_are_told(module):
    data = module(batch_size=4, patience=7.0)
    data.image_spec = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    data.setup()
    assert data.train_dataloader().patience == 7.0
    with pytest.raises(WlsupError, match="patience=-1"):
        module(batch_size=4, patience=-1.0)
