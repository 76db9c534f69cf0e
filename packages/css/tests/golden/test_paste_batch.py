"""A round of pastes against the pictures that it never makes: crop, resize, mirror, then one paste at a time."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from css.memory.bank import InstanceBank
from css.ops.paste import cell_side, paste_batch, paste_instance, rank_cells_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

_spec = importlib.util.spec_from_file_location("_paste_reference", Path(__file__).with_name("_paste_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

MEAN, STD = [torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def slow(images, targets, memory, entries, classes, pictures, origins, cell, lams, boxes, flips, enlarge=True):
    """The definition: whole pictures through torchvision, then ``paste_instance``."""
    images, targets = images.clone(), targets.clone()
    size = list(images.shape[-2:])
    for k, number in enumerate(entries.tolist()):
        pixels, label = memory.entries[number].whole()
        picture = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - MEAN) / STD
        mask = torch.from_numpy(label == int(classes[k]))[None]
        picture = F.resized_crop(picture, *boxes[k].tolist(), size, F.InterpolationMode.BILINEAR, antialias=False)
        mask = F.resized_crop(mask, *boxes[k].tolist(), size, F.InterpolationMode.NEAREST)
        if flips[k]:
            picture, mask = F.horizontal_flip(picture), F.horizontal_flip(mask)
        place, origin = int(pictures[k]), tuple(origins[k].tolist())
        images[place], targets[place] = paste_instance(
            images[place],
            targets[place],
            picture * mask,
            mask[0],
            int(classes[k]),
            origin,
            cell,
            float(lams[k]),
            enlarge=enlarge,
        )
    return images, targets


def scene(seed, size, batch, sizes, channels=5):
    """Pictures, targets with ignored pixels, a memory with its bank, and a generator."""
    rng = np.random.default_rng(seed)
    memory = reference.random_memory(rng, sizes)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, *size, generator=generator)
    labels = torch.randint(0, channels + 1, (batch, *size), generator=generator)
    targets = torch.nn.functional.one_hot(labels, channels + 1).permute(0, 3, 1, 2)[:, :channels].float()
    return images, targets, memory, InstanceBank(memory), generator


def pastes(bank, memory, n, batch, cell, size, generator, free_origin=False):
    """Random arguments of a round."""
    entries = torch.randint(0, len(memory.entries), (n,), generator=generator)
    found = [np.unique(memory.entries[e].label[memory.entries[e].label > 0]).tolist() for e in entries.tolist()]
    slots = [memory.entries[e].slot for e in entries.tolist()]
    classes = torch.tensor(
        [ids[k % len(ids)] if ids else slot for k, (ids, slot) in enumerate(zip(found, slots, strict=True))]
    )
    pictures = torch.randperm(batch, generator=generator)[:n]
    limit = min(size) if free_origin else min(size) - cell + 1
    origins = torch.randint(0, limit, (n, 2), generator=generator)
    boxes, flips = bank.augment(entries, generator)
    return entries, classes, pictures, origins, cell, torch.rand(n, generator=generator), boxes, flips


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    enlarge=st.booleans(),
    free_origin=st.booleans(),
    data=st.data(),
)
def test_a_round_equals_pasting_whole_augmented_pictures(seed, size, enlarge, free_origin, data):
    cell = data.draw(st.integers(2, min(size)))
    sizes = data.draw(st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=4))
    images, targets, memory, bank, generator = scene(seed, size, 4, sizes)
    arguments = pastes(bank, memory, 3, 4, cell, size, generator, free_origin)
    wanted = slow(images, targets, memory, *arguments, enlarge=enlarge)
    found = paste_batch(images.clone(), targets.clone(), bank, *arguments, enlarge=enlarge)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-6)


def test_an_entry_with_an_empty_label_is_not_pasted():
    images, targets, memory, bank, generator = scene(23984, (8, 8), 4, [(4, 4)])
    arguments = pastes(bank, memory, 3, 4, 2, (8, 8), generator)
    wanted = slow(images, targets, memory, *arguments)
    found = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    torch.testing.assert_close(found, wanted)


def test_boxes_are_scaled_as_one_by_one_for_every_cell_and_length():
    """A box whose scaled length is a whole number loses a pixel where the scale is off by one bit."""
    length = torch.arange(2, 200)
    for cell in range(2, 64):
        side = torch.tensor(cell, dtype=torch.float64)
        assert (side / (length + 1)).tolist() == [cell / (n + 1) for n in length.tolist()]
    size, sizes = (35, 20), [(29, 29), (21, 27), (18, 32)]
    images, targets, memory, bank, generator = scene(999998, size, 4, sizes)
    arguments = pastes(bank, memory, 3, 4, 7, size, generator)
    wanted = slow(images, targets, memory, *arguments)
    found = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-6)


def test_a_call_may_fill_several_cells_of_a_picture():
    cell = cell_side(64)
    images, targets, memory, bank, generator = scene(1, (64, 64), 2, [(60, 64), (40, 70), (64, 64)])
    origins, _ = rank_cells_batch(torch.zeros(2, 64, 64, dtype=torch.bool), cell)
    n = 6
    entries = torch.arange(n) % 3
    classes = torch.tensor([memory.entries[e].slot for e in entries.tolist()])
    boxes, flips = bank.augment(entries, generator)
    arguments = (
        entries,
        classes,
        torch.arange(n) // 3,
        origins[:, :3].reshape(n, 2),
        cell,
        torch.rand(n),
        boxes,
        flips,
    )
    wanted = slow(images, targets, memory, *arguments)
    found = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    assert not torch.equal(wanted[0], images)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-6)


def test_lengths_that_stay_or_double_follow_torch():
    one, none = torch.zeros(1, dtype=torch.int64), torch.tensor([False])
    rng, doubled = np.random.default_rng(0), 0
    for tall in range(2, 14):
        pixels = rng.integers(0, 256, (tall, 2, 3), np.uint8)
        memory = reference.Memory([reference.Entry(pixels, np.ones((tall, 2), np.uint8), (1, 1, tall, 2), (40, 40), 1)])
        images, targets = torch.zeros(1, 3, 40, 40), torch.zeros(1, 2, 40, 40)
        for cell in range(tall, 41):
            doubled += tall * cell // (tall + 1) == 2 * tall and cell != 2 * tall + 2
            box = torch.tensor([[0, 0, 40, 40]])
            arguments = (one, one + 1, one, one.expand(1, 2), cell, torch.ones(1), box, none)
            wanted = slow(images, targets, memory, *arguments)
            found = paste_batch(images.clone(), targets.clone(), InstanceBank(memory), *arguments)
            torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    assert doubled > 5


def test_published_sizes():
    images, targets, memory, bank, generator = scene(2, (512, 512), 2, [(375, 500), (500, 333), (1200, 900)])
    for entry in memory.entries:
        entry.label[:] = entry.slot  # whole boxes
        entry.label[::7, ::5] = 0
    bank = InstanceBank(memory)
    arguments = pastes(bank, memory, 2, 2, 250, (512, 512), generator)
    wanted = slow(images, targets, memory, *arguments)
    found = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    assert (found[0] != images).any(1).flatten(1).sum(1).min() > 1000
    torch.testing.assert_close(found[0], wanted[0], atol=2e-3, rtol=1e-3)
    assert torch.equal(found[1] > 0, wanted[1] > 0)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_limits_of_the_opacity(lam):
    images, targets, memory, bank, generator = scene(3, (40, 40), 3, [(40, 40), (30, 50)])
    arguments = list(pastes(bank, memory, 3, 3, 19, (40, 40), generator))
    arguments[5] = torch.full((3,), lam)
    new, soft = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    if lam == 0:
        assert torch.equal(new, images)
        assert torch.equal(soft, targets)
        return
    touched = (new != images).any(1)
    assert touched.any()
    assert torch.equal(soft.sum(1)[touched], torch.ones(int(touched.sum())))
    assert set(soft[:, :, touched.any(0)].unique().tolist()) <= {0.0, 1.0}


def test_pixels_off_the_masks_keep_their_bits_and_rows_sum_to_one():
    images, targets, memory, bank, generator = scene(4, (40, 40), 4, [(40, 40), (30, 50)])
    images[:, :, 0] = -0.0
    valid = targets.sum(1) > 0
    new, soft = paste_batch(images.clone(), targets.clone(), bank, *pastes(bank, memory, 3, 4, 19, (40, 40), generator))
    touched = (new != images).any(1)
    assert touched.any()
    assert torch.equal(
        new.movedim(1, -1)[~touched].view(torch.int32), images.movedim(1, -1)[~touched].view(torch.int32)
    )
    assert torch.equal(soft.movedim(1, -1)[~touched], targets.movedim(1, -1)[~touched])
    torch.testing.assert_close(soft.sum(1)[valid], torch.ones(int(valid.sum())), atol=1e-6, rtol=0)


def test_tensors_of_any_layout_are_changed_in_place():
    images, targets, memory, bank, generator = scene(5, (40, 36), 3, [(40, 40), (30, 50)])
    arguments = pastes(bank, memory, 3, 3, 18, (40, 36), generator)
    wanted = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    last = [tensor.clone(memory_format=torch.channels_last) for tensor in (images, targets)]
    found = paste_batch(*last, bank, *arguments)
    for a, b, c in zip(found, last, wanted, strict=True):
        assert a is b
        assert torch.equal(a, c)
    half = paste_batch(images.bfloat16(), targets.clone(), bank, *arguments)
    torch.testing.assert_close(half[0].float(), wanted[0], atol=0.05, rtol=0.05)
    assert torch.equal(half[1], wanted[1])


def test_nothing_to_paste_changes_nothing():
    images, targets, memory, bank, _ = scene(6, (40, 40), 2, [(40, 40)])
    none = torch.zeros(0, dtype=torch.int64)
    empty = (none, none, none, none.view(0, 2), 19, torch.zeros(0), none.view(0, 4), none.bool())
    new, soft = paste_batch(images.clone(), targets.clone(), bank, *empty)
    assert torch.equal(new, images)
    assert torch.equal(soft, targets)
    memory.entries[0].label[:] = 0
    memory.entries[0].label[0, 0] = memory.entries[0].slot  # a single pixel
    one, box = torch.zeros(1, dtype=torch.int64), torch.tensor([[0, 0, 40, 40]])
    classes = torch.tensor([memory.entries[0].slot])
    single = (one, classes, one, one.expand(1, 2), 19, torch.ones(1), box, torch.tensor([False]))
    new, soft = paste_batch(images.clone(), targets.clone(), InstanceBank(memory), *single)
    # its box may be larger than one pixel after the crop was enlarged, but the canvas is as large as the picture
    assert torch.equal(new, images)
    assert torch.equal(soft, targets)


def test_a_crop_that_misses_the_instance_pastes_nothing():
    images, targets, _, _, _ = scene(7, (20, 20), 1, [(20, 20)])
    pixels, label = np.full((4, 4, 3), 200, np.uint8), np.ones((4, 4), np.uint8)
    bank = InstanceBank(reference.Memory([reference.Entry(pixels, label, (16, 16, 4, 4), (20, 20), 1)]))
    one = torch.zeros(1, dtype=torch.int64)
    rest = (one + 1, one, one.expand(1, 2), 9, torch.ones(1))
    missed = paste_batch(images.clone(), targets.clone(), bank, one, *rest, torch.tensor([[0, 0, 16, 16]]), one.bool())
    assert torch.equal(missed[0], images)
    hit = paste_batch(images.clone(), targets.clone(), bank, one, *rest, torch.tensor([[1, 1, 19, 19]]), one.bool())
    assert not torch.equal(hit[0], images)


def test_a_cell_larger_than_the_picture_is_refused():
    images, targets, memory, bank, generator = scene(8, (20, 30), 2, [(20, 20)])
    arguments = pastes(bank, memory, 1, 2, 10, (20, 30), generator)
    with pytest.raises(ValueError, match="cell=21; expected a side of 1 to 20"):
        paste_batch(images, targets, bank, *arguments[:4], 21, *arguments[5:])


@pytest.mark.gpu
def test_an_accelerator_gives_the_same():
    images, targets, memory, bank, generator = scene(9, (64, 64), 4, [(60, 64), (100, 90)])
    arguments = pastes(bank, memory, 4, 4, 31, (64, 64), generator)
    wanted = paste_batch(images.clone(), targets.clone(), bank, *arguments)
    found = paste_batch(images.cuda(), targets.cuda(), bank.to("cuda"), *arguments)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-5)
