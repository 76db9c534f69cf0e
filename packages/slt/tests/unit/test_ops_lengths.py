import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.ops.lengths import (
    SCHEMES,
    conv_length,
    frame_indices,
    padded_indices,
    padded_length,
    padding,
    token_length,
)

EXTRA = {"gfslt": 1, "vac": 0}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_out_for_every_clip_up_to_2000_frames(scheme):
    for frames in range(1, 2001):
        padded = padded_length(frames, scheme)
        assert padded % 4 == 0
        assert conv_length(padded) == token_length(frames, scheme) == math.ceil(frames / 4) + EXTRA[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_real_conv_stack_returns_that_many_tokens(scheme):
    stack = torch.nn.Sequential(
        torch.nn.Conv1d(1, 1, 5), torch.nn.MaxPool1d(2), torch.nn.Conv1d(1, 1, 5), torch.nn.MaxPool1d(2)
    )
    with torch.inference_mode():
        for frames in range(1, 2001, 4):  # every padded length occurs
            out = stack(torch.zeros(1, 1, padded_length(frames, scheme)))
            assert out.shape[-1] == token_length(frames, scheme)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.sampled_from(sorted(SCHEMES)))
def test_padding_repeats_the_edges(frames, scheme):
    left, right = padding(frames, scheme)
    indices = padded_indices(frames, scheme)
    assert left == SCHEMES[scheme]
    assert right >= left
    assert len(indices) == padded_length(frames, scheme)
    assert indices[:left] == [0] * left
    assert indices[left : left + frames] == list(range(frames))
    assert indices[left + frames :] == [frames - 1] * right


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 900), st.integers(1, 400))
def test_frame_indices(total, limit):
    spaced = frame_indices(total, limit)
    assert spaced == ([i * total // limit for i in range(limit)] if total > limit else list(range(total)))
    drawn = frame_indices(total, limit, torch.Generator().manual_seed(total))
    assert drawn == frame_indices(total, limit, torch.Generator().manual_seed(total))
    for chosen in (spaced, drawn):
        assert len(chosen) == min(total, limit)
        assert chosen == sorted(set(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < total


def test_training_draws_reach_every_frame():
    seen = {i for seed in range(60) for i in frame_indices(12, 4, torch.Generator().manual_seed(seed))}
    assert seen == set(range(12))


@pytest.mark.parametrize("function", [padded_length, token_length, padding, padded_indices])
def test_bad_arguments_name_the_choices(function):
    with pytest.raises(UserError, match=r"'gfsl'.*gfslt, vac"):
        function(5, "gfsl")
    with pytest.raises(UserError, match="frames=0"):
        function(0, "vac")


def test_bad_limits():
    with pytest.raises(UserError, match="limit=0"):
        frame_indices(5, 0)
    with pytest.raises(UserError, match="frames=0"):
        frame_indices(0)
