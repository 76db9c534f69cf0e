"""Random draws are functions of names."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from polymodal.errors import UserError
from polymodal.seeding import derive, generator, numpy_rng, seed_step, set_threads

NAMES = st.lists(st.one_of(st.integers(-(10**6), 10**6), st.text(max_size=8)), max_size=4)


@given(st.integers(0, 2**31), NAMES)
def test_seeds_are_63_bit_and_repeatable(seed, names):
    value = derive(seed, *names)
    assert 0 <= value < 2**63
    assert derive(seed, *names) == value


@given(st.integers(0, 100), NAMES, NAMES)
def test_different_names_give_different_seeds(seed, first, second):
    if first != second:
        assert derive(seed, *first) != derive(seed, *second)


def test_neighbouring_names_do_not_run_together():
    assert len({derive(0, "ab", "c"), derive(0, "a", "bc"), derive(0, "abc"), derive(0, "abc", "")}) == 4
    assert derive(0, 1) != derive(0, "1")
    assert derive(0, np.int64(3)) == derive(0, 3)


def test_another_process_and_hash_seed_give_the_same_value():
    code = "from polymodal.seeding import derive; print(derive(7, 'augment', 3, 'clip_01'))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": h}).stdout
        for h in ("1", "2")
    }
    assert found == {f"{derive(7, 'augment', 3, 'clip_01')}\n"}


def test_generators_follow_the_name_only():
    first = torch.rand(5, generator=generator(1, "a"))
    torch.manual_seed(123)
    assert torch.equal(first, torch.rand(5, generator=generator(1, "a")))
    assert not torch.equal(first, torch.rand(5, generator=generator(1, "b")))
    assert np.array_equal(numpy_rng(1, "a").random(5), numpy_rng(1, "a").random(5))
    assert not np.array_equal(numpy_rng(1, "a").random(5), numpy_rng(2, "a").random(5))


def test_step_seed_fixes_dropout_and_explicit_draws():
    def draws(step, rank=0):
        own = seed_step(5, step, rank)
        return torch.cat([torch.rand(3), torch.rand(3, generator=own)])

    first = draws(4)
    torch.rand(100)
    assert torch.equal(first, draws(4))
    assert not torch.equal(first, draws(5))
    assert not torch.equal(first, draws(4, rank=1))
    assert not torch.equal(first[:3], first[3:])


def test_step_seed_is_the_one_of_manual_seed_and_queues_nothing_for_devices_not_started():
    seed_step(5, 1, 0)
    found = torch.rand(3)
    torch.manual_seed(derive(5, "global", 1, 0))
    assert torch.equal(found, torch.rand(3))
    if not torch.cuda.is_initialized():
        before = len(torch.cuda._queued_calls), len(torch.xpu._queued_calls)
        seed_step(5, 2, 0)
        assert (len(torch.cuda._queued_calls), len(torch.xpu._queued_calls)) == before


def test_threads_default_to_one_and_refuse_zero():
    before = torch.get_num_threads()
    try:
        assert set_threads(None) == 1
        assert torch.get_num_threads() == 1
        with pytest.raises(UserError, match="threads=0; expected at least 1"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)
