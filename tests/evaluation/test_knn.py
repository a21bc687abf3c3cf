"""DINO's weighted k-NN: against the rule in slow motion, scikit-learn, and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.knn import PROTOCOL, knn_accuracy, knn_predict, knn_probabilities
from wlsup.evaluation.neighbors import normalize_

SEARCHES = ["faiss", "torch"]


def clusters(n: int, m: int, width: int = 16, classes: int = 7, noise: float = 0.8, seed: int = 0):
    """Unit features of overlapping classes: bank, bank labels, queries, query labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    parts = []
    for size in (n, m):
        labels = torch.randint(classes, (size,), generator=generator)
        parts += [
            normalize_(centres[labels] + noise * math.sqrt(width) * torch.randn(size, width, generator=generator)),
            labels,
        ]
    return parts


def as_features(rows: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(rows, labels, torch.arange(len(rows)))


def dino_rule(bank, bank_labels, queries, k, temperature, num_classes):
    """Caron et al. 2021, one query and one neighbour at a time, in fp64: nothing shared with the product."""
    predictions = []
    for query in queries.double().tolist():
        scored = []
        for row, label in zip(bank.double().tolist(), bank_labels.tolist(), strict=True):
            scored.append((sum(a * b for a, b in zip(row, query, strict=True)), label))
        scored.sort(key=lambda pair: -pair[0])
        votes = [0.0] * num_classes
        for similarity, label in scored[:k]:
            votes[label] += math.exp(similarity / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_predictions_are_those_of_dinos_rule(search, k):
    bank, bank_labels, queries, _ = clusters(60, 40)
    expected = dino_rule(bank, bank_labels, queries, k, 0.07, 7)
    assert len(set(expected)) > 3
    assert knn_predict(bank, bank_labels, queries, k=k, num_classes=7, search=search).tolist() == expected


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_predictions_are_those_of_scikit_learn(search, temperature):
    bank, bank_labels, queries, _ = clusters(4000, 500, width=48, classes=10)
    ours = knn_predict(bank, bank_labels, queries, k=[10, 20, 200], temperature=temperature, search=search)
    for k, predictions in ours.items():
        peer = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(bank.numpy(), bank_labels.numpy())
        assert predictions.tolist() == peer.predict(queries.numpy()).tolist()


def test_at_infinite_temperature_the_majority_wins_and_the_lowest_class_among_equals():
    bank, bank_labels, queries, _ = clusters(500, 300, classes=5)
    for k in (4, 10):  # even, so that votes do tie
        peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_labels.numpy())
        votes = peer.predict_proba(queries.numpy())
        assert ((votes == votes.max(1, keepdims=True)).sum(1) > 1).any()
        ours = knn_predict(bank, bank_labels, queries, k=k, temperature=math.inf)
        assert ours.tolist() == peer.predict(queries.numpy()).tolist()


def test_several_k_from_one_search_are_those_of_searches_of_their_own():
    bank, bank_labels, queries, _ = clusters(600, 200)
    together = knn_predict(bank, bank_labels, queries, k=[200, 1, 10])
    assert list(together) == [1, 10, 200]
    for k, predictions in together.items():
        assert torch.equal(predictions, knn_predict(bank, bank_labels, queries, k=k))


@pytest.mark.parametrize("search", SEARCHES)
def test_duplicates_in_the_bank_are_settled_by_the_lower_index_and_then_the_lower_class(search):
    direction = normalize_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    bank = direction.repeat(9, 1)
    labels = torch.tensor([2, 2, 1, 1, 1, 0, 0, 0, 0])
    ours = knn_predict(bank, labels, direction, k=[1, 2, 4, 5, 8], search=search)
    assert {k: int(winner) for k, winner in ours.items()} == {1: 2, 2: 2, 4: 1, 5: 1, 8: 0}


@pytest.mark.parametrize("search", SEARCHES)
def test_fewer_than_100_queries_and_a_class_missing_from_them_are_fine(search):
    bank, bank_labels, queries, query_labels = clusters(300, 400, classes=5)
    kept = (query_labels != 3).nonzero().squeeze(1)[:17]
    result = knn_accuracy(
        as_features(bank, bank_labels), as_features(queries[kept], query_labels[kept]), num_classes=5, search=search
    )
    assert result.test == 17
    assert list(result.accuracy) == [10, 20, 100, 200]
    assert torch.equal(result.correct, result.predictions == query_labels[kept])
    assert result.accuracy[20] == result.top1 == result.correct.double().mean().item()


def test_k_above_the_bank_is_left_out_of_the_further_ks_and_refused_as_headline():
    bank, bank_labels, queries, query_labels = clusters(50, 30)
    parts = as_features(bank, bank_labels), as_features(queries, query_labels)
    assert list(knn_accuracy(*parts).accuracy) == [10, 20]
    with pytest.raises(WlsupError, match="k = 51 is more than the bank's 50"):
        knn_accuracy(*parts, k=51)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3])
def test_small_temperatures_neither_overflow_nor_change_the_rule(temperature):
    bank, bank_labels, queries, _ = clusters(400, 100)
    nearest = bank_labels[(queries.double() @ bank.double().T).argmax(1)]
    small = knn_predict(bank, bank_labels, queries, k=20, temperature=temperature)
    assert (small == nearest).float().mean() > 0.97  # the nearest neighbour outvotes all, near-equals aside


