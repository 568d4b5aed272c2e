from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from torch_emc2.evaluation import knn, knn_accuracy, nearest_neighbours


def problem(seed, n=60, q=25, d=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator),
        torch.randint(classes, (n,), generator=generator),
        torch.randn(q, d, generator=generator),
        torch.randint(classes, (q,), generator=generator),
    )


def vote(labels):
    """The most frequent label; of equally frequent ones the one met first."""
    counts = Counter(labels)
    return next(label for label in labels if counts[label] == max(counts.values()))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 3, 15])
def test_two_classes_and_odd_k_agree_with_scikit_learn(metric, k):
    train_x, train_y, test_x, test_y = problem(0, n=300, q=100, classes=2)
    reference = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(train_x, train_y)
    expected = reference.score(test_x, test_y)
    assert knn_accuracy(train_x, train_y, test_x, test_y, (k,), metric) == {k: pytest.approx(expected, abs=1e-12)}


@given(seed=st.integers(0, 2**31), ks=st.lists(st.integers(1, 20), min_size=1, max_size=3), chunk=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_vote_against_brute_force(seed, ks, chunk):
    train_x, train_y, test_x, test_y = problem(seed, n=20)
    distances = np.linalg.norm(test_x.double().numpy()[:, None] - train_x.double().numpy()[None], axis=2)
    ranked = train_y.numpy()[distances.argsort(axis=1)]
    expected = {
        k: np.mean([vote(row[:k].tolist()) == y for row, y in zip(ranked, test_y.tolist(), strict=True)]) for k in ks
    }
    assert knn_accuracy(train_x, train_y, test_x, test_y, ks, chunk_size=chunk) == pytest.approx(expected)


def test_nearest_of_the_tied_classes_wins():
    train_x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    train_y = torch.tensor([2, 1, 0, 0, 1])  # by distance from 0; k=4: 0 leads; k=2, 3, 5: ties (2 v 1; all; 1 v 0)
    query = torch.zeros(1, 1)
    winners = {
        k: next(c for c in range(3) if knn_accuracy(train_x, train_y, query, torch.tensor([c]), (k,))[k])
        for k in range(1, 6)
    }
    assert winners == {1: 2, 2: 2, 3: 2, 4: 0, 5: 1}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("chunk_size", [1, 7, 25])
def test_chunks_change_nothing(metric, chunk_size):
    train_x, _, test_x, _ = problem(1)
    whole = nearest_neighbours(train_x, test_x, 9, metric)
    chunked = nearest_neighbours(train_x, test_x, 9, metric, chunk_size=chunk_size)
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=0, atol=1e-12)


def test_distances_are_those_of_their_definition():
    train_x, _, test_x, _ = problem(2)
    indices, distances = nearest_neighbours(train_x, test_x, 60)
    expected = (test_x.double()[:, None] - train_x.double()[indices]).norm(dim=2)
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=1e-12)
    assert (distances.diff(dim=1) >= 0).all()
    indices, distances = nearest_neighbours(train_x, test_x, 60, "cosine")
    cosine = torch.nn.functional.cosine_similarity(test_x.double()[:, None], train_x.double()[indices], dim=2)
    torch.testing.assert_close(distances, 1 - cosine, rtol=1e-12, atol=1e-12)
    assert indices.sort(dim=1).values.equal(torch.arange(60).expand(25, 60))


