"""Cluster-aware upcycling: the published construction's own numbers, and what it promises of experts and router."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from dense_families import data, make, outputs, relative  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.moe.cluster import ClusterSpec, activations, low_rank, specialise, spherical_k_means  # noqa: E402
from wlsup.moe.sites import sites_of  # noqa: E402
from wlsup.moe.spec import MoESpec  # noqa: E402
from wlsup.moe.upcycle import moe_layers, upcycle  # noqa: E402


def published(weight, inputs, rank):
    """Truncated SVD of W S times the inverse of S, with Cholesky's S of X X^T, as Chu et al. 2026 write it."""
    x = inputs.double()
    root = torch.linalg.cholesky(x.T @ x)
    left, singular, right = torch.linalg.svd(weight.double() @ root)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)


def few_directions(tokens, width, ranks=6):
    """Tokens that mostly lie in a few directions."""
    return torch.randn(tokens, ranks) @ torch.randn(ranks, width) + 0.1 * torch.randn(tokens, width)


class TestLowRank:
    @pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
    def test_it_is_the_published_construction(self, shape):
        weight, inputs = torch.randn(shape), few_directions(300, shape[1])
        given, rank = low_rank(weight, inputs, 0.9)
        assert 0 < rank < min(shape)
        assert relative(given.double(), published(weight, inputs, rank)) < 1e-5

    @pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
    def test_the_rank_is_the_smallest_that_keeps_the_energy(self, shape):
        weight, inputs = torch.randn(shape), few_directions(300, shape[1])
        energies = torch.linalg.svdvals(inputs.double() @ weight.double().T).square()
        shares = energies.cumsum(0) / energies.sum()
        for energy in (0.5, 0.9, 0.99):
            given, rank = low_rank(weight, inputs, energy)
            assert shares[rank - 1] >= energy
            assert rank == 1 or shares[rank - 2] < energy
            assert torch.linalg.matrix_rank(given.double(), rtol=1e-5) == rank
            lost = (inputs @ (given - weight).T).norm().square() / (inputs @ weight.T).norm().square()
            assert float(lost) == pytest.approx(1 - float(shares[rank - 1]), abs=1e-4)

    def test_fewer_tokens_than_channels_are_no_special_case(self):
        weight, inputs = torch.randn(30, 20), torch.randn(5, 20)
        given, rank = low_rank(weight, inputs, 1 - 1e-9)
        assert rank == 5
        assert relative(inputs @ given.T, inputs @ weight.T) < 1e-5

    def test_all_of_the_energy_or_no_token_is_the_weight_itself(self):
        weight = torch.randn(6, 4)
        assert low_rank(weight, torch.randn(9, 4), 1.0)[0] is weight
        assert low_rank(weight, torch.zeros(0, 4), 0.5)[0] is weight
        assert low_rank(weight, torch.zeros(3, 4), 0.5)[0] is weight


class TestSphericalKMeans:
    def test_it_finds_directions_whatever_the_lengths(self):
        axes = F.normalize(torch.randn(4, 16), dim=1)
        truth = torch.arange(4).repeat_interleave(50)
        tokens = (axes[truth] + 0.05 * torch.randn(200, 16)) * torch.rand(200, 1).mul(50).add(0.1)
        centroids, chosen = spherical_k_means(tokens, 4)
        assert (centroids @ axes.T).max(0).values.min() > 0.98
        for cluster in range(4):
            assert len(set(chosen[truth == cluster].tolist())) == 1

    def test_it_is_a_fixed_point(self):
        tokens = torch.randn(500, 12)
        centroids, chosen = spherical_k_means(tokens, 5)
        unit = F.normalize(tokens, dim=1)
        assert torch.equal(chosen, (unit @ centroids.T).argmax(1))
        for cluster in range(5):
            mean = F.normalize(unit[chosen == cluster].sum(0), dim=0)
            assert torch.allclose(mean, centroids[cluster], atol=1e-5)
        assert torch.allclose(centroids.norm(dim=1), torch.ones(5), atol=1e-5)

    def test_the_same_seed_gives_the_same(self):
        tokens = torch.randn(200, 8)
        assert torch.equal(spherical_k_means(tokens, 4, seed=3)[0], spherical_k_means(tokens, 4, seed=3)[0])

    def test_too_few_tokens(self):
        with pytest.raises(WlsupError, match="3 calibration tokens cannot make 4 clusters"):
            spherical_k_means(torch.randn(3, 8), 4)


@pytest.mark.parametrize("family", ["vit", "gpt2", "opt"])
class TestActivations:
    def test_they_are_what_the_mlps_read(self, family):
        model = make(family)
        model.train()
        model_modes = [part.training for part in model.modules()]
        x = data(family)
        batch = x if family == "vit" else (x, torch.ones_like(x))
        found = activations(model, [1], [batch])
        site = sites_of(model)[1]
        seen = []
        entry = next(iter(site.parts.values()))
        hook = entry.register_forward_pre_hook(lambda _, given: seen.append(given[0].reshape(-1, 32)))
        assert [part.training for part in model.modules()] == model_modes
        outputs(model.eval(), family, x)
        hook.remove()
        assert list(found) == [site.name]
        assert torch.allclose(found[site.name], seen[0], atol=1e-6)

    def test_no_more_is_read_than_needed(self, family):
        model, x = make(family), data(family)
        batch = x if family == "vit" else (x, torch.ones_like(x))
        read = []

        def batches():
            for index in range(9):
                read.append(index)
                yield batch

        activations(model, [0, 1], batches(), tokens=60)
        assert read == [0, 1]


