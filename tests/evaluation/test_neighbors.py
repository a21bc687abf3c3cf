"""Nearest neighbours: exact, the same on both backends, whatever the precision settings."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from wlsup.evaluation import neighbors
from wlsup.evaluation.neighbors import nearest_neighbors, normalize_


def unit(n: int, width: int, seed: int) -> torch.Tensor:
    return normalize_(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


def search(bank, queries, ks, **options):
    parts = list(nearest_neighbors(bank, queries, ks, **options))
    return torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def exact(bank, queries, k):
    similarities, order = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], order[:, :k]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize(
    ("n", "k"), [(21, 21), (100, 1), (1000, 20), (8192, 20), (20_000, 20), (20_000, 200), (16_421, 37)]
)
def test_neighbours_are_those_of_a_full_sort_in_fp64(backend, n, k):
    bank, queries = unit(n, 24, 0), unit(150, 24, 1)
    similarities, indices = search(bank, queries, [k], search=backend)
    expected_similarities, expected = exact(bank, queries, k)
    assert [set(row) for row in indices.tolist()] == [set(row) for row in expected.tolist()]
    assert (similarities - expected_similarities).abs().max() < 1e-6
    assert (similarities[:, :-1] >= similarities[:, 1:]).all()


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbours_that_fp32_cannot_tell_apart_are_told_apart(backend):
    # 400 bank rows whose similarities lie about 1e-8 apart: below fp32's rounding of the product.
    generator = torch.Generator().manual_seed(0)
    query = unit(1, 512, 3)
    side = torch.randn(400, 512, generator=generator, dtype=torch.float64)
    side -= (side @ query.double().T) * query.double()
    side /= side.norm(dim=1, keepdim=True)
    angle = 0.5 + torch.rand(400, 1, generator=generator, dtype=torch.float64) * 8e-6
    bank = (angle.cos() * query.double() + angle.sin() * side).float()
    _, indices = search(bank, query, [20], search=backend)
    _, expected = exact(bank, query, 20)
    assert set(indices[0].tolist()) == set(expected[0].tolist())
    naive = (query @ bank.T).topk(20).indices[0].tolist()
    assert set(naive) != set(expected[0].tolist()), "the case is not hard enough to show anything"


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_equal_similarities_go_to_the_lower_index_at_every_k(backend):
    bank = unit(300, 16, 0)[torch.arange(3000) % 300]  # each row ten times
    queries = unit(40, 16, 1)
    _, indices = search(bank, queries, [3, 15, 25], search=backend)
    _, expected = exact(bank, queries, 25)
    for k in (3, 15, 25):
        assert [set(row) for row in indices[:, :k].tolist()] == [set(row) for row in expected[:, :k].tolist()]


def test_without_faiss_torch_answers(monkeypatch):
    bank, queries = unit(9000, 16, 0), unit(50, 16, 1)
    _, with_faiss = search(bank, queries, [20], search="faiss")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find_spec(name))
    monkeypatch.setattr(neighbors, "_search_faiss", None)
    _, without = search(bank, queries, [20])
    assert torch.equal(with_faiss.sort(1).values, without.sort(1).values)
    with pytest.raises(neighbors.WlsupError, match="faiss-cpu, which is not installed"):
        search(bank, queries, [20], search="faiss")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_neighbours_on_the_gpu_are_those_on_the_cpu():
    bank, queries = unit(70_000, 64, 0), unit(500, 64, 1)
    _, on_cpu = search(bank, queries, [20])
    _, on_gpu = search(bank, queries, [20], device="cuda")
    assert torch.equal(on_cpu.sort(1).values, on_gpu.sort(1).values)


def test_reduced_precision_asked_for_in_training_does_not_reach_the_search():
    bank, queries = unit(3000, 256, 0), unit(300, 256, 1)
    before, _ = search(bank, queries, [20], search="torch")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            during, _ = search(bank, queries, [20], search="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(before, during)


def test_precision_set_by_either_of_torchs_interfaces_is_full_in_the_search_and_put_back(monkeypatch):
    matmul = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older interface only")
    seen = []
    inner = neighbors._search_torch
    monkeypatch.setattr(neighbors, "_search_torch", lambda *given: seen.append(matmul.fp32_precision) or inner(*given))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        search(unit(300, 16, 0), unit(5, 16, 1), [5], search="torch")
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert seen == ["ieee"]


def test_faiss_takes_torchs_number_of_threads_and_gives_its_own_back():
    faiss = pytest.importorskip("faiss")
    bank, queries = unit(300, 16, 0), unit(5, 16, 1)
    threads = faiss.omp_get_max_threads()
    used = []
    knn = faiss.knn
    faiss.knn = lambda *a, **k: used.append(faiss.omp_get_max_threads()) or knn(*a, **k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        search(bank, queries, [5], search="faiss")
    finally:
        torch.set_num_threads(before)
        faiss.knn = knn
    assert used == [1]
    assert faiss.omp_get_max_threads() == threads


def test_normalising_happens_in_place_and_leaves_zero_rows():
    rows = torch.randn(10_000, 4) * 100
    rows[17] = 0
    result = normalize_(rows)
    assert result is rows
    lengths = rows.norm(dim=1)
    assert lengths[17] == 0
    assert torch.allclose(lengths[torch.arange(10_000) != 17], torch.ones(9999), atol=1e-6)