def test_features_far_from_the_origin_keep_their_order():
    """At 1e4 from the origin float32 squares have a step of 8, far more than the distances here."""
    train_x, _, test_x, _ = problem(3)
    train_x, test_x = train_x + 1e4, test_x + 1e4
    indices, _ = nearest_neighbours(train_x, test_x, 10)
    exact = torch.cdist(test_x.double(), train_x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(indices, exact.argsort(dim=1)[:, :10])
    found, distances = nearest_neighbours(train_x, train_x, 1)
    assert torch.equal(found[:, 0], torch.arange(60))
    assert distances.max() < 1e-6


def test_distances_far_from_the_origin_do_not_cancel():
    """At 1e8 from the origin the squares of float64 have a step of 2, as large as the squared distances here."""
    train_x, _, test_x, _ = problem(3)
    train_x, test_x = train_x.double() + 1e8, test_x.double() + 1e8
    indices, distances = nearest_neighbours(train_x, test_x, 60)
    exact = torch.cdist(test_x, train_x, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1)
    assert torch.equal(indices, exact.indices)
    torch.testing.assert_close(distances, exact.values, rtol=0, atol=1e-6)


def clusters(seed, n=400, q=60, d=8, apart=1e4):
    """Two clusters whose rows float32 cannot tell apart about their common mean."""
    train_x, _, test_x, _ = problem(seed, n, q, d)
    shift = torch.full((d,), float(apart))
    return tuple(torch.cat([x[: len(x) // 2] + shift, x[len(x) // 2 :] - shift]) for x in (train_x, test_x))


def float64_neighbours(train_x, query_x, k, metric):
    train, query = train_x.double(), query_x.double()
    if metric == "cosine":
        distances = 1 - torch.nn.functional.cosine_similarity(query[:, None], train, dim=2)
    else:
        distances = torch.cdist(query, train, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sort(dim=1, stable=True).indices[:, :k]


@pytest.fixture
def searches(monkeypatch):
    """(type of the products, queries) of every search."""
    made, search = [], knn._search

    def counted(train_x, query_x, k, metric, dtype, chunk_size):
        made.append((dtype, len(query_x)))
        return search(train_x, query_x, k, metric, dtype, chunk_size)

    monkeypatch.setattr(knn, "_search", counted)
    return made


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float32_is_enough_where_it_tells_rows_apart(metric, searches):
    train_x, _, test_x, _ = problem(9, n=2000, q=50, d=64)
    indices, _ = nearest_neighbours(train_x, test_x, 20, metric)
    assert torch.equal(indices, float64_neighbours(train_x, test_x, 20, metric))
    assert searches == [(torch.float32, 50)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_what_float32_cannot_tell_apart_is_searched_for_in_float64(metric, searches):
    train_x, test_x = clusters(10)
    indices, _ = nearest_neighbours(train_x, test_x, 5, metric)
    assert torch.equal(indices, float64_neighbours(train_x, test_x, 5, metric))
    assert searches == [(torch.float32, 60), (torch.float64, 60)]


def test_only_the_queries_that_need_float64_take_its_time(searches):
    train_x, _, test_x, _ = problem(11, n=400, q=40)
    train_x[:100] = 0.125 * train_x[0]  # more than all candidates are as near
    test_x[3] = test_x[31] = 0.125 * train_x[0] + 1e-3
    indices, distances = nearest_neighbours(train_x, test_x, 5)
    exact = torch.cdist(test_x.double(), train_x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances, exact.sort(dim=1).values[:, :5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.gather(1, indices), distances, rtol=1e-12, atol=1e-12)
    (first, queries), (second, again) = searches
    assert (first, queries, second) == (torch.float32, 40, torch.float64)
    assert 2 <= again < 20


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 12),
    metric=st.sampled_from(["euclidean", "cosine"]),
    apart=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-30, 1e-20, 1e-3, 1.0, 1e3, 1e25]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_distances_are_those_of_a_search_in_float64(seed, k, metric, apart, scale, dtype):
    train_x, test_x = (x.to(dtype) * scale for x in clusters(seed, n=150, q=12, d=4, apart=apart))
    _, distances = nearest_neighbours(train_x, test_x, k, metric)
    train, test = train_x.double(), test_x.double()
    if metric == "cosine":
        exact = 1 - torch.nn.functional.cosine_similarity(test[:, None], train, dim=2, eps=1e-300)
    else:
        exact = torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.sort(dim=1).values[:, :k]
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-12 if metric == "cosine" else 0)


@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.int64), (torch.int64, torch.float64), (torch.float64, torch.int64)]
)
def test_whole_numbers_that_float32_has_not_are_told_apart(dtypes):
    generator = torch.Generator().manual_seed(14)
    rows = torch.randint(-50, 50, (330, 6), generator=generator) + 10**9
    train_x, test_x = rows[:300].to(dtypes[0]), rows[300:].to(dtypes[1])
    _, distances = nearest_neighbours(train_x, test_x, 5)
    exact = (rows[300:, None] - rows[:300]).double().norm(dim=2).sort(dim=1).values[:, :5]
    torch.testing.assert_close(distances, exact, rtol=1e-12, atol=0)


def test_products_of_less_precision_than_float32_are_not_taken(searches):
    train_x, _, test_x, _ = problem(12, n=300)
    with torch.autocast("cpu", torch.bfloat16):
        indices, _ = nearest_neighbours(train_x, test_x, 5)
    torch.set_float32_matmul_precision("medium")
    try:
        again, _ = nearest_neighbours(train_x, test_x, 5)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(indices, float64_neighbours(train_x, test_x, 5, "euclidean"))
    assert torch.equal(indices, again)
    assert [dtype for dtype, _ in searches] == [torch.float64] * 2


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_distance_is_kept_of_all_pairs(metric):
    train_x, _, test_x, _ = problem(13, n=3000, q=1000, d=16)
    with Largest() as largest:
        nearest_neighbours(train_x, test_x, 1, metric, chunk_size=50)
    assert largest.bytes == 50 * 3000 * 4


def test_a_missing_label_is_refused_in_either_part():
    train_x, train_y, test_x, test_y = problem(4)
    for labels in ((train_y.index_fill(0, torch.tensor([5]), -1), test_y), (train_y, test_y - test_y.max() - 1)):
        with pytest.raises(ValueError, match="minimum -"):
            knn_accuracy(train_x, labels[0], test_x, labels[1], (1,))


def test_impossible_k_names_the_values():
    train_x, train_y, test_x, test_y = problem(4)
    with pytest.raises(ValueError, match=r"k=61 of ks=\(1, 61\) with 60 training rows"):
        knn_accuracy(train_x, train_y, test_x, test_y, (1, 61))
    with pytest.raises(ValueError, match="k=0 neighbours of 60"):
        nearest_neighbours(train_x, test_x, 0)


def test_wrong_input_is_named():
    train_x, train_y, test_x, test_y = problem(5)
    broken = test_x.clone()
    broken[7, 2] = torch.nan
    with pytest.raises(ValueError, match="test features are not finite in row 7"):
        knn_accuracy(train_x, train_y, broken, test_y, (1,))
    with pytest.raises(ValueError, match="widths 5 and 4"):
        nearest_neighbours(train_x, test_x[:, :4], 1)
    with pytest.raises(ValueError, match=r"shape \(60,\); give a matrix"):
        nearest_neighbours(train_x[:, 0], test_x, 1)
    with pytest.raises(ValueError, match=r"labels have shape \(59,\) for features \(60, 5\)"):
        knn_accuracy(train_x, train_y[1:], test_x, test_y)
    with pytest.raises(ValueError, match="minimum -1"):
        knn_accuracy(train_x, torch.full_like(train_y, -1), test_x, test_y)
    with pytest.raises(ValueError, match=r"integers from 0, got torch\.float32"):
        knn_accuracy(train_x, train_y.float(), test_x, test_y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_any_integers_are_class_numbers(dtype):
    train_x, train_y, test_x, test_y = problem(6)
    expected = knn_accuracy(train_x, train_y, test_x, test_y, (1, 5))
    assert knn_accuracy(train_x, train_y.to(dtype), test_x, test_y.to(dtype), (1, 5)) == expected
    assert knn_accuracy(train_x, train_y, test_x, test_y.to(dtype), (1, 5)) == expected


def test_numbers_of_classes_may_be_large_and_have_gaps():
    train_x, train_y, test_x, test_y = problem(7)
    far = [y * 10**17 + 5 for y in (train_y, test_y)]
    expected = knn_accuracy(train_x, train_y, test_x, test_y, (1, 5))
    assert knn_accuracy(train_x, far[0], test_x, far[1], (1, 5)) == expected


def test_one_class_is_found_where_it_is():
    train_x, train_y, test_x, test_y = problem(8)
    share = (test_y == 2).double().mean().item()
    assert knn_accuracy(train_x, torch.full_like(train_y, 2), test_x, test_y, (1, 60)) == {1: share, 60: share}