def test_votes_survive_similarities_whose_exponential_overflows_half_precision():
    # exp(1 / 0.07) is 1.6e6; in fp16 both classes' votes would be infinite and class 0 would win.
    bank = normalize_(torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 0.0]])).half().float()
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(normalize_(bank), labels, torch.tensor([[1.0, 0.0]]), k=3).item() == 1


def test_many_classes_and_many_queries_take_several_blocks_of_votes_and_of_search():
    bank, bank_labels, queries, _ = clusters(300, 5000, width=8)
    few = knn_predict(bank, bank_labels, queries, k=10, num_classes=7)
    many = knn_predict(bank, bank_labels, queries, k=10, num_classes=20_000)
    seen = []
    torch_search = knn_predict(
        bank, bank_labels, queries, k=10, search="torch", progress=lambda *done: seen.append(done)
    )
    assert torch.equal(few, many)
    assert torch.equal(few, torch_search)
    assert seen == [(4096, 5000), (5000, 5000)]


def test_a_dead_encoder_scores_chance_and_does_not_stop_the_run():
    labels = torch.arange(10).repeat(30)
    for rows in (torch.zeros(300, 8), normalize_(torch.ones(300, 8))):
        result = knn_accuracy(as_features(rows, labels), as_features(rows[:100], labels[:100]))
        assert result.top1 == pytest.approx(0.1)


def test_unseen_classes_of_the_test_set_count_as_wrong():
    bank, bank_labels, queries, query_labels = clusters(100, 40, classes=4)
    result = knn_accuracy(as_features(bank, bank_labels), as_features(queries, query_labels + 4))
    assert result.top1 == 0


def test_features_are_neither_changed_nor_put_into_a_graph():
    bank, bank_labels, queries, _ = clusters(300, 50)
    before = bank.clone(), queries.clone()
    predictions = knn_predict(bank.requires_grad_(), bank_labels, queries, k=10)
    assert not predictions.requires_grad
    assert torch.equal(bank.detach(), before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["bank"].__setitem__((5, 2), math.nan), "Row 5 of the k-NN bank is NaN or infinite"),
        (lambda a: a["queries"].__setitem__((3, 0), math.inf), "Row 3 of the k-NN queries is NaN or infinite"),
        (lambda a: a["bank"].mul_(3), "has length 3, not 1"),
        (lambda a: a.update(k=101), "k = 101 is more than the bank's 100"),
        (lambda a: a.update(k=0), "k must be at least 1"),
        (lambda a: a.update(k=[]), "k must be at least 1"),
        (lambda a: a.update(queries=a["queries"][:0]), "queries is empty"),
        (lambda a: a.update(bank=a["bank"][:0], bank_labels=a["bank_labels"][:0]), "bank is empty"),
        (lambda a: a.update(queries=a["queries"][:, :4]), "width 16 and the queries of width 4"),
        (lambda a: a.update(bank=a["bank"].view(-1)), "floating point matrix"),
        (lambda a: a["bank_labels"].__setitem__(7, -1), "Label -1 of picture 7 of the k-NN bank"),
        (lambda a: a.update(num_classes=2), "must be in 0..1"),
        (lambda a: a.update(bank_labels=a["bank_labels"][:99]), "100 features and 99 labels"),
        (lambda a: a.update(bank_labels=a["bank_labels"].float()), "vector of integers"),
        (lambda a: a.update(temperature=0.0), "temperature must be above 0"),
        (lambda a: a.update(temperature=math.nan), "temperature must be above 0"),
        (lambda a: a.update(search="hnsw"), "Unknown k-NN search 'hnsw'"),
        (lambda a: a.update(search="faiss", device="meta"), "runs on the CPU"),
    ],
)
def test_a_mistake_is_refused_with_what_was_given(change, message):
    bank, bank_labels, queries, _ = clusters(100, 20)
    arguments = {"bank": bank, "bank_labels": bank_labels, "queries": queries, "k": 20}
    change(arguments)
    with pytest.raises(WlsupError, match=message):
        knn_predict(**arguments)


def test_a_query_label_out_of_range_is_refused():
    bank, bank_labels, queries, query_labels = clusters(100, 20)
    query_labels[4] = 9
    with pytest.raises(WlsupError, match="Label 9 of picture 4 of the k-NN queries"):
        knn_accuracy(as_features(bank, bank_labels), as_features(queries, query_labels), num_classes=7)


def test_the_protocol_id_names_every_choice():
    bank, bank_labels, queries, query_labels = clusters(100, 20)
    result = knn_accuracy(as_features(bank, bank_labels), as_features(queries, query_labels), k=5, temperature=0.1)
    assert PROTOCOL == "knn-dino:v1 cosine T=0.07 k=20 weighted"
    assert result.protocol == "knn-dino:v1 cosine T=0.1 k=5 weighted"


def test_shares_of_votes_sum_to_one_and_their_largest_is_the_prediction():
    bank, bank_labels, queries, query_labels = clusters(400, 200)
    parts = as_features(bank, bank_labels), as_features(queries, query_labels)
    shares = knn_probabilities(*parts, num_classes=7, k=15)
    assert torch.allclose(shares.sum(1), torch.ones(200))
    assert torch.equal(shares.argmax(1), knn_predict(bank, bank_labels, queries, k=15, num_classes=7))
    nearest = (queries @ bank.T).topk(15)
    weights = (nearest.values / 0.07).softmax(1)  # of the first query by hand
    expected = [float(weights[0][bank_labels[nearest.indices[0]] == label].sum()) for label in range(7)]
    assert shares[0].tolist() == pytest.approx(expected, abs=1e-4)
