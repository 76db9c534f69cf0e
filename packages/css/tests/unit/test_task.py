"""Tasks: which classes a step brings, the two numberings of a class, labels of training and test."""

from __future__ import annotations

import numpy as np
import pytest
from css.task import Task
from hypothesis import given
from hypothesis import strategies as st
from polymodal.errors import UserError

PUBLISHED = {
    ("19-1", 20): [19, 1],
    ("15-5", 20): [15, 5],
    ("15-1", 20): [15, 1, 1, 1, 1, 1],
    ("10-1", 20): [10] + [1] * 10,
    ("10-5", 20): [10, 5, 5],
    ("5-3", 20): [5, 3, 3, 3, 3, 3],
    ("2-2", 20): [2] * 10,
    ("5-1", 20): [5] + [1] * 15,
    ("offline", 20): [20],
    ("joint", 20): [20],
    ("20-1", 20): [20],
    ("100-50", 150): [100, 50],
    ("100-10", 150): [100] + [10] * 5,
    ("100-5", 150): [100] + [5] * 10,
    ("50-50", 150): [50, 50, 50],
}


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_published_tasks(name, classes):
    task = Task(name, classes)
    assert [len(ids) for ids in task.steps] == PUBLISHED[name, classes]
    assert sum(task.steps, ()) == tuple(range(1, classes + 1))
    assert task.num_steps == len(task.steps)


@pytest.mark.parametrize(
    ("name", "classes", "order", "words"),
    [
        ("15-2", 20, (), "task '15-2' does not fit 20 classes; after 15 base classes, steps of 1, 5 fit"),
        ("21-1", 20, (), "task '21-1' does not fit 20 classes; base must be 1..20"),
        ("0-5", 20, (), "base must be 1..20"),
        ("15-0", 20, (), "steps of 1, 5 fit"),
        ("15", 20, (), "task '15'; expected 'B-I' such as 15-1"),
        ("15-1-1", 20, (), "expected 'B-I'"),
        (" 15-1", 20, (), "expected 'B-I'"),
        ("all", 20, (), "or offline"),
        ("2-1", 0, (), "num_classes=0; expected 1..254"),
        ("2-1", 255, (), "num_classes=255; expected 1..254"),
        ("2-1", 4, (1, 2, 3), "class order has 3 entries; expected each of 1..4 once"),
        ("2-1", 4, (1, 2, 3, 3), "expected each of 1..4 once"),
        ("2-1", 4, (0, 1, 2, 3), "expected each of 1..4 once"),
    ],
)
def test_what_is_no_task_is_refused(name, classes, order, words):
    with pytest.raises(UserError) as refusal:
        Task(name, classes, order)
    assert words in str(refusal.value)


def test_the_largest_label_is_not_the_ignored_one():
    task = Task("253-1", 254)
    assert task.num_channels(1) == 255
    assert task.test_lut(1)[254] == 254
    assert task.test_lut(1)[255] == 255


def test_a_permuted_task_by_hand():
    task = Task("2-1", 4, (3, 1, 4, 2))
    assert task.steps == ((3, 1), (4,), (2,))
    assert [list(task.channels(step)) for step in range(3)] == [[1, 2], [3], [4]]
    assert [task.num_old(step) for step in range(3)] == [0, 2, 3]
    assert [task.seen(step) for step in range(3)] == [(3, 1), (3, 1, 4), (3, 1, 4, 2)]
    assert task.train_lut(1)[:6].tolist() == [0, 0, 0, 0, 3, 0]
    assert task.train_lut(1, keep_old=True)[:6].tolist() == [0, 2, 0, 1, 3, 0]
    assert task.test_lut(1)[:6].tolist() == [0, 2, 0, 1, 3, 0]
    assert task.test_lut(1, unseen_as=255)[:6].tolist() == [0, 2, 255, 1, 3, 0]


@st.composite
def tasks(draw):
    more = draw(st.integers(1, 5))
    later = draw(st.integers(0, 5))
    base = draw(st.integers(1, 10))
    total = base + more * later
    return Task(f"{base}-{more}", total, tuple(draw(st.permutations(range(1, total + 1)))))


@given(tasks(), st.data())
def test_labels_of_a_step(task, data):
    step = data.draw(st.integers(0, task.num_steps - 1))
    raw = np.arange(task.num_classes + 1)
    train, kept, test = task.train_lut(step), task.train_lut(step, keep_old=True), task.test_lut(step)
    unseen = task.test_lut(step, unseen_as=255)
    for table in (train, kept, test, unseen):
        assert (table.dtype, table.shape) == (np.uint8, (256,))
        assert (table[0], table[255]) == (0, 255)
    own = set(task.channels(step))
    assert {int(train[r]) for r in raw} == own | {0}
    assert all(task.channel(int(r)) == train[r] for r in raw if train[r])
    assert {int(test[r]) for r in raw} == set(range(task.num_channels(step)))
    assert (kept[raw] == test[raw]).all()
    hidden = test[raw[1:]] == 0
    assert (unseen[raw[1:]][hidden] == 255).all()
    assert (unseen[raw[1:]][~hidden] == test[raw[1:]][~hidden]).all()
    assert {int(r) for r in raw[1:] if test[r]} == set(task.seen(step))


@given(tasks())
def test_raw_ids_and_channels_are_two_names_of_a_class(task):
    assert [task.raw(task.channel(raw)) for raw in range(task.num_classes + 1)] == list(range(task.num_classes + 1))
    places = [channel for step in range(task.num_steps) for channel in task.channels(step)]
    assert places == list(range(1, task.num_classes + 1))
    for step, classes in enumerate(task.steps):
        assert [task.channel(raw) for raw in classes] == list(task.channels(step))
        assert task.num_old(step) + 1 == task.channels(step).start
