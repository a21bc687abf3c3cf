import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.moe import MLPExpert, MoE, MoESpec, TokenIds, token_frequencies
from wlsup.moe.hashing import balanced_table, random_table

V, E, D = 200, 8, 16


def layer(seed=0, **options):
    torch.manual_seed(5)
    return MoE(
        [MLPExpert(D, 8) for _ in range(E)], D, MoESpec(experts=E, router="hash", hash_seed=seed, **options), True, V
    )


def test_the_random_table_spreads_ids_and_gives_each_different_experts():
    table = random_table(4000, E, k=3)
    assert (table.sort(1).values.diff(dim=1) > 0).all()
    load = torch.bincount(table[:, 0], minlength=E) / 4000
    assert (load - 1 / E).abs().max() < 0.03


def test_the_table_depends_on_its_seed_and_on_nothing_else():
    state = torch.get_rng_state()
    first = random_table(V, E)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used or seeded"
    torch.manual_seed(99)
    assert torch.equal(random_table(V, E), first)
    assert not torch.equal(random_table(V, E, seed=1), first)
    frequencies = torch.ones(V)
    balanced = balanced_table(frequencies, E)
    torch.manual_seed(1)
    assert torch.equal(balanced_table(frequencies, E), balanced)
    assert not torch.equal(balanced_table(frequencies, E, seed=1), balanced)


def test_the_balanced_table_gives_experts_equal_occurrences_where_the_random_one_does_not():
    frequencies = 1e5 / torch.arange(1, V + 1)  # Zipf's law
    frequencies[0] = 5e4  # no one word may exceed an expert's share

    def load(table):
        return torch.zeros(E).index_add(0, table[:, 0], frequencies) / frequencies.sum() * E

    assert load(balanced_table(frequencies, E)).max() < 1.02
    assert load(random_table(V, E)).max() > 1.2


def test_the_most_frequent_ids_come_first_each_to_the_emptiest():
    table = balanced_table(torch.tensor([1.0, 5.0, 4.0, 3.0, 2.0]), experts=2)
    # 5 | 4, then 3 to the second (5 | 7), 2 to the first (7 | 7), 1 to either.
    assert table[1] == table[4]
    assert table[2] == table[3]
    assert table[1] != table[2]


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("frequencies", [torch.ones(40), torch.zeros(40), torch.arange(40) % 7 * 1.0])
def test_a_table_is_what_the_rule_says_one_id_after_another(frequencies, experts, k):
    table = balanced_table(frequencies, experts, k, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    load = [[0.0, 0, expert] for expert in range(experts)]
    for token in order[frequencies[order].argsort(descending=True, stable=True)].tolist():
        emptiest = sorted(load)[:k]
        assert table[token].tolist() == [expert for _, _, expert in emptiest]
        for one in emptiest:
            one[0], one[1] = one[0] + float(frequencies[token]), one[1] + 1


def test_ids_that_never_occur_are_spread_too():
    table = balanced_table(torch.zeros(V), E, k=2)
    assert torch.bincount(table.flatten(), minlength=E).tolist() == [V * 2 // E] * E
    assert (table[:, 0] != table[:, 1]).all()


def test_frequencies_count_words_and_a_prefix_a_caption():
    found = token_frequencies([torch.tensor([1, 1, 0]), torch.tensor([2])], TokenIds(vocabulary=4, positions=2))
    assert found.tolist() == [1, 2, 1, 0, 2, 2]


def test_the_table_is_saved_and_a_checkpoint_routes_as_it_was_trained():
    trained, fresh = layer(seed=0), layer(seed=1)
    assert "router.table" in trained.state_dict()
    x, ids = torch.randn(2, 5, D), torch.randint(V, (2, 5))
    assert not torch.equal(fresh(x, ids), trained(x, ids))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x, ids), trained(x, ids))


@pytest.mark.parametrize("k", [1, 3])
def test_each_token_is_the_mean_of_its_tables_experts(k):
    moe = layer(k=k)
    x, ids = torch.randn(2, 5, D), torch.randint(V, (2, 5))
    expected = torch.stack(
        [
            torch.stack([sum(moe.experts[e](x[b, t]) for e in moe.router.table[ids[b, t]].tolist()) for t in range(5)])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(moe(x, ids), expected / k)
    assert moe.auxiliary_losses() == {}
    assert not list(moe.router.parameters())


def test_capacity_drops_hashed_tokens_too():
    moe = layer(capacity_factor=1.0)
    output = moe(torch.randn(1, 16, D), torch.zeros(1, 16, dtype=torch.int64))
    assert (output[0] != 0).any(-1).tolist() == [True] * 2 + [False] * 14
    assert moe.routing.dropped == pytest.approx(14 / 16)


@pytest.mark.parametrize(
    ("options", "vocabulary", "frequencies", "says"),
    [
        ({}, None, None, "how many token ids there are"),
        ({"hash": "balanced"}, V, None, "given: none"),
        ({"hash": "balanced"}, V, torch.ones(V - 1), r"given: \(199,\)"),
        ({"hash": "balanced"}, V, -torch.ones(V), "numbers >= 0"),
    ],
)
def test_what_is_missing_is_one_clear_error(options, vocabulary, frequencies, says):
    with pytest.raises(WlsupError, match=says):
        MoE(
            [MLPExpert(D, 8) for _ in range(E)],
            D,
            MoESpec(experts=E, router="hash", **options),
            vocabulary=vocabulary,
            frequencies=frequencies,
        )


def test_ids_that_were_not_given_are_asked_for():
    with pytest.raises(WlsupError, match="Hash routing needs the tokens' ids"):
        layer()(torch.randn(2, 5, D))
    with pytest.raises(WlsupError, match=r"ids must be \(2, 5\)"):
        layer()(torch.randn(2, 5, D), torch.zeros(2, 4, dtype=torch.int64))
