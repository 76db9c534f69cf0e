"""Orthogonalisation: what it does to singular values and vectors, in both forms, alone and in stacks; compression."""

import numpy as np
import pytest
import torch
from fedcore.ops import newton_schulz
from fedcore.ops.lowrank import expand, pack, rank_for, truncate, unpack
from fedcore.ops.newton_schulz import POLAR_EXPRESS, QUINTIC, iteration_dtype, orthogonalise, polar_factors
from hypothesis import given, settings
from hypothesis import strategies as st

ORTHS = ("quintic", "polar_express", "svd")
FORMS = ("standard", "gram")
sizes = st.integers(1, 9)


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def rotation(seed, size):
    return torch.linalg.qr(normal(seed, size, size))[0]


def with_values(seed, rows, values):
    """A matrix (rows, len(values)) with these singular values."""
    left = torch.linalg.qr(normal(seed, rows, len(values)))[0]
    return left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ rotation(seed + 1, len(values))


def composed(s, orth):
    """The scalar polynomial of five steps, from the coefficients."""
    for a, b, c in [QUINTIC] * 5 if orth == "quintic" else POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


def test_coefficients_are_the_published_ones():
    assert QUINTIC == (3.4445, -4.7750, 2.0315)
    # Slopes at zero: 485 and 989, as measured from the published triples.
    assert np.prod([QUINTIC[0]] * 5) == pytest.approx(485, abs=0.5)
    assert np.prod([a for a, _, _ in POLAR_EXPRESS]) == pytest.approx(989, abs=2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), sizes, sizes, st.sampled_from(ORTHS[:2]), st.sampled_from(FORMS))
def test_singular_vectors_stay_and_values_follow_the_polynomial(seed, rows, cols, orth, form):
    u = normal(seed, rows, cols)
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    scale = s.norm() + 1e-7 if orth == "quintic" else 1.02 * s.norm() + 1e-6
    wanted = (left * composed(s / scale, orth)) @ right
    torch.testing.assert_close(orthogonalise(u, orth, ns_form=form), wanted, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), sizes, sizes, st.sampled_from(ORTHS), st.floats(1e-3, 1e3))
def test_scale_transposition_and_rotation(seed, rows, cols, orth, factor):
    u = normal(seed, rows, cols) + torch.eye(rows, cols).double()
    found = orthogonalise(u, orth, eps=1e-30)
    if orth != "polar_express":  # its 1e-6 is not ours to choose
        torch.testing.assert_close(orthogonalise(factor * u, orth, eps=1e-30), found, rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonalise(u.T, orth, eps=1e-30).T, found, rtol=0, atol=1e-10)
    q, r = rotation(seed + 1, rows), rotation(seed + 2, cols)
    torch.testing.assert_close(orthogonalise(q @ u @ r, orth, eps=1e-30), q @ found @ r, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("orth", ORTHS)
def test_zero_stays_zero(orth, dtype, form):
    u = torch.zeros(3, 4, 6, dtype=dtype)
    u[1] = torch.eye(4, 6)
    found = orthogonalise(u, orth, ns_form=form)
    assert found.dtype == dtype
    assert not found[0].any()
    assert not found[2].any()
    assert found[1].float().norm() > 1
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("orth", "value"), [("quintic", 0.6964364), ("polar_express", 0.9035374), ("svd", 1.0)])
def test_rank_one(orth, value, form):
    # The larger the matrix, the less its norm's own epsilon counts: 0.9035737 is polar_express at a norm of 4.3.
    u = torch.outer(normal(1, 7), normal(2, 12))
    values = torch.linalg.svdvals(orthogonalise(1e6 * u, orth, ns_form=form))
    assert values[0].item() == pytest.approx(value, abs=1e-7)
    assert float(values[1:].max()) < 1e-9
    if orth == "polar_express":
        found = orthogonalise(4.27 * u / u.norm(), orth, ns_form=form)
        assert found.norm().item() == pytest.approx(0.9035737, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 6), st.sampled_from([(3, 3), (4, 9), (9, 4), (1, 5), (6, 7)]))
