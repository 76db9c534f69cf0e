"""Cache layers that count logical tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from polymodal.errors import UserError
from torch import Tensor
from transformers import DynamicCache, DynamicLayer
from vlm_accel.llm.cache import Rows, TrackedLayer


def states(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, count, 4, generator=torch.Generator().manual_seed(seed))


def rows(*index: list[int], pads: bool = False) -> Rows:
    at = torch.tensor(index)
    return Rows(at, at >= 0, at % 2 == 0, pads)


def filled() -> TrackedLayer:
    """12 logical tokens, 8 rows."""
    layer = TrackedLayer()
    layer.begin(12, rows([0, 1, 4, 6, 8, 9, 10, 11], [0, 1, 2, 3, 5, 9, 10, 11]), plain=3)
    layer.update(states(2, 8), states(2, 8, 1))
    return layer


def test_logical_lengths_are_answered_and_physical_rows_stored() -> None:
    layer = filled()
    assert (layer.get_seq_length(), layer.physical, layer.get_mask_sizes(3)) == (12, 8, (15, 0))
    assert layer.get_mask_sizes(torch.arange(3)) == (15, 0)
    for step in range(3):
        layer.update(states(2, 1, step), states(2, 1, step))
    assert layer.index[1].tolist() == [0, 1, 2, 3, 5, 9, 10, 11, 12, 13, 14]
    assert layer.valid.all()
    assert layer.image[0].tolist() == [True, False, True, True, True, False, True, False, False, False, False]
    assert (layer.logical, layer.plain, layer.is_dense) == (15, 6, False)


def test_a_plain_layer_behaves_as_transformers_own() -> None:
    layer, own = TrackedLayer(), DynamicLayer()
    for count in (5, 1, 3):
        for one in (layer, own):
            one.update(states(2, count), states(2, count, 1))
    for one in (layer, own):
        one.batch_repeat_interleave(2)
        one.reorder_cache(torch.tensor([3, 0, 2]))
        one.batch_select_indices(torch.tensor([True, False, True]))
        one.crop(-2)
    assert torch.equal(layer.keys, own.keys)
    assert torch.equal(layer.values, own.values)
    assert layer.is_dense
    assert layer.index.tolist() == [list(range(7))] * 2
    assert layer.get_seq_length() == own.get_seq_length() == 7
    layer.reset()
    assert (layer.get_seq_length(), layer.physical) == (0, 0)


def test_entries_are_kept_for_all_heads_or_per_head() -> None:
    layer = filled()
    keys = layer.keys
    layer.take(torch.tensor([[0, 3, 7], [1, 2, 7]]), plain=1)
    assert layer.index.tolist() == [[0, 6, 11], [1, 2, 11]]
    assert torch.equal(layer.keys[1], keys[1][:, [1, 2, 7]])
    layer.take(torch.tensor([[[0, 1], [1, 2]], [[0, 2], [0, 1]]]))
    assert layer.index.tolist() == [[[0, 6], [6, 11]], [[1, 11], [1, 2]]]
    assert torch.equal(layer.keys[1, 1], keys[1, 1, [1, 2]])
    layer.update(states(2, 1), states(2, 1))
    assert layer.index[0].tolist() == [[0, 6, 12], [6, 11, 12]]
    assert torch.equal(layer.per_head_index(), layer.index)


class Note:
    """A state value that follows the beams by itself."""

    def __init__(self, samples: list[int]) -> None:
        self.samples = samples
        self.cropped = 0

    def select(self, rows: Tensor) -> Note:
        return Note([self.samples[row] for row in rows.tolist()])

    def crop(self, count: int) -> None:
        self.cropped += count


def test_everything_follows_the_beams_and_shared_rows_stay_shared() -> None:
    first, second = filled(), filled()
    second._rows = first._rows
    for layer in (first, second):
        layer.state = {"sums": torch.arange(2.0), "note": Note([0, 1]), "other": 3}
    order = torch.tensor([1, 1, 0])
    for layer in (first, second):
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(order)
        layer.update(states(3, 1), states(3, 1))
    assert first.index[2].tolist() == [0, 1, 4, 6, 8, 9, 10, 11, 12]
    assert first.rows is second.rows
    assert first.state["sums"].tolist() == [0.0, 0.0, 0.0]
    first.reorder_cache(torch.tensor([2, 0]))
    assert first.state["note"].samples == [0, 0]
    assert first.state["other"] == 3


def test_only_tokens_stored_one_for_one_can_be_taken_back() -> None:
    layer = filled()
    layer.state["note"] = Note([0, 1])
    layer.update(states(2, 2), states(2, 2))
    layer.crop(-4)
    assert (layer.logical, layer.physical, layer.plain) == (10, 6, 1)
    assert layer.index[0].tolist() == [0, 1, 4, 6, 8, 9]
    assert layer.state["note"].cropped == 4
    with pytest.raises(UserError, match="assisted decoding"):
        layer.crop(-2)
    assert layer.logical == 10


def test_reserved_room_gives_the_same_rows_without_copies() -> None:
    layer, own = filled(), filled()
    layer.reserve(12)
    for step in range(6):
        for one in (layer, own):
            one.update(states(2, 1, step), states(2, 1, step + 9))
        if step == 1:
            where = layer.keys.untyped_storage().data_ptr()
        if step == 3:
            assert layer.keys.untyped_storage().data_ptr() == where
        if step == 4:
            for one in (layer, own):
                one.take(torch.arange(6, 12).expand(2, -1))
    assert torch.equal(layer.keys, own.keys)
    assert torch.equal(layer.values, own.values)
    assert torch.equal(layer.index, own.index)


def test_rows_that_pad_a_ragged_batch_are_marked() -> None:
    layer = TrackedLayer()
    layer.begin(6, rows([-1, 0, 5], [0, 3, 5], pads=True), plain=1)
    layer.update(states(2, 3), states(2, 3))
    layer.update(states(2, 1), states(2, 1))
    assert layer.index.tolist() == [[-1, 0, 5, 6], [0, 3, 5, 6]]
    assert layer.valid[0].tolist() == [False, True, True, True]
    assert layer.rows.holes


def test_caches_can_be_copied() -> None:
    cache = DynamicCache()
    cache.layers = [filled()]
    other = copy.deepcopy(cache)
    cache.layers[0].update(states(2, 1), states(2, 1))
    assert other.get_seq_length() == 12
    assert other.layers[0].index.shape == (2, 8)
