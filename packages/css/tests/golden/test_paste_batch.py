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
