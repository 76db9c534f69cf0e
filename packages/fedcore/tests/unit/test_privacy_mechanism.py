"""The mechanism under attack: whatever clients send, the sum moves by at most C and the noise is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fedcore.algorithm import Client, Context
from fedcore.engines.base import ClientResult
from fedcore.privacy import ClientDPMechanism, NoiseSource
from fedcore.privacy.mechanism import MechanismSettings, clip_factors, joint_norm, spans_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

LAYOUT = {"delta": torch.zeros(6), "variate": torch.zeros(2, 2)}


def result(client, upload, error=""):
    return ClientResult(Client(client, 5, 3), upload, loss=1.0, up_bytes=4, down_bytes=2, error=error)


def mechanism(clip=1.0, sigma=0.0, m=2.0, layout=None, announce=None, source=None, spans=None, cohort=None, **options):
    made = MechanismSettings(clip, sigma, m, 3, **options)
    return ClientDPMechanism(
        made, layout or LAYOUT, source or NoiseSource(), announce or (lambda n: None), spans=spans, cohort=cohort
    )


def random_upload(seed, scale=1.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return {n: (scale * torch.randn(v.shape, generator=draw, dtype=torch.float64)).to(dtype) for n, v in LAYOUT.items()}


def flat(tree):
    return torch.cat([tree[name].double().reshape(-1) for name in LAYOUT])


def summed(uploads, clip=1.0, **options):
    """The sum of clipped uploads, through the class; float64."""
    layout = {n: v.double() for n, v in LAYOUT.items()}
    made = mechanism(clip, m=1.0, layout=layout, **options)
    for client, upload in enumerate(uploads):
        made.add(result(client, upload))
    return flat(made.result())


# ------------------------------------------------------------------ clipping

NASTY = [0.0, 1.0, -1.0, 1e-30, 1e30, -1e38, 3e38, math.inf, -math.inf, math.nan, 1e-45]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.one_of(st.floats(width=32), st.sampled_from(NASTY)), min_size=10, max_size=10),
    clip=st.sampled_from([1e-6, 0.3, 1.0, 50.0]),
    mode=st.sampled_from(["flat", "per_layer"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_no_upload_counts_for_more_than_c(values, clip, mode, dtype):
    with np.errstate(over="ignore"):
        numbers = torch.tensor(values, dtype=torch.float64).to(dtype)
    upload = {"delta": numbers[:6], "variate": numbers[6:].view(2, 2)}
    found = summed([upload], clip, clip_mode=mode)
    assert bool(found.isfinite().all())
    assert float(found.norm()) <= clip * (1 + 1e-6)
    if not bool(numbers.isfinite().all()):
        assert not found.any()
    elif mode == "flat" and float(numbers.double().norm()) <= clip:
        assert torch.equal(found, numbers.double())
    # Clipping what is clipped changes nothing.
    again = {"delta": found[:6], "variate": found[6:].view(2, 2)}
    torch.testing.assert_close(summed([again], clip, clip_mode=mode), found, rtol=1e-12, atol=0)


def test_clipping_keeps_the_direction_and_is_over_all_tensors_jointly():
    upload = {"delta": torch.full((6,), 3.0), "variate": torch.full((2, 2), -4.0)}
    norm = math.sqrt(6 * 9 + 4 * 16)
    expected = torch.cat([torch.full((6,), 3.0), torch.full((4,), -4.0)]).double() * (2.0 / norm)
    torch.testing.assert_close(summed([upload], 2.0), expected, rtol=1e-14, atol=0)


def test_norms_whose_squares_overflow():
    huge = {"delta": torch.full((6,), 1e200, dtype=torch.float64), "variate": torch.zeros(2, 2, dtype=torch.float64)}
    assert joint_norm(huge.values()) == pytest.approx(1e200 * math.sqrt(6))
    assert float(summed([huge], 0.5).norm()) == pytest.approx(0.5)
    largest = {"delta": torch.full((6,), 1.7e308, dtype=torch.float64), "variate": torch.zeros(2, 2).double()}
    assert float(summed([largest], 0.5).norm()) <= 0.5
    assert math.isnan(joint_norm([torch.tensor([1.0, math.inf])]))
    assert joint_norm([torch.zeros(0)]) == 0.0


def test_layers_share_the_bound():
    # One vector over a model of two tensors (4 and 2 numbers), and a tensor of another length that is one layer.
    spans = spans_of(LAYOUT, [(0, 4), (4, 6)], "per_layer")
    assert spans == [("delta", 0, 4), ("delta", 4, 6), ("variate", 0, 4)]
    assert spans_of(LAYOUT, [(0, 4), (4, 6)], "flat") == [("delta", 0, 6), ("variate", 0, 4)]
    upload = {"delta": torch.tensor([30.0, 40, 0, 0, 0.1, 0.2]), "variate": torch.full((2, 2), 100.0)}
    factors, bound = clip_factors(upload, spans, "per_layer", 3.0)
    share = 3.0 / math.sqrt(3)
    np.testing.assert_allclose(factors, [share / 50, 1.0, share / 200])
    assert bound == 3.0
    assert float(summed([upload], 3.0, clip_mode="per_layer", spans=spans).norm()) <= 3.0


def test_the_authors_median_clip():
    # Independently: norms by layer, their median, each layer scaled to it, noise by the client's own bound.
    spans = spans_of(LAYOUT, [(0, 4), (4, 6)], "official_median")
    uploads, expected, squares = [random_upload(seed, 3.0) for seed in (1, 2)], np.zeros(10), 0.0
    for upload in uploads:
        layers = [upload["delta"][:4], upload["delta"][4:], upload["variate"].reshape(-1)]
        layers = [layer.double().numpy() for layer in layers]
        norms = [math.sqrt(float((layer**2).sum())) for layer in layers]
        median = sorted(norms)[1]
        expected += np.concatenate([layer * min(1, median / n) for layer, n in zip(layers, norms, strict=True)])
        squares += median**2
    np.testing.assert_allclose(
        summed(uploads, math.inf, clip_mode="official_median", spans=spans), expected, rtol=1e-13
    )
    made = mechanism(math.inf, 0.7, 5.0, clip_mode="official_median", spans=spans)
    for client, upload in enumerate(uploads):
        made.add(result(client, upload))
    assert made._deviation == pytest.approx(0.7 * math.sqrt(squares / 5))


# ------------------------------------------------------------------ sensitivity


class Liar:
    """A client's upload that changes its mind about what it is."""

    shape = torch.Size([6])


