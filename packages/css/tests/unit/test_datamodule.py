"""Loaders of a step: which pictures and labels they have, how a memory is mixed in, what each process gets."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from css.data import datamodule
from css.data.datamodule import CSSDataModule, ReplaySampler
from css.data.options import LoaderConfig
from css.data.pairs import Pairs
from css.data.shapes import Shapes
from css.data.split_files import write_splits
from css.task import Task
from PIL import Image
from polymodal.errors import UserError

TASK = Task("2-1", 4, order=(2, 4, 1, 3))
SETTINGS = ("overlap", "disjoint", "sequential", "partitioned")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        reader = Shapes(images=(60, 12, 16))
        reader.prepare()
        yield reader


@dataclass
class Entry:
    """A memory entry: one colour, one class."""

    id: str
    channel: int = 1

    def load(self):
        label = np.full((32, 32), self.channel, np.uint8)
        return np.full((32, 32, 3), 90, np.uint8), label, label > 0


def make(reader, step=0, setting="overlap", task=TASK, config=None, **options):
    config = config or LoaderConfig(batch_size=8, eval_batch_size=5, crop=32)
    data = CSSDataModule(reader, task, setting, step, config, seed=4, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def epoch(data, number=0):
    data.train_sampler.set_epoch(number)
    return list(data.train_dataloader())


def ids(batches):
    return [name for batch in batches for name in batch.ids]


def labels(batches):
    return set(itertools.chain.from_iterable(batch.labels.unique().tolist() for batch in batches))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_training_sees_pictures_and_labels_of_the_step_alone(reader, setting, step):
    data = make(reader, step, setting)
    sets = dict(zip((item.id for item in reader.items("train")), reader.class_sets("train"), strict=True))
    names = [item.id for item in data.train_items()]
    assert all(set(sets[name]) & set(TASK.steps[step]) for name in names)
    batches = [batch for number in range(3) for batch in epoch(data, number)]
    assert set(ids(batches)) <= set(names)
    seen = range(1, TASK.num_channels(step)) if setting == "sequential" else TASK.channels(step)
    assert labels(batches) == {0, *seen}  # no later class, and old ones in one setting only
    assert not any(batch.replayed.any() for batch in batches)


def test_all_labels_of_a_picture_where_they_are_to_be_kept(reader):
    data = make(reader, 2, "overlap", keep_old=True)
    assert labels(epoch(data)) == {0, 1, 2, 3, 4}
    joint = make(reader, 0, task=Task("offline", 4))
    assert labels(epoch(joint)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_evaluation_has_all_classes_so_far(reader, step):
    data = make(reader, step)
    seen = set(TASK.seen(step))
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        pairs = zip(reader.items(split), reader.class_sets(split), strict=True)
        expected = [item.id for item, found in pairs if seen & set(found)]
        batches = list(loader)
        assert ids(batches) == expected
        assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
        assert labels(batches) == set(range(TASK.num_channels(step)))


def test_later_classes_are_background_or_ignored_in_evaluation(reader):
    ignoring = LoaderConfig(eval_batch_size=5, crop=32, unseen_as="ignore")
    plain, ignored = (make(reader, 0, config=config) for config in (None, ignoring))
    assert labels(ignored.test_dataloader()) == {0, 1, 2, 255}
    for left, right in zip(plain.test_dataloader(), ignored.test_dataloader(), strict=True):
        assert torch.equal(left.labels, torch.where(right.labels == 255, 0, right.labels))


def test_epoch_shuffles_and_leaves_out_what_fills_no_batch(reader):
    data = make(reader)
    count = len(data.train_items())
    first, second = ids(epoch(data, 0)), ids(epoch(data, 1))
    assert len(first) == len(set(first)) == count // 8 * 8 == 8 * len(data.train_sampler)
    assert first != second
    assert count % 8
    few = make(reader, config=LoaderConfig(batch_size=500, crop=32))
    assert [len(batch) for batch in epoch(few)] == [count]


def test_plain_batches_are_all_pictures_in_order_without_draws(reader):
    data = make(reader, 1, replay=[Entry("old")])
    batches = list(data.plain_batches())
    assert ids(batches) == [item.id for item in data.train_items()]
    assert labels(batches) == {0, *TASK.channels(1)}
    again = list(data.plain_batches())
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))
    native = make(reader, 1, config=LoaderConfig(eval_batch_size=4, crop=32, eval_size="native"))
    assert next(native.plain_batches()).images.shape == (4, 3, 32, 32)


def test_entries_join_the_pictures_once_an_epoch(reader):
    entries = [Entry(f"old{i}") for i in range(7)]
    config = LoaderConfig(batch_size=1, crop=32)
    batches = epoch(make(reader, 1, config=config, replay=entries))
    replayed = [batch for batch in batches if batch.replayed.any()]
    assert sorted(ids(replayed)) == [entry.id for entry in entries]
    assert len(batches) == 7 + len(make(reader, 1).train_items())
    assert all(batch.labels.unique().tolist() == [1] for batch in replayed)


class TestHalf:
    def make(self, reader, batch_size=9):
        entries = [Entry(f"old{i}") for i in range(6)]
        config = LoaderConfig(batch_size=batch_size, crop=32)
        return make(reader, 1, config=config, replay=entries, mix="half")

    def test_half_of_each_batch_is_replayed_and_new_pictures_come_once(self, reader):
        data = self.make(reader)
        batches = epoch(data)
        assert {(len(b), int(b.replayed.sum())) for b in batches} == {(9, 4)}
        new = [name for b in batches for name, old in zip(b.ids, b.replayed.tolist(), strict=True) if not old]
        assert len(new) == len(set(new)) == len(data.train_items()) // 5 * 5
        counts = Counter(name for name in ids(batches) if name.startswith("old"))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == 6

    def test_an_entry_that_comes_again_is_drawn_anew(self, reader):
        data = self.make(reader)
        keys = [key for batch in data.train_sampler for key in batch if key[0] >= len(data.train_items())]
        assert len(keys) == len(set(keys)) > 12
        assert {key[2] for key in keys} >= {0, 1}

    def test_batches_are_a_function_of_the_epoch_and_can_be_entered_anywhere(self, reader):
        sampler = self.make(reader).train_sampler
        sampler.set_epoch(2)
        whole = list(sampler)
        for start in range(len(sampler)):
            sampler.start_batch = start
            assert list(sampler) == whole[start:]
        sampler.set_epoch(3)
        assert list(sampler) != whole

    def test_processes_share_the_order_of_entries(self):
        options = {"seed": 1, "pool": 1, "drop_last": True}
        single = [key for batch in ReplaySampler(40, 7, 4, 3, **options) for key in batch]
        ranks = [ReplaySampler(40, 7, 4, 3, rank=rank, world_size=2, **options) for rank in range(2)]
        shared = [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch]
        assert shared == single

    def test_without_entries_batches_are_whole(self, reader):
        config = LoaderConfig(batch_size=8, crop=32)
        assert {len(batch) for batch in epoch(make(reader, 1, config=config, mix="half"))} == {8}

    def test_a_batch_of_one_cannot_be_halved(self, reader):
        with pytest.raises(UserError, match="batch_size=1"):
            self.make(reader, batch_size=1)


def test_processes_divide_the_batches(reader, monkeypatch):
    single = make(reader)
    tests = ids(single.test_dataloader())
    whole = [batch.ids for batch in epoch(single, 1)]
    found = []
    for rank in range(2):
        monkeypatch.setattr(datamodule, "_ranks", lambda shard, rank=rank: (rank, 2) if shard else (0, 1))
        data = make(reader)
        found.append([batch.ids for batch in epoch(data, 1)])
        assert ids(data.loader("test", shard=False)) == tests
        assert ids(data.plain_batches()) == ids(single.plain_batches())
        assert 0 < len(ids(data.test_dataloader())) < len(tests)
    assert len(found[0]) == len(found[1])
    together = [batch for pair in zip(*found, strict=True) for batch in pair]
    assert together == whole[: len(together)]


def test_native_size_takes_pictures_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 3)):
        for number in range(count):
            mask = rng.integers(0, 3, (20 + number, 30), dtype=np.uint8)
            for kind, array in (("images", np.stack([mask] * 3, 2)), ("masks", mask)):
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / split / kind / f"{split}{number}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = LoaderConfig(batch_size=2, crop=16, eval_size="native")
    data = make(Pairs(root=tmp_path), task=Task("1-1", 2), config=config)
    assert [tuple(batch.images.shape) for batch in data.test_dataloader()] == [(1, 3, 20 + n, 30) for n in range(3)]
    assert {tuple(batch.images.shape[2:]) for batch in epoch(data)} == {(16, 16)}
    assert data.val_dataloader() == []  # it has no validation pictures


def test_no_validation_picture_of_the_classes_is_no_error(tmp_path):
    reader = Shapes(root=tmp_path, images=(40, 1, 8))
    (only,) = reader.class_sets("val")
    other = [raw for raw in range(1, 5) if raw not in only]
    data = make(reader, task=Task("1-1", 4, order=(other[0], *sorted({1, 2, 3, 4} - {other[0]}))))
    assert data.val_dataloader() == []


def test_a_step_without_pictures_says_which(tmp_path):
    reader = Shapes(root=tmp_path, images=(1, 1, 1))
    missing = next(raw for raw in range(1, 5) if raw not in reader.class_sets("train")[0])
    task = Task("1-1", 4, order=(missing, *sorted({1, 2, 3, 4} - {missing})))
    with pytest.raises(UserError, match="step 0"):
        make(reader, task=task)


def test_split_files_take_the_place_of_the_setting(reader, tmp_path):
    write_splits(tmp_path, reader, TASK, "disjoint")
    given = Shapes(images=(60, 12, 16), split_files=tmp_path)
    data, selected = make(given, 1, "disjoint"), make(reader, 1, "disjoint")
    assert data.train_items() == selected.train_items()
    assert ids(data.test_dataloader()) == ids(selected.test_dataloader())
    with pytest.raises(UserError, match="setting"):
        make(given, 1, "overlap")


def test_decoded_pictures_stay_where_they_fit(reader, monkeypatch):
    small = make(reader)
    _ = epoch(small)
    dataset = small.train_dataloader().dataset
    assert 0 < len(dataset.cache) <= len(small.train_items())
    monkeypatch.setattr(datamodule, "_CACHE_BYTES", 1000)
    assert make(reader).train_dataloader().dataset.cache is None
    monkeypatch.undo()
    assert make(reader, config=LoaderConfig(num_workers=1)).train_dataloader().dataset.cache is None


def test_options_out_of_range_are_refused():
    for options in ({"crop": 0}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}, {"num_workers": -1}):
        with pytest.raises(UserError, match=f"loader.{next(iter(options))}"):
            LoaderConfig(**options)
