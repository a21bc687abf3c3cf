"""N processes x 32/N pairs against one process x 32 pairs. All cases of a world size run in one set of processes."""

import re
import time
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from wlsup.errors import WlsupError
from wlsup.objectives.contrastive import CLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS, SIGLIP_LOGIT_SCALE, info_nce, siglip
from wlsup.objectives.distributed import meet

pytestmark = pytest.mark.multiprocess

PAIRS = 32
TIMEOUT = 120  # seconds for one set of processes
KEYS = [f"image-{i % 11}" for i in range(PAIRS)]
EVEN = {2: (16, 16), 4: (8, 8, 8, 8)}
UNEVEN = {2: (27, 5), 4: (13, 1, 0, 18)}


class Towers(nn.Module):
    """The smallest dual encoder: what DistributedDataParallel averages are weights, not embeddings."""

    def __init__(self, loss, text_trains=True):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(12, 24, generator=generator))
        self.text = nn.Parameter(torch.randn(12, 24, generator=generator), requires_grad=text_trains)
        sigmoid = loss == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(SIGLIP_LOGIT_SCALE if sigmoid else CLIP_LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_LOGIT_BIAS)) if sigmoid else None

    def forward(self, images, texts, **options):
        image, text = F.normalize(images @ self.image.t(), dim=1), F.normalize(texts @ self.text.t(), dim=1)
        if self.logit_bias is None:
            return info_nce(image, text, self.logit_scale, tile=5, **options)
        return siglip(image, text, self.logit_scale, self.logit_bias, tile=5, **options)


def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PAIRS, 24, generator=generator)
    return images, images + torch.randn(PAIRS, 24, generator=generator)


def step(model, batch, keys):
    """(loss, gradients by name) of one forward and backward."""
    value = model(*batch, keys=keys)
    value.backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {"loss": value.detach()} | {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


CASES = [
    (loss, sizes, keyed, text_trains)
    for loss in ("info_nce", "siglip")
    for sizes, keyed, text_trains in [
        ("even", False, True),
        ("even", True, True),
        ("even", False, False),
        ("uneven", False, True),
        ("uneven", True, True),
    ]
]


def told(function):
    """The message of the WlsupError that ``function`` raises, and the seconds it took."""
    began = time.monotonic()
    try:
        function()
    except WlsupError as refusal:
        return str(refusal), time.monotonic() - began
    return "", time.monotonic() - began


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = {}
    images, texts = inputs()
    for case in CASES:
        loss, sizes, keyed, text_trains = case
        split = (EVEN if sizes == "even" else UNEVEN)[world]
        rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
        model = DistributedDataParallel(Towers(loss, text_trains))
        results[case] = step(model, (images[rows], texts[rows]), KEYS[rows] if keyed else None)

    b = PAIRS // world
    rows = slice(rank * b, (rank + 1) * b)
    scale, image, text = torch.tensor(CLIP_LOGIT_SCALE), images[rows], texts[rows]
    results["alone"] = info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, gather=False)

    same = ["one picture"] * b
    results["no negatives"] = info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, keys=same)

    # Half of the ranks in a group of their own.
    groups = [dist.new_group(list(range(world // 2))), dist.new_group(list(range(world // 2, world)))]
    half = groups[rank >= world // 2]
    results["group"] = info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, group=half)
    if world == 4:
        other = groups[rank < world // 2]
        results["outsider"] = told(lambda: info_nce(image, text, scale, group=other))

    # Each disagreement ends in an error on every rank, at once.
    wider = (lambda x: x) if rank else (lambda x: torch.cat([x, x], dim=1))
    results["width"] = told(lambda: info_nce(wider(image), wider(text), scale))
    cast = torch.float32 if rank else torch.bfloat16
    results["dtype"] = told(lambda: info_nce(image.to(cast), text.to(cast), scale))
    results["keys"] = told(lambda: info_nce(image, text, scale, keys=KEYS[rows] if rank else None))
    results["loss"] = told(
        lambda: info_nce(image, text, scale) if rank else siglip(image, text, scale, torch.tensor(SIGLIP_LOGIT_BIAS))
    )
    results["own"] = told(lambda: info_nce(image, text if rank else text[:-1], scale))
    results["nothing"] = told(lambda: info_nce(image[:0], text[:0], scale))
    results["met"] = meet(image, wishes=[rank == 1, False])[1]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, in_processes):
    @cache
    def of(world):
        folder = tmp_path_factory.mktemp(f"world-{world}")
        in_processes(work, world, folder, TIMEOUT)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return of


worlds = pytest.mark.parametrize("world", [2, 4])


@worlds
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_ranks_give_one_processs_loss_and_averaged_gradients(results, world, case):
    loss, _, keyed, text_trains = case
    expected = step(Towers(loss, text_trains), inputs(), KEYS if keyed else None)
    for rank in results(world):
        assert rank[case].keys() == expected.keys()
        for name, value in expected.items():
            worst = (rank[case][name] - value).abs().max() / value.abs().max()
            assert worst <= 5e-6, f"{name}: {worst:.1e}"


@worlds
def test_gather_false_keeps_to_the_ranks_own_pairs(results, world):
    images, texts = (F.normalize(x, dim=1) for x in inputs())
    b = PAIRS // world
    for rank, result in enumerate(results(world)):
        rows = slice(rank * b, (rank + 1) * b)
        own = info_nce(images[rows], texts[rows], torch.tensor(CLIP_LOGIT_SCALE))
        torch.testing.assert_close(result["alone"], own)


@worlds
def test_captions_of_one_image_on_all_ranks_leave_nothing_to_learn(results, world):
    assert all(float(result["no negatives"]) == 0 for result in results(world))


@worlds
def test_a_group_gathers_over_its_members_only(results, world):
    images, texts = (F.normalize(x, dim=1) for x in inputs())
    for rank, result in enumerate(results(world)):
        rows = slice(0, PAIRS // 2) if rank < world // 2 else slice(PAIRS // 2, PAIRS)
        torch.testing.assert_close(result["group"], info_nce(images[rows], texts[rows], torch.tensor(CLIP_LOGIT_SCALE)))
        if world == 4:
            assert "not in the process group" in result["outsider"][0]


@worlds
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("width", "disagree on the row width"),
        ("dtype", "disagree on the dtype.*bfloat16"),
        ("keys", "disagree on the use of keys"),
        ("loss", "disagree on the loss"),
        ("nothing", "empty batch on every rank"),
    ],
)
def test_a_disagreement_is_an_error_on_every_rank_and_no_hang(results, world, what, says):
    for result in results(world):
        message, seconds = result[what]
        assert re.search(says, message), message
        assert seconds < 30


@worlds
def test_one_ranks_wrong_input_stops_all_ranks(results, world):
    first, *others = (result["own"] for result in results(world))
    assert "embeddings of one shape" in first[0]
    for message, seconds in others:
        assert "Rank(s) [0]" in message
        assert seconds < 30


@worlds
def test_a_wish_of_one_rank_is_granted_to_all(results, world):
    assert all(result["met"] == (True, False) for result in results(world))


def test_a_single_process_meets_itself():
    x = torch.ones(3, 2)
    assert meet(x)[0].sizes == (3,)
