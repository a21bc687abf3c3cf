"""Several processes share a set's pictures and vote as one process does, to the bit."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from wlsup.batch import EvalSet
from wlsup.callbacks.knn import features_of, score_knn
from wlsup.errors import WlsupError

pytestmark = pytest.mark.multiprocess
BATCH = 16


class Pictures(Dataset):
    """Noise in four classes; one picture cannot be read, and ``broken`` is no picture at all."""

    def __init__(self, number, seed, broken=None):
        self.images = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.broken, self.read = broken, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.broken:
            raise WlsupError(f"picture {index} is of another set")
        return self.images[index], index % 4, "torn" if index == 3 else None


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 64, 4)

    def features(self, images):
        return self.conv(images).relu().flatten(1).float()


def sets(broken=None):
    return EvalSet("noise", "in", Pictures(100, 0, broken), Pictures(20, 1), tuple("abcd"))


def score(eval_set):
    bank, queries = features_of(Encoder(), eval_set, batch_size=BATCH)
    return bank, queries, score_knn(bank, queries, 4, k=5, ks=(1, 5))


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    eval_set = sets()
    bank, queries, result = score(eval_set)
    said = None
    try:
        score(sets(broken=40))
    except WlsupError as error:
        said = str(error)
    torch.save(
        {
            "bank": vars(bank),
            "queries": vars(queries),
            "correct": result.correct,
            "read": (eval_set.train.read, eval_set.test.read),
            "said": said,
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [3])
def test_ranks_share_whole_batches_and_vote_as_one_process_to_the_bit(world, tmp_path, in_processes):
    torch.set_num_threads(1)
    bank, queries, result = score(sets())
    in_processes(work, world, tmp_path, 120)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for part in range(2):
        read = sorted(index for one in found for index in one["read"][part])
        assert read == list(range((100, 20)[part]))  # each picture once, in one process
    for one in found:
        for name, alone in (("bank", bank), ("queries", queries)):
            for key, value in vars(alone).items():
                same = (
                    torch.equal(one[name][key], value) if isinstance(value, torch.Tensor) else one[name][key] == value
                )
                assert same, (name, key)
        assert torch.equal(one["correct"], result.correct)
        assert "of another set" in one["said"]
