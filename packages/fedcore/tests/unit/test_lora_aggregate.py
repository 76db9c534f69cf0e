"""Aggregation of factors of unequal ranks: exact, the same by both paths, no better than the best of its rank."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from fedcore.lora import RankError, aggregate_concat_qr, pad_columns, pad_rows, residual_factors
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("qr", "qr_pivoted", "svd")
sizes = st.integers(3, 11)
worlds = {
    "seed": st.integers(0, 99),
    "d": sizes,
    "k": sizes,
    "ranks": st.lists(st.integers(1, 3), min_size=1, max_size=3),
}
few = settings(max_examples=20, deadline=None)


def normal(seed, *shape, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def draw(seed, d, k, ranks):
    factors = [(normal(seed + i, r, k), normal(seed + 50 + i, d, r)) for i, r in enumerate(ranks)]
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(ranks)))
    return factors, [float(p) for p in shares]


def total(factors, weights):
    return sum(p * b @ a for (a, b), p in zip(factors, weights, strict=True))


def product(pair):
    return pair[1] @ pair[0]


def error(pair, delta):
    return float(torch.linalg.norm(product(pair) - delta))


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@few
@given(**worlds)
def test_concatenated_factors_are_the_sum(seed, d, k, ranks):
    factors, p = draw(seed, d, k, ranks)
    a, b = residual_factors(factors, p)
    assert (a.shape, b.shape) == ((sum(ranks), k), (d, sum(ranks)))
    close(b @ a, total(factors, p))


@few
@given(name=st.sampled_from(NAMES), **worlds)
def test_thin_is_dense(seed, d, k, ranks, name):
    factors, p = draw(seed, d, k, ranks)
    most = min(d, k, sum(ranks))
    targets = list(range(1, most + 1))
    thin = aggregate_concat_qr(factors, p, targets, name)
    dense = aggregate_concat_qr(factors, p, targets, name, thin=False)
    for one, other in zip(thin, dense, strict=True):
        close(one[0], other[0], 1e-8)
        close(one[1], other[1], 1e-8)


@few
@given(name=st.sampled_from(NAMES), thin=st.booleans(), **worlds)
def test_exact_from_the_total_rank_on(seed, d, k, ranks, name, thin):
    factors, p = draw(seed, d, k, ranks)
    least, most = min(d, k, sum(ranks)), min(d, k)
    for pair in aggregate_concat_qr(factors, p, [least, most], name, thin):
        assert error(pair, total(factors, p)) < 1e-9


@few
@given(**worlds)
def test_qr_keeps_the_first_columns_and_is_no_better_than_svd(seed, d, k, ranks):
    factors, p = draw(seed, d, k, ranks)
    delta = total(factors, p)
    targets = list(range(1, min(d, k, sum(ranks)) + 1))
    found = {name: aggregate_concat_qr(factors, p, targets, name) for name in NAMES}
    for i, rank in enumerate(targets):
        close(product(found["qr"][i])[:, :rank], delta[:, :rank])
        for name in ("qr", "qr_pivoted"):
            a, b = found[name][i]
            close(b.T @ b, torch.eye(rank, dtype=b.dtype))
            close(a, b.T @ delta)  # a projection of the sum
            assert error((a, b), delta) >= error(found["svd"][i], delta) - 1e-9
    for name in NAMES:
        errors = [error(pair, delta) for pair in found[name]]
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))


@few
@given(**worlds)
def test_svd_is_the_best_of_its_rank_and_balanced(seed, d, k, ranks):
    factors, p = draw(seed, d, k, ranks)
    delta, rank = total(factors, p), min(d, k, sum(ranks), 2)
    ((a, b),) = aggregate_concat_qr(factors, p, [rank], "svd")
    values = torch.linalg.svdvals(delta)
    assert math.isclose(error((a, b), delta), float(values[rank:].square().sum().sqrt()), rel_tol=1e-6, abs_tol=1e-9)
    close(a @ a.T, values[:rank].diag(), 1e-8)
    close(b.T @ b, values[:rank].diag(), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_pivots_are_the_largest_columns(name):
    factors, p = draw(1, 12, 10, [3, 3])
    delta = total(factors, p)
    (pair,) = aggregate_concat_qr(factors, p, [1], name)
    largest = int(delta.square().sum(dim=0).argmax())
    kept = float(torch.linalg.norm((product(pair) - delta)[:, largest])) < 1e-9
    assert kept == (name == "qr_pivoted")


@few
@given(name=st.sampled_from(NAMES), order=st.permutations([0, 1, 2]), seed=st.integers(0, 99))
def test_order_of_the_clients_does_not_matter(seed, name, order):
    factors, p = draw(seed, 10, 8, [1, 2, 3])
    first = aggregate_concat_qr(factors, p, [1, 2, 3], name)
    again = aggregate_concat_qr([factors[i] for i in order], [p[i] for i in order], [1, 2, 3], name)
    for one, other in zip(first, again, strict=True):
        close(product(one), product(other), 1e-8)


@few
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 99), flips=st.lists(st.booleans(), min_size=6, max_size=6))
def test_signs_of_uploaded_pairs_do_not_matter(seed, name, flips):
    factors, p = draw(seed, 10, 8, [1, 2, 3])
    sign = torch.tensor([-1.0 if flip else 1.0 for flip in flips], dtype=torch.float64).split([1, 2, 3])
    turned = [(a * s.unsqueeze(1), b * s) for (a, b), s in zip(factors, sign, strict=True)]
    first, again = (aggregate_concat_qr(f, p, [1, 2, 3], name) for f in (factors, turned))
    for one, other in zip(first, again, strict=True):
        close(one[0], other[0], 1e-8)  # signs of what is returned are canonical
        close(one[1], other[1], 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_one_client_is_left_as_it_is(name):
    factors, _ = draw(2, 9, 7, [3])
    (pair,) = aggregate_concat_qr(factors, [1.0], [3], name)
    close(product(pair), product(factors[0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thin", [True, False])
def test_clients_that_agree_are_left_as_they_are(name, thin):
    (pair,), p = draw(3, 9, 7, [2])[0], [0.5, 0.3, 0.2]
    for rank in (2, 3, 6, 7):
        (found,) = aggregate_concat_qr([pair] * 3, p, [rank], name, thin)
        close(product(found), product(pair))


def test_equals_the_average_of_merged_weights():
    factors, p = draw(4, 9, 7, [1, 2, 2])
    base, s = normal(9, 9, 7), 2.0
    (pair,) = aggregate_concat_qr(factors, p, [5])
    merged = sum(w * (base + s * product(one)) for one, w in zip(factors, p, strict=True))
    close(base + s * product(pair), merged)


@pytest.mark.parametrize("name", NAMES)
def test_smaller_ranks_are_cut_from_larger_ones(name):
    factors, p = draw(5, 12, 9, [2, 2, 3])
    large, small, same = aggregate_concat_qr(factors, p, [6, 2, 6], name)
    assert torch.equal(small[0], large[0][:2])
    assert torch.equal(small[1], large[1][:, :2])
    assert torch.equal(large[0], same[0])
    assert large[0].data_ptr() != same[0].data_ptr()
    assert all(x.is_contiguous() for x in (*small, *large))
    ((alone_a, alone_b),) = aggregate_concat_qr(factors, p, [2], name)
    close(alone_a, small[0])
    close(alone_b, small[1])


@pytest.mark.parametrize("name", NAMES)
def test_directions_beyond_the_sum_can_be_trained(name):
    """Only clients of small rank reported: the larger ranks get zero rows, and columns that a gradient reaches."""
    factors, p = draw(6, 9, 7, [1, 1])
    ((a, b),) = aggregate_concat_qr(factors, p, [6], name)
    close(b @ a, total(factors, p))
    close(a[2:], torch.zeros(4, 7, dtype=a.dtype), 1e-12)
    close(b[:, 2:].T @ b, torch.cat([torch.zeros(4, 2), torch.eye(4)], dim=1).to(b), 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thin", [True, False])
def test_a_sum_of_zero(name, thin):
    factors = [(normal(0, 2, 7), torch.zeros(9, 2, dtype=torch.float64))] * 2  # nobody has moved B yet
    ((a, b),) = aggregate_concat_qr(factors, [0.5, 0.5], [3], name, thin)
    assert not a.any()
    close(b.T @ b, torch.eye(3, dtype=b.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_cost_nothing(name):
    """The first columns of every A are zero (inputs that never move): thin stays exact at the total rank."""
    factors, p = draw(7, 12, 9, [2, 2])
    for a, _ in factors:
        a[:, :3] = 0
    (pair,) = aggregate_concat_qr(factors, p, [4], name)
    assert error(pair, total(factors, p)) < 1e-9


def test_number_formats():
    factors, p = draw(8, 40, 30, [2, 4])
    (exact,) = aggregate_concat_qr(factors, p, [6])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cast = [(a.to(dtype), b.to(dtype)) for a, b in factors]
        ((a, b),) = aggregate_concat_qr(cast, p, [6])
        assert a.dtype == b.dtype == dtype
        assert error((a.double(), b.double()), product(exact)) < tolerance * torch.linalg.norm(product(exact))


def test_weights_are_taken_as_they_are():
    factors, _ = draw(9, 8, 6, [1, 2])
    (pair,) = aggregate_concat_qr(factors, [2.0, -0.5], [3])
    close(product(pair), 2 * product(factors[0]) - 0.5 * product(factors[1]))


def test_arguments_stay_as_they_are():
    factors, p = draw(10, 8, 6, [1, 2])
    before = [(a.clone(), b.clone()) for a, b in factors]
    for name in NAMES:
        for pair in aggregate_concat_qr(factors, p, [1, 3], name):
            pair[0].zero_()
            pair[1].zero_()
    for one, other in zip(factors, before, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert aggregate_concat_qr(factors, p, []) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, p: (f, p[:1]), "2 pairs of factors and 1 weights"),
        (lambda f, p: ([], []), "0 pairs"),
        (lambda f, p: ([f[0], (f[1][0][:1], f[1][1])], p), r"factors 1 have the shapes \(1, 6\) and \(8, 2\)"),
        (lambda f, p: ([f[0], (f[1][0][:, :5], f[1][1])], p), "factors 1 are of another layer: 8x5"),
        (lambda f, p: ([f[0], (f[1][0] * math.nan, f[1][1])], p), r"factors \[1\] .* not finite"),
        (lambda f, p: ([f[0], (f[1][0], f[1][1] / 0)], p), r"factors \[1\] .* not finite"),
        (lambda f, p: (f, [0.5, math.nan]), "not finite"),
    ],
)
def test_uploads_that_do_not_fit(change, words):
    factors, weights = change(*draw(11, 8, 6, [1, 2]))
    with pytest.raises(ValueError, match=words):
        aggregate_concat_qr(factors, weights, [1])


def test_ranks_and_names_out_of_range():
    factors, p = draw(12, 8, 6, [1, 2])
    for rank in (0, 7):
        with pytest.raises(RankError, match=f"rank {rank} with a weight of 8x6; expected 1 <= rank <= 6"):
            aggregate_concat_qr(factors, p, [2, rank])
    with pytest.raises(ValueError, match="decomposition='lu'; expected one of qr, qr_pivoted, svd"):
        aggregate_concat_qr(factors, p, [1], "lu")


def test_padding_and_cutting():
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
    assert torch.equal(pad_rows(a, 1), a[:1])
    assert torch.equal(pad_rows(a, 2), a)
    assert torch.equal(pad_rows(a, 3), torch.cat([a, torch.zeros(1, 3)]))
    assert torch.equal(pad_columns(b, 1), b[:, :1])
    assert torch.equal(pad_columns(b, 4), torch.cat([b, torch.zeros(4, 2)], dim=1))
    assert torch.equal(pad_columns(pad_columns(b, 5), 2), b)


@pytest.mark.parametrize("name", NAMES)
def test_the_thin_path_never_makes_the_whole_matrix(name):
    """A layer whose d x k matrix would take 40 GB."""
    d = k = 100_000
    factors = [(normal(i, 2, k, dtype=torch.float32), normal(9 + i, d, 2, dtype=torch.float32)) for i in range(2)]
    began = time.perf_counter()
    ((a, b),) = aggregate_concat_qr(factors, [0.5, 0.5], [4], name)
    assert time.perf_counter() - began < 20
    rows, columns = slice(0, 20), slice(0, 30)
    expected = sum(0.5 * y[rows] @ x[:, columns] for x, y in factors)
    close(b[rows] @ a[:, columns], expected, 1e-3)
