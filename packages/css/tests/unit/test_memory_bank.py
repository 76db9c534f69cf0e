"""Decoded instances and the draws among them."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from css.memory import make_memory
from css.memory.bank import InstanceBank, mask_runs
from css.task import Task
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

_spec = importlib.util.spec_from_file_location("_memory_toy", Path(__file__).with_name("_memory_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture
def memory(tmp_path):
    reader = toy.write(tmp_path / "data", {**toy.many(4), "mixed": [(1, 0, 0, 4, 5), (2, 6, 6, 3, 9)]})
    return make_memory("instances", tmp_path / "m", **toy.facts(reader, Task("2-1", 4), 1, budget=9))


@pytest.fixture
def bank(memory):
    return InstanceBank(memory)


def test_the_flat_tensors_hold_every_entry(memory, bank):
    assert len(bank) == len(memory.entries) == 9
    for number, entry in enumerate(memory.entries):
        image, label = entry.crop()
        start, (height, width) = int(bank.start[number]), bank.sizes[number].tolist()
        part = slice(start, start + height * width)
        colours = bank.pixels[part].view(torch.uint8).view(height, width, 4)
        assert np.array_equal(colours[..., :3].numpy(), image)
        assert np.array_equal(bank.labels[part].view(height, width).numpy(), label)
        assert (*bank.corners[number].tolist(), height, width) == entry.box
        assert tuple(bank.sources[number].tolist()) == entry.size
    assert {c: len(e) for c, e in bank.slots.items()} == {c: len(e) for c, e in memory.slots.items()}
    assert all(memory.entries[n].slot == channel for channel, slot in bank.slots.items() for n in slot.tolist())


def test_runs_cover_the_mask_of_each_class(memory, bank):
    number = next(n for n, entry in enumerate(memory.entries) if entry.id == "mixed")
    entries, classes = torch.tensor([number, number, 0]), torch.tensor([1, 2, memory.entries[0].slot])
    runs, valid = bank.spans(entries, classes)
    for k, (entry, cls) in enumerate(zip(entries.tolist(), classes.tolist(), strict=True)):
        label = memory.entries[entry].crop()[1]
        mask = np.zeros_like(label)
        for (row, first), (below, stop) in runs[:, :, k].permute(2, 0, 1)[valid[k]].tolist():
            assert below == row + 1
            mask[row, first:stop] += 1
        assert np.array_equal(mask, label == cls)


def test_runs_of_any_mask():
    mask = np.random.default_rng(0).random((9, 13)) < 0.5
    (rows, first), (_, stop) = mask_runs(mask)
    found = np.zeros_like(mask)
    for row, start, end in zip(rows, first, stop, strict=True):
        assert end > start
        assert (start == 0 or not mask[row, start - 1]) and (end == 13 or not mask[row, end])  # noqa: PT018
        found[row, start:end] = True
    assert np.array_equal(found, mask)
    assert mask_runs(np.zeros((3, 4), bool)).shape == (2, 2, 0)


def test_draws_are_uniform_within_the_slot_and_repeat_with_the_seed(bank):
    generator = torch.Generator().manual_seed(0)
    found = bank.draw([1] * 4000, generator).tolist()
    slot = bank.slots[1].tolist()
    counts = Counter(found)
    assert set(counts) == set(slot)
    expected = 4000 / len(slot)
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5
    assert bank.draw([1] * 4000, torch.Generator().manual_seed(0)).tolist() == found
    mixed = bank.draw(torch.tensor([2, 1, 2]), generator).tolist()
    assert [number in bank.slots[channel] for number, channel in zip(mixed, (2, 1, 2), strict=True)] == [True] * 3
    assert bank.draw([], generator).shape == (0,)


def test_a_slot_without_entries_is_named(bank):
    with pytest.raises(ValueError, match="channel 4 has no entries; slots: 1, 2"):
        bank.draw([1, 4], torch.Generator())


def boxes_of_torchvision(size, scale, ratio, n):
    crop = v2.RandomResizedCrop(4, scale=scale, ratio=ratio)
    made = [crop.make_params([Mask(torch.zeros(1, *size, dtype=torch.uint8))]) for _ in range(n)]
    return torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in made])


def resized(bank, size):
    bank._host_sources = torch.tensor([size])
    return bank


@pytest.mark.parametrize("size", [(20, 24), (500, 333), (100, 400)])
def test_crops_have_torchvision_s_distribution(bank, size):
    torch.manual_seed(0)
    n, (scale, ratio) = 3000, ((0.5, 2.0), (3 / 4, 4 / 3))
    wanted = boxes_of_torchvision(size, scale, ratio, n).double()
    found, flips = resized(bank, size).augment(
        torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(1), scale
    )
    found = found.double()
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] > 0).all()
    assert (found[:, :2] + found[:, 2:] <= torch.tensor(size)).all()
    spread = wanted.std(0) + 1e-9
    assert ((found.mean(0) - wanted.mean(0)).abs() / spread < 0.1).all()
    assert ((found.std(0) - wanted.std(0)).abs() / spread < 0.1).all()
    for quantile in (0.1, 0.5, 0.9):
        a, b = (values.quantile(quantile, dim=0) for values in (found, wanted))
        assert ((a - b).abs() <= (spread / 4).clamp(min=1)).all()  # whole pixels
    assert abs(float(flips.double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("size", [(20, 24), (500, 333), (100, 400), (401, 100)])
def test_where_no_crop_fits_it_is_the_central_one_of_torchvision(bank, size):
    scale, ratio = (3.0, 4.0), (3 / 4, 4 / 3)
    wanted = boxes_of_torchvision(size, scale, ratio, 1)
    found, _ = resized(bank, size).augment(torch.zeros(1, dtype=torch.int64), torch.Generator(), scale, ratio)
    assert torch.equal(found, wanted)


def test_a_fixed_scale_and_no_flip_give_the_whole_picture(bank):
    boxes, flips = bank.augment(torch.arange(9), torch.Generator(), (1.0, 1.0), (1.2, 1.2), 0.0)
    assert torch.equal(boxes, torch.tensor([0, 0, *toy.SIZE]).expand(9, 4))
    assert not flips.any()
    assert bank.augment(torch.arange(9), torch.Generator(), flip=1.0)[1].all()


def test_a_paste_more_does_not_change_what_is_left_in_the_generator(bank):
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    bank.augment(torch.tensor([0, 1]), generators[0])
    bank.augment(torch.tensor([5, 5]), generators[1])
    assert torch.equal(torch.rand(3, generator=generators[0]), torch.rand(3, generator=generators[1]))


def test_it_moves_as_a_whole(bank):
    assert bank.to("meta") is bank
    assert bank.device.type == "meta"
    assert {bank.runs.device.type, bank.labels.device.type, bank.factor.device.type} == {"meta"}
    assert bank.slots[1].device.type == "cpu"
    assert bank.augment(torch.arange(3), torch.Generator())[0].device.type == "cpu"


def test_an_empty_memory_makes_an_empty_bank(tmp_path):
    reader = toy.write(tmp_path / "data", toy.many(1))
    empty = InstanceBank(make_memory("instances", tmp_path / "m", **toy.facts(reader, Task("2-1", 4), 1, budget=0)))
    assert len(empty) == 0
    assert empty.slots == {}
    assert empty.augment(torch.zeros(0, dtype=torch.int64), torch.Generator())[0].shape == (0, 4)
