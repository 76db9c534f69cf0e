"""Where adapters start: the function stays, starts are nested, signs are canonical, ranks are checked."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from fedcore.lora import RankError, kaiming_init, qr_init
from fedcore.lora.init import leading_qr
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

sizes = st.integers(2, 12)
cases = {"seed": st.integers(0, 99), "d": sizes, "k": sizes, "share": st.floats(0, 1)}


def normal(seed, *shape, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def rank_of(d, k, share):
    return 1 + round(share * (min(d, k) - 1))


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(scaling=st.floats(0.1, 16), rms=st.sampled_from([None, 1e-4, 0.5]), **cases)
def test_the_function_is_preserved_in_float32(seed, d, k, share, scaling, rms):
    weight = normal(seed, d, k, dtype=torch.float32)
    base, a, b = qr_init(weight, rank_of(d, k, share), scaling, rms)
    effective = base.double() + scaling * b.double() @ a.double()
    # what is subtracted may be larger than the weight; rounding is a share of that
    size = max(1.0, scaling * float(torch.linalg.norm(b @ a) / torch.linalg.norm(weight)))
    assert torch.linalg.norm(effective - weight) <= 1e-6 * size * torch.linalg.norm(weight)


@settings(max_examples=25, deadline=None)
@given(**cases)
def test_the_plain_split(seed, d, k, share):
    weight, rank = normal(seed, d, k), rank_of(d, k, share)
    _, a, b = qr_init(weight, rank)
    close(b.T @ b, torch.eye(rank, dtype=b.dtype), 1e-12)
    close((b @ a)[:, :rank], weight[:, :rank])
    assert torch.equal(a[:, :rank], a[:, :rank].triu())
    assert (a.diagonal() >= 0).all()


@settings(max_examples=25, deadline=None)
@given(rms=st.sampled_from([1e-4, 0.01, 3.0]), **cases)
def test_the_scaled_split_has_the_size_asked_for(seed, d, k, share, rms):
    weight, rank = normal(seed, d, k), rank_of(d, k, share)
    base, a, b = qr_init(weight, rank, 2.0, rms)
    assert math.isclose(float(torch.linalg.norm(b @ a)), rms * math.sqrt(d * k), rel_tol=1e-9)
    close(base + 2 * b @ a, weight, 1e-12)
    _, plain_a, plain_b = qr_init(weight, rank)
    factor = a.norm() / plain_a.norm()  # both factors take the same share of the scale
    close(a, plain_a * factor)
    close(b, plain_b * factor)


@settings(max_examples=15, deadline=None)
@given(**cases)
def test_starts_are_nested_over_ranks(seed, d, k, share):
    weight, rank = normal(seed, d, k), rank_of(d, k, share)
    _, a, b = qr_init(weight, min(d, k))
    _, small_a, small_b = qr_init(weight, rank)
    close(small_a, a[:rank])
    close(small_b, b[:, :rank])


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("scaling", [0.5, 1.0, 3.0])
def test_full_rank_takes_the_whole_weight(shape, scaling):
    weight = normal(0, *shape)
    base, a, b = qr_init(weight, min(shape), scaling)
    close(b @ a, weight, 1e-12)
    close(base, (1 - scaling) * weight, 1e-12)


def test_it_is_the_leading_part_of_the_whole_factorisation():
    weight = normal(1, 30, 20)
    q, r = torch.linalg.qr(weight)
    sign = r.diagonal().sign()
    left, right = leading_qr(weight, 6)
    close(left, (q * sign)[:, :6])
    close(right, (r * sign.unsqueeze(1))[:6])


def test_signs_do_not_depend_on_those_of_the_factorisation(monkeypatch):
    weight = normal(2, 8, 6)
    expected = qr_init(weight, 4)
    plain = torch.linalg.qr

    def flipped(matrix):
        q, r = plain(matrix)
        sign = torch.tensor([1.0, -1.0] * 9, dtype=q.dtype)[: q.shape[1]]
        return q * sign, r * sign.unsqueeze(1)

    monkeypatch.setattr(torch.linalg, "qr", flipped)
    for one, other in zip(qr_init(weight, 4), expected, strict=True):
        assert torch.equal(one, other)


def test_dependent_columns_leave_b_orthonormal():
    weight = normal(3, 9, 6)
    weight[:, 0] = 0  # an input that is always zero
    weight[:, 2] = 2 * weight[:, 1]
    base, a, b = qr_init(weight, 4, 2.0)
    close(b.T @ b, torch.eye(4, dtype=b.dtype), 1e-12)
    close((b @ a)[:, :4], weight[:, :4])
    close(base + 2 * b @ a, weight, 1e-12)
    base, a, b = qr_init(torch.zeros(5, 4), 2, 2.0, 1e-4)
    assert not a.any()
    assert not base.any()
    close(b.T @ b, torch.eye(2), 1e-6)


def test_half_precision_is_factored_in_float32():
    weight = normal(4, 64, 48, dtype=torch.float32).bfloat16()
    base, a, b = qr_init(weight, 8, 2.0)
    assert {x.dtype for x in (base, a, b)} == {torch.bfloat16}
    effective = base.float() + 2 * b.float() @ a.float()
    # one rounding of the base, which is about as large as the weight; not those of A and B too
    assert torch.linalg.norm(effective - weight.float()) < 2**-8 * torch.linalg.norm(weight.float())
    close(b.float().T @ b.float(), torch.eye(8), 0.01)


def test_bias_of_unequal_ranks_is_small_only_where_the_start_is_scaled():
    """Rank-specific bases: the server's first average is off the base by ``s (delta_max - sum p_k delta_k)``."""
    weight, ranks, p, s = normal(5, 24, 18), (2, 4, 6), (0.2, 0.3, 0.5), 2.0
    target = 1e-4 * math.sqrt(weight.numel())
    off = {}
    for rms in (None, 1e-4):
        starts = {r: qr_init(weight, r, s, rms) for r in ranks}
        average = sum(w * starts[r][2] @ starts[r][1] for r, w in zip(ranks, p, strict=True))
        off[rms] = float(torch.linalg.norm(starts[6][0] + s * average - weight))
    assert off[1e-4] <= s * 2 * target
    assert off[None] > 0.1 * torch.linalg.norm(weight)