def test_a_stack_is_a_loop_and_the_gram_form_is_the_standard_form(seed, count, shape):
    u = normal(seed, 2, count, *shape)
    for orth in ORTHS:
        loop = torch.stack([torch.stack([orthogonalise(m, orth, ns_form="standard") for m in row]) for row in u])
        for form in (*FORMS, "auto"):
            torch.testing.assert_close(orthogonalise(u, orth, ns_form=form), loop, rtol=0, atol=5e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 6), st.integers(0, 5), st.integers(1, 7), st.sampled_from(ORTHS))
def test_columns_of_zeros_change_nothing(seed, rows, further, padding, orth):
    u = normal(seed, rows, rows + further)
    padded = orthogonalise(torch.nn.functional.pad(u, (0, padding)), orth)
    torch.testing.assert_close(padded[:, : rows + further], orthogonalise(u, orth), rtol=0, atol=1e-10)
    assert float(padded[:, rows + further :].abs().max()) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("orth", "least", "low", "high"),
    [("quintic", 0.01, 0.682, 1.134), ("quintic", 0.001, 0.470, 1.202), ("polar_express", 0.003, 0.859, 1.141)],
)
def test_range_of_singular_values(orth, least, low, high, form):
    # A dense grid of relative sizes, two at a time: (s, sqrt(1 - s^2)) has norm 1 (1.02 is polar_express's own).
    s = torch.logspace(np.log10(least), np.log10(0.7), 400, dtype=torch.float64)
    scale = 1.02 if orth == "polar_express" else 1.0
    u = scale * torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], dim=-1))
    values = torch.linalg.svdvals(orthogonalise(u, orth, ns_form=form, eps=1e-15))
    assert low - 5e-4 <= float(values.min())
    assert float(values.max()) <= high + 5e-4


def test_svd_is_the_polar_factor_without_directions_of_zero():
    u = with_values(3, 8, [5.0, 2.0, 1e-3, 0.0])
    found = orthogonalise(u, "svd")
    np.testing.assert_allclose(torch.linalg.svdvals(found), [1, 1, 1, 0], atol=1e-12)
    torch.testing.assert_close(found.T @ u, (u.T @ found), rtol=0, atol=1e-12)  # U^T O is symmetric
    torch.testing.assert_close(found @ (found.T @ u), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("orth", ORTHS[:2])
def test_float32_stays_near_float64_however_ill_conditioned(orth, spread):
    u = with_values(4, 96, np.geomspace(1, spread, 24)).T
    wanted = orthogonalise(u, orth)
    for form in FORMS:
        found = orthogonalise(u.float(), orth, ns_form=form).double()
        assert float((found - wanted).norm() / wanted.norm()) < (5e-3 if form == "gram" else 5e-5)


def test_the_gram_form_is_left_where_rounding_would_grow(monkeypatch):
    seen = []
    monkeypatch.setattr(newton_schulz, "_gram", lambda x, *_: seen.append(x) or (x @ x.mT, x))
    u = torch.ones(2, 8)
    orthogonalise(u, steps=6)
    orthogonalise(u.bfloat16(), ns_dtype="bfloat16")
    orthogonalise(torch.ones(5, 8))
    assert not seen
    orthogonalise(u)
    orthogonalise(u.T)
    assert len(seen) == 2


@pytest.mark.parametrize("orth", ORTHS)
@pytest.mark.parametrize("strided", [False, True])
def test_input_is_not_changed(orth, strided):
    u = normal(5, 6, 4, 3)
    u = u[::2, :, ::2] if strided else u
    before = u.clone()
    orthogonalise(u, orth)
    orthogonalise(u[0].T, orth)
    assert torch.equal(u, before)


def test_number_format():
    u = torch.ones(2, 2)
    assert iteration_dtype(u) == torch.float32
    assert iteration_dtype(u.double()) == torch.float64
    assert iteration_dtype(u.bfloat16()) == torch.float32
    assert iteration_dtype(u.double(), "bfloat16") == torch.bfloat16
    assert iteration_dtype(torch.ones(2, 2, device="meta")) == torch.bfloat16
    assert iteration_dtype(torch.ones(2, 2, device="meta", dtype=torch.float64)) == torch.float64
    rough = orthogonalise(normal(6, 16, 40), ns_dtype="bfloat16")
    fine = orthogonalise(normal(6, 16, 40))
    assert rough.dtype == torch.float64
    assert 1e-4 < float((rough - fine).norm() / fine.norm()) < 0.1


def test_factors_need_the_smaller_side_first():
    u = normal(7, 2, 3, 8)
    for orth in ORTHS:
        left, right = polar_factors(u.clone(), orth)
        assert (left.shape, right.shape) == ((2, 3, 3), (2, 3, 8))
        torch.testing.assert_close(left @ right, orthogonalise(u, orth), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="matrices are 8 x 3; expected no more rows than columns"):
        polar_factors(u.mT)


def test_unknown_choices():
    for options in ({"orth": "cubic"}, {"ns_dtype": "half"}, {"ns_form": "best"}):
        with pytest.raises(ValueError, match="expected one of"):
            orthogonalise(torch.ones(2, 2), **options)


# ---------------------------------------------------------------------- compression


def test_rank_of_published_shapes():
    assert rank_for(192, 768, 0.05) == 7
    assert rank_for(512, 4608, 0.1) == 46
    assert rank_for(64, 64, 0.001) == 1
    assert rank_for(192, 768, 1.0) == 0  # the whole matrix is no more
    assert rank_for(1, 5, 0.5) == 0  # factors of rank 1 take 7 numbers


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.01, 0.999))
def test_factors_never_take_more_than_the_matrix(rows, cols, ratio):
    rank, room = rank_for(rows, cols, ratio), rows * cols
    sent = rank * (rows + cols + 1) if rank else room
    assert sent <= room
    if rank > 1:
        assert sent <= ratio * room


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 7), st.integers(1, 7))
def test_full_rank_is_the_identity_and_less_is_the_best(seed, rows, cols):
    u = normal(seed, 2, rows, cols)
    torch.testing.assert_close(expand(*truncate(u, min(rows, cols))), u, rtol=0, atol=1e-12)
    values = torch.linalg.svdvals(u)
    for rank in range(1, min(rows, cols)):
        left = (expand(*truncate(u, rank)) - u).norm(dim=(-2, -1))
        torch.testing.assert_close(left, values[:, rank:].norm(dim=-1), rtol=0, atol=1e-12)


