"""Samples: draws by name, labels of the step, replayed entries, saliency, and what is said about bad files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from css.data.batch import Batch, Sample, collate
from css.data.dataset import CSSDataset
from css.data.options import LoaderConfig
from css.data.shapes import Shapes
from css.data.transforms import MEAN, STD
from css.task import Task
from PIL import Image
from polymodal.errors import UserError

TASK = Task("2-1", 4, order=(3, 1, 4, 2))
CONFIG = LoaderConfig(batch_size=4, crop=64)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Shapes(root=tmp_path_factory.mktemp("worlds"), images=(16, 2, 4))
    reader.prepare()
    return reader


def dataset(reader, step=0, config=CONFIG, items=None, **options):
    items = reader.items("train") if items is None else items
    return CSSDataset(reader, items, TASK.train_lut(step), config, seed=5, **options)


@dataclass
class Entry:
    """A memory entry made by hand."""

    id: str
    image: np.ndarray
    label: np.ndarray
    foreground: np.ndarray | None = None

    def load(self):
        return self.image, self.label, self.foreground


def picture(seed=0, size=(40, 56)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 3, size, dtype=np.uint8)


def same(left, right):
    return torch.equal(left.image, right.image) and torch.equal(left.label, right.label)


def test_sample_is_a_function_of_seed_epoch_and_picture(reader):
    data = dataset(reader, train=True)
    state = torch.get_rng_state()
    first = data[3, 1]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are touched
    torch.manual_seed(9)
    _ = data[0, 0]
    assert same(first, data[3, 1])
    alone = dataset(reader, train=True, items=[reader.items("train")[3]])
    assert same(first, alone[0, 1])  # its place in the list does not matter
    assert not same(first, data[3, 2])
    assert not same(data[3, 1], data[3, 1, 1])
    assert same(data[3], data[3, 0])
    other = CSSDataset(reader, reader.items("train"), TASK.train_lut(0), CONFIG, train=True, seed=6)
    assert not same(first, other[3, 1])


def test_sample_has_the_documented_form(reader):
    sample = dataset(reader, train=True)[0, 0]
    assert sample.id == "shapes-train-00000"
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.float32
    assert sample.label.shape == (64, 64)
    assert sample.label.dtype == torch.int64
    assert sample.saliency is None
    assert sample.replayed is False


def test_evaluation_draws_nothing(reader):
    data = dataset(reader)
    assert same(data[2, 0], data[2, 7])
    item = reader.items("train")[2]
    values = (reader.load_image(item) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(data[2].image.permute(1, 2, 0).numpy(), values, atol=1e-5)
    np.testing.assert_array_equal(data[2].label.numpy(), TASK.train_lut(0)[reader.load_mask(item)])


@pytest.mark.parametrize("step", [0, 1, 2])
def test_labels_are_channels_of_the_step_alone(reader, step):
    allowed = {0, *TASK.channels(step)}
    data = dataset(reader, step, train=True)
    found = set()
    for index in range(len(data)):
        found |= set(data[index, 0].label.unique().tolist())
    assert found == allowed


def test_native_pictures_keep_their_size(tmp_path):
    reader = Shapes(root=tmp_path, images=(2, 1, 1), size=40)
    item = reader.items("train")[0]
    sample = dataset(reader, native=True, items=[item])[0]
    np.testing.assert_array_equal(sample.label.numpy(), TASK.train_lut(0)[reader.load_mask(item)])
    assert sample.image.shape == (3, 40, 40)


def test_instance_is_zero_around_its_foreground(reader):
    image, label = picture()
    foreground = np.zeros(label.shape, bool)
    foreground[8:30, 10:40] = True
    label[10:14, 12:20] = 255
    config = LoaderConfig(crop=48, flip=0.5)
    instance = Entry("a", image, label, foreground)
    everything = Entry("a", image, label, np.ones_like(foreground))
    part = Entry("a", image, np.where(foreground, 7, 0).astype(np.uint8))
    for epoch in range(6):
        found, whole, inside = (
            dataset(reader, config=config, items=[], train=True, replay=[entry])[0, epoch]
            for entry in (instance, everything, part)
        )
        kept = inside.label == 7
        assert 0 < kept.float().mean() < 1
        assert found.replayed
        assert torch.equal(found.image, whole.image * kept)
        assert not found.image[:, ~kept].any()  # exactly zero, the mean colour
        assert not found.label[~kept].any()
        assert set(found.label.unique().tolist()) <= {0, 1, 2}  # ignored pixels are background here
        assert torch.equal(found.label[kept], whole.label[kept])


def test_whole_picture_of_an_earlier_step_keeps_its_labels(reader):
    image, label = picture()
    label[:20] = 255
    entry = Entry("a", image, label)
    config = LoaderConfig(crop=40, scale=(1.0, 1.0), ratio=(1.4, 1.4), flip=0.0)
    sample = dataset(reader, config=config, items=[], replay=[entry])[0]
    assert sample.replayed
    assert (sample.label[:20] == 255).all()
    np.testing.assert_array_equal(sample.label.numpy(), label[:, 8:48])
    values = (image[:, 8:48] / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(sample.image.permute(1, 2, 0).numpy(), values, atol=1e-5)


def test_entries_come_after_the_pictures_with_draws_of_their_own(reader):
    image, label = picture()
    entries = [Entry("shapes-train-00000", image, label), Entry("shapes-train-00000", image, label)]
    data = dataset(reader, train=True, replay=entries)
    assert len(data) == 18
    assert [data[i, 0].replayed for i in (0, 15, 16, 17)] == [False, False, True, True]
    assert same(data[16, 0], data[16, 0])
    assert not same(data[16, 0], data[17, 0])
    assert same(data[0, 0], dataset(reader, train=True)[0, 0])  # a memory does not change what else is drawn


def test_cache_decodes_each_picture_once_and_changes_nothing(reader, monkeypatch):
    plain = [dataset(reader, train=True)[i, e] for e in range(2) for i in range(4)]
    calls = []
    load = reader.load_image
    monkeypatch.setattr(reader, "load_image", lambda item: calls.append(item.id) or load(item), raising=False)
    data = dataset(reader, train=True, cache={})
    cached = [data[i, e] for e in range(2) for i in range(4)]
    assert len(calls) == 4
    assert all(same(a, b) for a, b in zip(plain, cached, strict=True))


class TestSaliency:
    @pytest.fixture
    def folder(self, reader, tmp_path):
        for item in reader.items("train"):
            mask = reader.load_mask(item)
            Image.fromarray(np.where(mask > 0, 200, 100).astype(np.uint8)).save(tmp_path / f"{item.id}.png")
        return tmp_path

    def test_maps_get_the_draw_of_their_picture(self, reader, folder):
        lut = np.minimum(np.arange(256), 1).astype(np.uint8)  # any shape
        config = LoaderConfig(crop=50, saliency=folder)
        data = CSSDataset(reader, reader.items("train"), lut, config, train=True, seed=5)
        for index in range(6):
            sample = data[index, 1]
            assert sample.saliency.dtype == torch.bool
            assert torch.equal(sample.saliency, sample.label > 0)
        assert data[0, 0].label.any()

    def test_entries_have_maps_too(self, reader, folder):
        item = reader.items("train")[0]
        mask = reader.load_mask(item)
        config = LoaderConfig(crop=64, saliency=folder)
        for foreground in (None, mask > 0):
            entry = Entry(item.id, reader.load_image(item), mask, foreground)
            sample = dataset(reader, config=config, items=[], train=True, replay=[entry])[0, 3]
            assert torch.equal(sample.saliency, sample.label > 0)

    def test_evaluation_reads_none(self, reader, tmp_path):
        assert dataset(reader, config=LoaderConfig(crop=64, saliency=tmp_path / "none"))[0].saliency is None

    def test_a_missing_map_and_one_of_another_size_are_named(self, reader, folder):
        data = dataset(reader, config=LoaderConfig(crop=64, saliency=folder), train=True)
        Image.fromarray(np.zeros((10, 20), np.uint8)).save(folder / "shapes-train-00001.png")
        (folder / "shapes-train-00002.png").unlink()
        with pytest.raises(UserError, match=r"00001\.png has 20 x 10 pixels, its picture 64 x 64"):
            _ = data[1, 0]
        with pytest.raises(UserError, match=r"shapes-train-00002\.png"):
            _ = data[2, 0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda item: item.image.write_bytes(item.image.read_bytes()[:300]), r"images/shapes-train-00001\.png"),
        (lambda item: item.mask.write_bytes(b"nonsense"), r"masks/shapes-train-00001\.png"),
        (lambda item: item.image.unlink(), r"images/shapes-train-00001\.png"),
        (lambda item: Image.fromarray(np.full((64, 64), 9, np.uint8)).save(item.mask), "unknown id 9"),
        (lambda item: Image.fromarray(np.zeros((60, 64), np.uint8)).save(item.mask), "64 x 64 pixels, mask"),
    ],
    ids=["short", "nonsense", "missing", "unknown id", "sizes"],
)
def test_a_bad_file_is_named_when_it_is_met(tmp_path, damage, words):
    reader = Shapes(root=tmp_path, images=(3, 1, 1))
    data = dataset(reader, train=True)
    damage(data.items[1])
    _ = data[0, 0], data[2, 0]
    with pytest.raises(UserError, match=words) as caught:
        _ = data[1, 0]
    assert "\n" not in str(caught.value)
    assert Path(tmp_path).name in str(caught.value)


def test_batch_stacks_moves_and_counts(reader):
    image, label = picture(size=(64, 64))
    data = dataset(reader, train=True, replay=[Entry("old", image, label)])
    batch = collate([data[0, 0], data[16, 0]])
    assert isinstance(batch, Batch)
    assert len(batch) == 2
    assert batch.ids == ["shapes-train-00000", "old"]
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.labels.shape == (2, 64, 64)
    assert batch.replayed.tolist() == [False, True]
    assert batch.saliency is None
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.replayed.device.type} == {"meta"}
    assert batch.images.device.type == "cpu"
    maps = [Sample(s.id, s.image, s.label, s.label > 0) for s in (data[0, 0], data[1, 0])]
    assert torch.equal(collate(maps).saliency, collate(maps).labels > 0)
    assert collate(maps).to("meta").saliency.device.type == "meta"