@pytest.mark.parametrize(("rank", "shape"), [(0, (4, 5)), (5, (4, 5)), (5, (5, 4)), (-1, (3, 3))])
def test_ranks_out_of_range(rank, shape):
    for call in (lambda: qr_init(torch.ones(shape), rank), lambda: kaiming_init(rank, shape[1], shape[0])):
        with pytest.raises(RankError, match=rf"rank {rank} .*{shape[0]}x{shape[1]}; expected 1 <= rank <= "):
            call()
    assert issubclass(RankError, UserError)
    assert issubclass(RankError, ValueError)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(2, 3, 4), "expected a matrix"),
        (torch.ones(4, 4, dtype=torch.int64), "floating point"),
        (torch.full((4, 4), math.nan), "not finite"),
    ],
)
def test_weights_that_cannot_be_split(weight, words):
    with pytest.raises(UserError, match=words):
        qr_init(weight, 1)


def test_arguments_stay_as_they_are():
    weight = normal(6, 6, 5).requires_grad_()
    before = weight.detach().clone()
    found = qr_init(weight, 2, 2.0, 1e-4)
    assert torch.equal(weight, before)
    assert not any(x.requires_grad for x in found)


def test_kaiming_is_nested_and_within_its_bound():
    a, b = kaiming_init(6, 50, 20, torch.Generator().manual_seed(1))
    small_a, small_b = kaiming_init(2, 50, 20, torch.Generator().manual_seed(1))
    assert torch.equal(small_a, a[:2])
    assert (b.shape, small_b.shape) == ((20, 6), (20, 2))
    assert not b.any()
    bound = 1 / math.sqrt(50)
    assert 0.9 * bound < a.abs().max() <= bound
    assert abs(float(a.std()) - bound / math.sqrt(3)) < 0.1 * bound
    other, _ = kaiming_init(6, 50, 20, torch.Generator().manual_seed(2))
    assert not torch.equal(other, a)


def test_the_package_loads_no_torch():
    code = "import sys, fedcore.lora; assert 'torch' not in sys.modules; print(len(fedcore.lora.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10