def test_padding_is_left_out():
    model, ids = make("gpt2"), data("gpt2")
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = activations(model, [0], [(ids, mask)])["transformer.h.0.mlp"]
    assert len(found) == 12 + 5 + 12


def test_no_data_is_refused():
    with pytest.raises(WlsupError, match="there was none"):
        activations(make("vit"), [0], [])


def clustered(family, energy=0.9, experts=4, **spec):
    model, x = make(family), data(family, batch=12)
    batch = x if family.startswith("vit") else (x, torch.ones_like(x))
    inputs = activations(model, [1], [batch])
    wanted = outputs(model, family, x)
    upcycle(model, [1], MoESpec(experts=experts, **spec), seed=0)
    (layer,) = moe_layers(model).values()
    (rows,) = inputs.values()
    report = specialise(layer, rows, ClusterSpec(energy=energy))
    return model, layer, rows, report, relative(outputs(model, family, x), wanted)


class TestSpecialise:
    @pytest.mark.parametrize("family", ["vit", "gpt2", "opt", "llama"])
    @torch.no_grad()
    def test_the_router_is_the_centroids_and_sends_tokens_to_their_clusters(self, family):
        _, layer, rows, report, _ = clustered(family)
        centroids, chosen = spherical_k_means(rows, 4)
        assert torch.equal(layer.router.weight, centroids)
        assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(4), atol=1e-5)
        layer(rows)
        shares = torch.bincount(chosen, minlength=4) / len(rows)
        assert torch.allclose(layer.routing.load, shares, atol=1e-6)
        assert report.shares == pytest.approx(shares.tolist())

    @pytest.mark.parametrize("family", ["vit", "gpt2", "opt", "llama"])
    @torch.no_grad()
    def test_experts_differ_and_each_is_best_at_its_own_cluster(self, family):
        dense = sites_of(make(family))[1].expert()
        _, layer, rows, _, _ = clustered(family, energy=0.7)
        _, chosen = spherical_k_means(rows, 4)
        wanted = dense(rows)
        errors = torch.tensor(
            [
                [relative(expert(rows[chosen == cluster]), wanted[chosen == cluster]) for cluster in range(4)]
                for expert in layer.experts
            ]
        )
        assert torch.equal(errors.argmin(0), torch.arange(4)), errors

    @torch.no_grad()
    def test_all_of_the_energy_keeps_the_dense_function(self):
        for family in ("vit", "gpt2", "opt", "llama"):
            *_, report, error = clustered(family, energy=1.0)
            assert error <= 1e-5
            assert report.error <= 1e-5

    @torch.no_grad()
    def test_less_energy_costs_more_and_the_report_says_how_much(self):
        errors = [clustered("vit", energy=energy)[3].error for energy in (0.999, 0.99, 0.9, 0.5)]
        assert errors == sorted(errors)
        assert 1e-4 < errors[0] < errors[1] < 0.25
        _, layer, rows, report, _ = clustered("vit", energy=0.99)
        dense = sites_of(make("vit"))[1].mlp()
        assert report.error == pytest.approx(relative(layer(rows), dense(rows)), rel=1e-4)

    @torch.no_grad()
    def test_weights_are_the_projections_of_each_map_and_ranks_are_told(self):
        dense = sites_of(make("llama"))[1].expert()
        _, layer, rows, report, _ = clustered("llama")
        _, chosen = spherical_k_means(rows, 4)
        assert set(report.ranks) == {"gate_proj", "up_proj", "down_proj"}
        for number, expert in enumerate(layer.experts):
            own = rows[chosen == number]
            hidden = F.silu(dense.gate_proj(own)) * dense.up_proj(own)
            for name, read in (("gate_proj", own), ("up_proj", own), ("down_proj", hidden)):
                wanted, rank = low_rank(getattr(dense, name).weight, read, 0.9)
                assert torch.allclose(getattr(expert, name).weight, wanted, atol=1e-5)
                assert report.ranks[name][number] == rank

    @torch.no_grad()
    def test_the_output_map_can_be_left_whole(self):
        model, x = make("vit"), data("vit", 12)
        (rows,) = activations(model, [1], [x]).values()
        dense = sites_of(model)[1].expert()
        (layer,) = upcycle(model, [1], MoESpec(experts=4))
        report = specialise(layer, rows, ClusterSpec(energy=0.9, output=False))
        assert set(report.ranks) == {"fc1"}
        assert all(torch.equal(expert.fc2.weight, dense.fc2.weight) for expert in layer.experts)

    def test_more_tokens_than_asked_for_are_drawn_from(self):
        model, x = make("vit"), data("vit", 12)
        (rows,) = activations(model, [1], [x]).values()
        (layer,) = upcycle(model, [1], MoESpec(experts=4))
        drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:50]]
        specialise(layer, rows, ClusterSpec(tokens=50))
        assert torch.equal(layer.router.weight, spherical_k_means(drawn, 4)[0])


class TestErrors:
    def test_hash_has_no_router_to_set(self):
        model, ids = make("gpt2"), data("gpt2")
        (rows,) = activations(model, [1], [(ids, torch.ones_like(ids))]).values()
        (layer,) = upcycle(model, [1], MoESpec(experts=4, router="hash"))
        with pytest.raises(WlsupError, match="'hash' routing does not have"):
            specialise(layer, rows)

    @pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.1}, {"tokens": 0}])
    def test_values_out_of_range(self, options):
        with pytest.raises(WlsupError, match="energy in"):
            ClusterSpec(**options)