BROKEN = {
    "more tensors": {**random_upload(0), "extra": torch.ones(3)},
    "fewer": {"delta": torch.ones(6)},
    "other names": {"delta": torch.ones(6), "Variate": torch.ones(2, 2)},
    "longer": {"delta": torch.ones(7), "variate": torch.ones(2, 2)},
    "other shape": {"delta": torch.ones(6), "variate": torch.ones(4)},
    "whole numbers": {"delta": torch.ones(6, dtype=torch.int64), "variate": torch.ones(2, 2)},
    "complex": {"delta": torch.ones(6, dtype=torch.complex64), "variate": torch.ones(2, 2)},
    "sparse": {"delta": torch.ones(6).to_sparse(), "variate": torch.ones(2, 2)},
    "no tensor": {"delta": [1.0] * 6, "variate": torch.ones(2, 2)},
    "liar": {"delta": Liar(), "variate": torch.ones(2, 2)},
    "nothing": {},
    "None": None,
    "NaN": {"delta": torch.full((6,), math.nan), "variate": torch.ones(2, 2)},
    "inf": {"delta": torch.ones(6), "variate": torch.full((2, 2), math.inf)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_uploads_are_zero_vectors(kind):
    fine = random_upload(1, 0.1)
    assert torch.equal(summed([fine, BROKEN[kind]]), summed([fine]))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_one_client_more_or_less_moves_the_sum_by_at_most_c(data):
    clip = data.draw(st.sampled_from([0.01, 1.0, 7.0]))
    mode = data.draw(st.sampled_from(["flat", "per_layer"]))
    scales = data.draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e10, 1e30]), min_size=0, max_size=6))
    others = [random_upload(seed, scale) for seed, scale in enumerate(scales)]
    kind = data.draw(st.sampled_from(["huge", "copy", *BROKEN]))
    adversary = {"huge": random_upload(99, 1e30), "copy": others[0] if others else {}}.get(kind, BROKEN.get(kind))
    place = data.draw(st.integers(0, len(others)))
    joined = [*others[:place], adversary, *others[place:]]
    difference = summed(joined, clip, clip_mode=mode) - summed(others, clip, clip_mode=mode)
    assert float(difference.norm()) <= clip * (1 + 1e-6)


def test_a_client_counts_once_and_only_if_it_was_asked():
    made = mechanism(m=1.0, cohort=[0, 2])
    for client in (0, 0, 1, 2, 2):
        made.add(result(client, {"delta": torch.ones(6), "variate": torch.zeros(2, 2)}))
    assert made.reported == 2
    assert float(made.result()["delta"].norm()) == pytest.approx(2.0)


def test_what_comes_late_changes_nothing():
    made = mechanism(m=1.0)
    released = made.result()
    made.add(result(0, random_upload(0)))
    assert not released["delta"].any()


def test_the_layout_is_not_taken_from_the_first_client():
    made = mechanism(m=1.0)
    made.add(result(0, {"delta": torch.ones(3)}))
    made.add(result(1, random_upload(1)))
    found = made.result()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in LAYOUT.items()}
    assert float(flat(found).norm()) == pytest.approx(1.0)


# ------------------------------------------------------------------ noise, denominator, release


