"""Temporal convolutions against loops over single clips in float64 NumPy."""

import numpy as np
import pytest
import torch
from slt.models.visual import TemporalConv
from slt.ops.lengths import token_length

LEFT = {"gfslt": 8, "vac": 6}
EXTRA = {"gfslt": 16, "vac": 12}


def padded(clip, scheme):
    frames = len(clip)
    total = 4 * int(np.ceil(frames / 4)) + EXTRA[scheme]
    right = total - frames - LEFT[scheme]
    return np.concatenate([np.repeat(clip[:1], LEFT[scheme], 0), clip, np.repeat(clip[-1:], right, 0)])


def conv(x, weight, bias):
    steps = len(x) - weight.shape[2] + 1
    out = np.empty((steps, weight.shape[0]))
    for t in range(steps):
        for channel in range(weight.shape[0]):
            out[t, channel] = bias[channel] + np.sum(weight[channel].T * x[t : t + weight.shape[2]])
    return out


def block(clips, layer, norm, training):
    """Convolve each clip alone; statistics over the valid positions of all clips together."""
    clips = [conv(c, layer["weight"], layer["bias"]) for c in clips]
    every = np.concatenate(clips)
    mean, var = (every.mean(0), every.var(0)) if training else (norm["running_mean"], norm["running_var"])
    out = []
    for clip in clips:
        normed = np.maximum((clip - mean) / np.sqrt(var + 1e-5) * norm["weight"] + norm["bias"], 0)
        out.append(normed[: len(normed) // 2 * 2].reshape(len(normed) // 2, 2, -1).max(1))
    return out, mean, every.var(0, ddof=1)


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("scheme", ["gfslt", "vac"])
@pytest.mark.parametrize("training", [True, False])
def test_stack_equals_single_clip_loops(scheme, training):
    torch.manual_seed(3)
    stack = TemporalConv(5, 7, scheme).double().train(training)
    for norm in (stack.norm1, stack.norm2):
        torch.nn.init.uniform_(norm.weight, -1, 1)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    parts = [{k: v.copy() for k, v in arrays(m).items()} for m in (stack.conv1, stack.norm1, stack.conv2, stack.norm2)]
    lengths = [1, 5, 42, 8, 4, 3]
    features = torch.randn(sum(lengths), 5, dtype=torch.float64)

    rows, counts = stack(features, lengths)

    clips = [padded(c, scheme) for c in np.split(features.numpy(), np.cumsum(lengths)[:-1])]
    clips, mean1, var1 = block(clips, parts[0], parts[1], training)
    clips, mean2, var2 = block(clips, parts[2], parts[3], training)
    assert counts == [len(c) for c in clips] == [token_length(t, scheme) for t in lengths]
    np.testing.assert_allclose(rows.detach().numpy(), np.concatenate(clips), atol=1e-12)
    if training:
        for norm, before, mean, var in ((stack.norm1, parts[1], mean1, var1), (stack.norm2, parts[3], mean2, var2)):
            np.testing.assert_allclose(norm.running_mean, 0.9 * before["running_mean"] + 0.1 * mean, atol=1e-12)
            np.testing.assert_allclose(norm.running_var, 0.9 * before["running_var"] + 0.1 * var, atol=1e-12)
