"""The experiments on plain encoders: their data, their neighbours, and what may be asserted of the digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from polymodal.seeding import generator

FOLDER = Path(__file__).parents[1] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_lie_somewhere_on_noise_and_the_split_has_no_overlap():
    digits = load("digits_encoder")
    (train, _), (test, labels) = digits.split(0)
    assert (len(train), len(test)) == (1077, 720)
    assert sorted(labels.unique().tolist()) == list(range(10))
    pictures = torch.ones(50, 8, 8)
    canvases = digits.place(pictures, generator(0, "test"))
    assert canvases.shape == (50, 1, 14, 14)
    inside = canvases[:, 0] >= 1
    assert inside.flatten(1).sum(1).tolist() == [64] * 50
    corners = {tuple(one.nonzero()[0].tolist()) for one in inside}
    assert len(corners) > 20
    assert max(max(corner) for corner in corners) == 6
    assert canvases[:, 0][~inside].max() <= digits.NOISE
    assert canvases[:, 0][inside].max() <= 1 + digits.NOISE


def test_majority_of_five_neighbours_and_the_nearest_on_a_tie():
    real = load("real_dinov2")
    gallery = torch.eye(6)
    labels = torch.tensor([0, 1, 1, 2, 2, 3])
    queries = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.0, -1.0], [0.5, 0.4, 0.3, 0.9, 0.35, 0.0]])
    # votes 0 1 1 2 2: the nearer of 1 and 2; votes 2 0 1 2 1: the nearer of 2 and 1
    assert real.neighbours(gallery, labels, queries).tolist() == [1, 2]


@pytest.mark.slow
def test_ranked_patches_beat_random_ones():
    """iLLaVA 8: with a class readout and 15 of 49 patches left; nothing is asserted of merging over dropping."""
    digits = load("digits_encoder")
    torch.set_num_threads(1)
    model, _ = digits.train("cls", 2)  # a seed that learns its digits; the claim is about encoders that do
    found = {name: digits.measure(model, "cls", name, 2) for name in ("full", "rank1", "recycle", "drop", "random")}
    assert found["full"]["49"] > 80
    for name in ("rank1", "recycle"):
        assert found[name]["15"] > found["random"]["15"] + 8
        assert found[name]["15"] >= found["drop"]["15"] - 1.5