def test_noise_is_on_every_number_as_large_as_sigma_c_over_m():
    layout = {"delta": torch.zeros(900_000, dtype=torch.float64), "variate": torch.zeros(100_000, dtype=torch.float64)}
    found = mechanism(0.3, 0.8, 12.5, layout).result()
    expected = 0.8 * 0.3 / 12.5
    for value in found.values():
        assert float(value.std()) == pytest.approx(expected, rel=0.01)
        assert abs(float(value.mean())) < 4 * expected / math.sqrt(len(value))
    whole = torch.cat(list(found.values())).numpy() / expected
    assert whole.std() == pytest.approx(1, rel=0.005)
    assert stats.kurtosis(whole) == pytest.approx(0, abs=0.03)
    assert stats.kstest(whole[::7], "norm").pvalue > 1e-4


def test_an_empty_cohort_releases_pure_noise():
    heard = []
    found = mechanism(1.0, 1.0, announce=heard.append, cohort=[]).result()
    assert heard == [10]
    assert bool(flat(found).all())


def test_the_denominator_is_m_however_many_report():
    for reported in (0, 1, 3):
        made = mechanism(10.0, m=2.5)
        for client in range(reported):
            made.add(result(client, {"delta": torch.full((6,), 0.5), "variate": torch.zeros(2, 2)}))
        torch.testing.assert_close(made.result()["delta"], torch.full((6,), 0.5 * reported / 2.5))


def test_results_have_the_format_of_uploads_and_sums_are_float64():
    big = {"delta": torch.full((6,), 1e8), "variate": torch.zeros(2, 2)}
    small = {"delta": torch.full((6,), 1.0), "variate": torch.zeros(2, 2)}
    made = mechanism(1e10, m=1.0)
    for client, upload in enumerate([big, small, {n: -v for n, v in big.items()}]):
        made.add(result(client, upload))
    found = made.result()
    assert found["delta"].dtype == torch.float32
    assert torch.equal(found["delta"], small["delta"])


def test_a_release_is_announced_before_it_exists_and_only_once():
    order = []

    class Loud(NoiseSource):
        def add(self, totals, deviation, round, purpose="noise"):
            order.append("noise")
            super().add(totals, deviation, round, purpose)

    made = mechanism(sigma=1.0, announce=lambda n: order.append("ledger"), source=Loud())
    made.result()
    assert order == ["ledger", "noise"]
    with pytest.raises(RuntimeError, match="releases once"):
        made.result()


def test_nothing_is_released_without_an_event():
    def full(numbers):
        raise OSError("disk full")

    made = mechanism(announce=full)
    with pytest.raises(OSError, match="disk full"):
        made.result()
    with pytest.raises(RuntimeError):
        made.result()


def test_uploads_are_left_as_they_are():
    upload = random_upload(3, 100.0)
    kept = {name: value.clone() for name, value in upload.items()}
    summed([upload])
    assert all(torch.equal(upload[name], kept[name]) for name in kept)


def test_noise_of_clients_adds_up_to_the_servers():
    layout = {"delta": torch.zeros(200_000, dtype=torch.float64)}
    made = mechanism(0.5, 1.2, 4.0, layout, noise_location="client", cohort=range(4))
    for client in range(4):
        made.add(result(client, {"delta": torch.zeros(200_000)}))
    assert float(made.result()["delta"].std()) == pytest.approx(1.2 * 0.5 / 4, rel=0.01)


def test_a_missing_share_of_noise_stops_the_release():
    heard = []
    made = mechanism(sigma=1.0, m=4.0, noise_location="client", cohort=range(4), announce=heard.append)
    for client in range(3):
        made.add(result(client, random_upload(client)))
    with pytest.raises(RuntimeError, match="missing"):
        made.result()
    assert heard == []


# ------------------------------------------------------------------ what is told


def test_nothing_that_is_not_private_is_told():
    made = mechanism(m=2.5)
    for client in range(3):
        made.add(result(client, random_upload(client)))
        made.count(result(client, {}, error="secret 17" if client == 1 else ""))
    ctx = made.context(Context(0, 1, 10, 3, 0.1, 0.1, 7, 9))
    assert (ctx.cohort, ctx.steps, ctx.max_steps) == (2.5, 3, 3)
    assert made.row() == {}
    assert made.buffers() == {}
    assert made.first_error == ""
    assert not made.tells


def test_with_the_unsafe_switch_it_is_told():
    made = mechanism(m=2.5, tell=True)
    for client in range(3):
        made.add(result(client, random_upload(client, 100.0 if client else 0.01)))
        made.count(result(client, {}))
    row = made.row()
    assert (row["clients"], row["local_steps"], row["loss"], row["comm/up_bytes"]) == (3, 9, 1.0, 12)
    assert row["unsafe/clipped"] == pytest.approx(2 / 3)
    assert mechanism(tell=True).row()["clients"] == 0