def test_packing_keeps_low_ranks_and_order():
    shapes = [(1, 12, 9), (3, 8, 8), (1, 1, 4)]
    low = torch.cat([normal(k, b * m, 1).mul(normal(k + 9, 1, n)).flatten() for k, (b, m, n) in enumerate(shapes)])
    flat = torch.stack([low, -2 * low])
    packed = pack(flat, shapes, 0.3)
    assert packed.shape == (2, 1 * 22 + 3 * 17 + 4)
    torch.testing.assert_close(unpack(packed, shapes, 0.3), flat, rtol=0, atol=1e-12)
    assert torch.equal(unpack(pack(flat, shapes, 1.0), shapes, 1.0), flat)
    assert pack(flat[:, :0], [], 0.3).shape == (2, 0)


# ---------------------------------------------------------------------- on an accelerator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(64, 64), (64, 576), (192, 192), (192, 576), (576, 576)])
def test_a_stack_of_ten_clients_beats_the_loop_threefold(shape):
    # Ten clients with twelve matrices of one shape, as the blocks of DeiT-tiny: the loop is bound by launches.
    u = torch.randn(10, 12, *shape, device="cuda")

    def loop():
        for row in u:
            for matrix in row:
                orthogonalise(matrix)

    def milliseconds(call, runs=20):
        found = []
        for _ in range(runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return float(np.median(found[3:]))

    near = orthogonalise(u)[3, 5], orthogonalise(u[3, 5])
    assert float((near[0] - near[1]).norm() / near[1].norm()) < 0.02  # bfloat16, in products of other layouts
    together, apart = milliseconds(lambda: orthogonalise(u)), milliseconds(loop)
    assert apart >= 3 * together, f"{apart:.2f} ms in a loop, {together:.2f} ms together"
