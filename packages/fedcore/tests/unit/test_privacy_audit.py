"""The canary audit: the real mechanism passes it, broken ones do not."""

from __future__ import annotations

import math

import pytest
import torch
from fedcore.privacy import ClientDPMechanism, NoiseSource, audit
from fedcore.privacy.auditing import epsilon_bound
from polymodal.errors import UserError
from scipy.stats import binom


def test_the_mechanism_passes_and_the_bound_is_not_empty():
    found = audit(noise_multiplier=1.0, trials=2000)
    assert found.passed
    assert found.epsilon_bound > 0.45 * found.epsilon_reported
    assert "consistent" in found.text()


def test_secure_noise_and_poisson_cohorts_pass():
    assert audit(noise_multiplier=0.7, sampling_rate=0.5, trials=600, secure_noise=True).passed


class Silent(NoiseSource):
    """Noise that is not there."""

    def add(self, totals, deviation, round, purpose="noise"):
        super().add(totals, deviation * self.share, round, purpose)

    share = 0.0


def broken(share=1.0, clip=1.0):
    """A mechanism with a share of its noise, or a clip bound that is not kept."""

    def make(settings, layout, noise, announce):
        source = Silent()
        source.share = share
        made = ClientDPMechanism(settings, layout, source, announce)
        if clip != 1.0:
            made._clip = lambda upload: ([clip * settings.clip / 10.0], settings.clip)  # uploads have norm 10 C
        return made

    return make


@pytest.mark.parametrize("how", [{"share": 0.0}, {"share": 0.4}, {"clip": 3.0}])
def test_missing_noise_and_a_missing_clip_are_found(how):
    found = audit(noise_multiplier=1.0, trials=1000, mechanism=broken(**how))
    assert not found.passed
    assert "VIOLATED" in found.text()


def test_the_bound_is_clopper_and_pearsons():
    hits, alarms, trials, delta, confidence = 130, 21, 1000, 0.01, 0.95
    bound = epsilon_bound(hits, alarms, trials, delta, confidence)
    # By definition of the two limits: as unlikely as half of the error each.
    from scipy.optimize import brentq

    least = brentq(lambda p: binom.sf(hits - 1, trials, p) - 0.025, 1e-6, 1 - 1e-6)
    most = brentq(lambda p: binom.cdf(alarms, trials, p) - 0.025, 1e-6, 1 - 1e-6)
    assert bound == pytest.approx(math.log((least - delta) / most), rel=1e-6)
    assert epsilon_bound(0, 0, 100, 0.0, 0.95) == 0.0
    assert epsilon_bound(100, 100, 100, 0.0, 0.95) == 0.0
    assert 3 < epsilon_bound(1000, 0, 1000, 0.0, 0.95) < math.log(1000)


def test_values_out_of_range_are_refused():
    for options in ({"trials": 10}, {"parameters": 1}, {"confidence": 1.0}, {"clip": 0.0}):
        with pytest.raises(UserError, match="audit"):
            audit(**options)


def test_torch_seeds_do_not_matter():
    torch.manual_seed(0)
    one = audit(trials=200)
    torch.manual_seed(0)
    assert audit(trials=200) != one
