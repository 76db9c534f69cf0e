"""Samples in memory: subsets, batches, what is drawn and what is not."""

import pickle

import numpy as np
import pytest
import torch
from fedcore.batches import ClientData
from fedcore.data.arrays import ArrayData
from fedcore.data.transforms import CropFlip, Normalise
from torch.utils.data import Subset


def make(**options):
    inputs = torch.arange(24).reshape(8, 3)
    return ArrayData(inputs, torch.arange(8), groups=torch.arange(8) // 4, group_names=["a", "b"], **options)


def pictures():
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArrayData(
        images, torch.arange(8), augment=CropFlip(2), transform=Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    )


def test_subsets_of_subsets_mean_the_right_samples_and_copy_nothing():
    data = make()
    part = data.subset([6, 1, 1, 4]).subset(np.array([3, 1, 2]))
    assert part.targets.tolist() == [4, 1, 1]
    assert part.inputs[0].tolist() == [12, 13, 14]
    assert part.groups.tolist() == [1, 0, 0]
    assert part.tensors[0].data_ptr() == data.inputs.data_ptr()
    assert part.rows(torch.tensor([0, 2])).tolist() == [4, 1]
    assert (len(part), len(data)) == (3, 8)


def test_batches_are_the_samples_at_the_indices():
    part = make().subset([5, 2, 7])
    inputs, targets = part.batch(torch.tensor([2, 0]))
    assert targets.tolist() == [7, 5]
    assert inputs.tolist() == [[21, 22, 23], [15, 16, 17]]
    assert part[-1][1] == 7
    with pytest.raises(IndexError):
        part[3]


def test_only_training_batches_are_augmented_and_the_generator_decides_all():
    data, indices = pictures(), torch.tensor([0, 3, 5])
    plain = data.batch(indices)[0]
    torch.testing.assert_close(plain, data.batch(indices, None)[0], rtol=0, atol=0)
    torch.testing.assert_close(plain[1], data[3][0], rtol=0, atol=0)

    def drawn(part, seed):
        return part.batch(indices, torch.Generator().manual_seed(seed))[0]

    torch.testing.assert_close(drawn(data, 1), drawn(data, 1), rtol=0, atol=0)
    assert not torch.equal(drawn(data, 1), drawn(data, 2))
    assert not torch.equal(drawn(data, 1), plain)
    quiet = data.subset(range(8), augment=False)
    torch.testing.assert_close(drawn(quiet, 1), plain, rtol=0, atol=0)
    assert data.augment is not None


def test_stored_tensors_are_offered_only_where_batches_are_rows_of_them():
    assert make().tensors is not None
    assert pictures().tensors is None
    assert pictures().subset([0], augment=False).tensors is None


def test_one_tensor_dataset_holds_the_transformed_samples():
    data = pictures().subset([4, 2])
    whole = data.tensor_dataset()
    torch.testing.assert_close(whole.tensors[0][1], data[1][0], rtol=0, atol=0)
    assert whole.tensors[1].tolist() == [4, 2]


def test_the_engines_read_it_through_subsets_and_know_that_it_augments():
    for data, augments in ((pictures(), True), (make(), False)):
        client = ClientData(Subset(data, [6, 0, 3]))
        assert client.augments == augments
        inputs, targets = client.batch(torch.tensor([0, 2]), None)
        assert targets.tolist() == [6, 3]
        torch.testing.assert_close(inputs[1], data[3][0], rtol=0, atol=0)


def test_it_travels_to_worker_processes():
    data = pictures().subset([1, 2])
    copy = pickle.loads(pickle.dumps(data))
    one, other = (d.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0)) for d in (data, copy))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_targets_must_fit():
    with pytest.raises(ValueError, match="3 inputs, 2 targets"):
        ArrayData(torch.zeros(3, 1), torch.zeros(2))


def test_clients_say_which_rows_of_stored_tensors_their_batches_are():
    whole = ArrayData(torch.arange(12.0).reshape(6, 2), torch.arange(6))
    part = whole.subset([5, 1, 3])
    client = ClientData(Subset(part, [2, 0]))
    index = torch.tensor([1, 0])
    assert client.tensors is not None
    assert client.tensors[0] is part.tensors[0]
    assert client.rows(index).tolist() == [5, 3]
    for stored, gathered in zip(client.tensors, client.batch(index), strict=True):
        assert torch.equal(stored[client.rows(index)], gathered)
    changed = ArrayData(torch.ones(3, 2), torch.arange(3), transform=lambda inputs: inputs * 2)
    assert ClientData(changed).tensors is None
