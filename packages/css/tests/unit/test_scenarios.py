"""Which pictures belong to which step: published counts, and what must hold for any class sets."""

from itertools import pairwise
from pathlib import Path

import pytest
from css.data.scenarios import SETTINGS, held_out, partition_class, select_test, select_train
from css.task import Task
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEEN_15_1 = [1240, 1277, 1329, 1353, 1421, 1449]

# Numbers of pictures per step in published index files: (data set, task, setting, training pictures, test pictures).
PUBLISHED = [
    ("voc", "15-1", "overlap", [9568, 487, 299, 491, 500, 548], SEEN_15_1),
    ("voc", "15-1", "disjoint", [8437, 378, 299, 420, 500, 548], SEEN_15_1),
    ("voc", "15-5", "overlap", [9568, 2145], [1240, 1449]),
    ("voc", "15-5", "disjoint", [8437, 2145], [1240, 1449]),
    ("voc", "19-1", "overlap", [10410, 548], [1421, 1449]),
    ("voc", "19-1", "disjoint", [10034, 548], [1421, 1449]),
    (
        "voc",
        "10-1",
        "overlap",
        [6139, 528, 1177, 444, 482, 3898, 487, 299, 491, 500, 548],
        [869, 893, 1005, 1081, 1140, *SEEN_15_1],
    ),
    ("voc", "5-3", "overlap", [2836, 2331, 1542, 2095, 4484, 1468], [433, 699, 893, 1140, 1329, 1449]),
    # The published index of 100-50 has 20,210 pictures in step 0, that of 100-10 has 20,192 for the same classes: the
    # former was not filtered. The rule (a picture has a class of the step) gives 20,192.
    ("ade20k", "100-50", "overlap", [20192, 9390], [2000, 2000]),
    ("ade20k", "100-10", "overlap", [20192, 1710, 2294, 2747, 4279, 2844], [2000] * 6),
    (
        "ade20k",
        "100-5",
        "overlap",
        [20192, 1142, 600, 1234, 1204, 1151, 1874, 1807, 2943, 1238, 1898],
        [2000] * 11,
    ),
    ("ade20k", "50-50", "overlap", [20177, 13186, 9390], [1997, 2000, 2000]),
]


@pytest.fixture(scope="module")
def lists():
    """Class sets by data set and split, from the constructed lists."""
    found = {}
    for name in ("voc", "ade20k"):
        sets = found[name] = {}
        for line in (FIXTURES / f"{name}_class_lists.txt").read_text().splitlines():
            if line.startswith("["):
                current = sets.setdefault(line.strip("[]"), [])
            elif not line.startswith("#"):
                count, _, ids = line.partition(":")
                current += [tuple(map(int, ids.split()))] * int(count)
    return found


def test_the_lists_have_every_class_and_the_published_sizes(lists):
    for name, classes, train, test in (("voc", 20, 10582, 1449), ("ade20k", 150, 20210, 2000)):
        assert (len(lists[name]["train"]), len(lists[name]["test"])) == (train, test)
        assert {number for ids in lists[name]["train"] for number in ids} == set(range(1, classes + 1))
        assert "CONSTRUCTED" in (FIXTURES / f"{name}_class_lists.txt").read_text()


@pytest.mark.parametrize(
    ("data", "name", "setting", "train", "test"), PUBLISHED, ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in PUBLISHED]
)
def test_published_numbers_of_pictures(lists, data, name, setting, train, test):
    task = Task(name, 20 if data == "voc" else 150)
    sets = lists[data]
    assert [len(select_train(task, sets["train"], setting, step)) for step in range(task.num_steps)] == train
    assert [len(select_test(task, sets["test"], step)) for step in range(task.num_steps)] == test


def test_offline_takes_every_picture_with_a_class(lists):
    for name, classes, count in (("voc", 20, 10582), ("ade20k", 150, 20192)):
        sets = lists[name]["train"]
        labelled = [i for i, ids in enumerate(sets) if ids]
        assert len(labelled) == count  # the other 18 of the list for ADE20K have no class at all
        for setting in SETTINGS:
            ids = [str(i) for i in range(len(sets))]
            assert select_train(Task("offline", classes), sets, setting, 0, ids=ids) == labelled


# --- the rules by example -------------------------------------------------------------------------------------------

#           0       1          2       3          4     5     6
EXAMPLE = [(1, 2), (1, 2, 3), (3,), (1, 3, 4), (4,), (), (2, 4)]
IDS = [f"p{k}" for k in range(len(EXAMPLE))]


def chosen(setting, order=(), name="2-1"):
    task = Task(name, 4, order)
    return [select_train(task, EXAMPLE, setting, step, ids=IDS) for step in range(task.num_steps)]


def test_overlap_needs_a_class_of_the_step():
    assert chosen("overlap") == [[0, 1, 3, 6], [1, 2, 3], [3, 4, 6]]


def test_disjoint_has_no_class_of_later_steps():
    assert chosen("disjoint") == [[0], [1, 2], [3, 4, 6]]
    assert chosen("sequential") == chosen("disjoint")


def test_the_class_order_decides_not_the_ids():
    assert chosen("overlap", (4, 3, 2, 1)) == [[1, 2, 3, 4, 6], [0, 1, 6], [0, 1, 3]]
    assert chosen("disjoint", (4, 3, 2, 1)) == [[2, 4], [6], [0, 1, 3]]


def test_test_pictures_have_a_class_seen_so_far():
    task = Task("2-1", 4, (4, 3, 2, 1))
    seen = [select_test(task, EXAMPLE, step) for step in range(3)]
    assert seen == [[1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6]]


# --- what must hold for any class sets ------------------------------------------------------------------------------

SETS = st.lists(st.sets(st.integers(1, 6)).map(lambda ids: tuple(sorted(ids))), max_size=25)
TASKS = st.builds(
    lambda name, order: Task(name, 6, tuple(order)),
    st.sampled_from(["2-1", "4-2", "3-3", "1-1", "5-1", "offline"]),
    st.permutations(range(1, 7)),
)


@settings(max_examples=80, deadline=None)
@given(task=TASKS, sets=SETS, seed=st.integers(0, 5))
def test_steps_of_every_setting(task, sets, seed):
    ids = [f"picture {k}" for k in range(len(sets))]
    steps = {
        setting: [
            set(select_train(task, sets, setting, step, ids=ids, seed=seed, allow_empty=True))
            for step in range(task.num_steps)
        ]
        for setting in SETTINGS
    }
    labelled = {i for i, found in enumerate(sets) if found}
    for step, overlap in enumerate(steps["overlap"]):
        assert all(set(task.steps[step]) & set(sets[i]) for i in overlap)
        for setting in SETTINGS:
            assert steps[setting][step] <= overlap
        for i in steps["disjoint"][step]:
            assert set(sets[i]) <= set(task.seen(step))
    assert steps["sequential"] == steps["disjoint"]
    for setting in SETTINGS:  # every picture with a class is somewhere
        assert set().union(*steps[setting]) == labelled
    for setting in ("disjoint", "partitioned"):  # and in one place only
        assert sum(map(len, steps[setting])) == len(labelled)
    seen = [set(select_test(task, sets, step, allow_empty=True)) for step in range(task.num_steps)]
    assert all(a <= b for a, b in pairwise(seen))
    assert seen[-1] == labelled


@settings(max_examples=50, deadline=None)
@given(data=st.data(), sets=SETS.filter(len), seed=st.integers(0, 5))
def test_the_partition_depends_on_nothing_but_seed_and_picture(data, sets, seed):
    task = Task("2-1", 6)
    pictures = [(f"picture {k}", found) for k, found in enumerate(sets)]
    others = data.draw(st.permutations(pictures))[: data.draw(st.integers(1, len(sets)))]

    def steps(listed, task):
        ids, found = [name for name, _ in listed], [classes for _, classes in listed]
        return {
            ids[i]: step
            for step in range(task.num_steps)
            for i in select_train(task, found, "partitioned", step, ids=ids, seed=seed, allow_empty=True)
        }

    everywhere = steps(pictures, task)
    assert steps(others, task) == {name: everywhere[name] for name, found in others if found}
    by_class = {name: partition_class(found, name, seed) for name, found in pictures if found}
    assert all(by_class[name] in task.steps[step] for name, step in everywhere.items())
    fine = Task("1-1", 6)  # the same classes in other steps: the same partition
    assert steps(pictures, fine) == {name: number - 1 for name, number in by_class.items()}


def test_the_partition_is_fair_and_follows_the_seed():
    names = [f"n{k}" for k in range(3000)]
    drawn = [partition_class((2, 5, 9), name, 1) for name in names]
    for number in (2, 5, 9):
        assert abs(drawn.count(number) - 1000) < 110  # 4 standard deviations
    again = [partition_class((9, 2, 5), name, 2) for name in names]
    assert 800 < sum(a == b for a, b in zip(drawn, again, strict=True)) < 1200
    assert partition_class((), "n", 0) is None


def test_the_held_out_share_grows_and_keeps_what_it_had():
    names = [f"2007_{k:06d}" for k in range(4000)]
    tenth = {name for name in names if held_out(name, 0.1)}
    fifth = {name for name in names if held_out(name, 0.2)}
    assert tenth < fifth
    assert abs(len(tenth) - 400) < 76  # 4 standard deviations
    assert abs(len(fifth) - 800) < 101
    assert not any(held_out(name, 0) for name in names)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_empty_step_names_step_and_classes():
    task = Task("2-1", 4)
    with pytest.raises(UserError, match=r"task 2-1, step 1, setting overlap: no training picture for the classes 3;"):
        select_train(task, [(1,), (2, 4)], "overlap", 1)
    with pytest.raises(UserError, match=r"step 0, setting disjoint: .* classes 1 \(cat\), 2 \(dog\);"):
        select_train(task, [(1, 3)], "disjoint", 0, names=["cat", "dog", "cow", "hen"])
    with pytest.raises(UserError, match=r"step 1, no test picture for the classes 3;"):
        select_test(task, [(4,)], 1)
    assert select_train(task, [], "overlap", 0, allow_empty=True) == []
    assert select_test(task, [(4,)], 1, allow_empty=True) == []
    with pytest.raises(UserError, match=r"classes 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.;"):
        select_train(Task("10-5", 20), [(11,)], "overlap", 0)


def test_unknown_settings_and_steps_are_refused():
    task = Task("2-1", 4)
    with pytest.raises(UserError, match="setting 'overlapped'; expected one of overlap, disjoint"):
        select_train(task, EXAMPLE, "overlapped", 0)
    for step in (-1, 3):
        with pytest.raises(UserError, match=rf"step {step}; task 2-1 has the steps 0\.\.2"):
            select_train(task, EXAMPLE, "overlap", step)
        with pytest.raises(UserError, match=rf"step {step}; task 2-1 has the steps 0\.\.2"):
            select_test(task, EXAMPLE, step)
    with pytest.raises(ValueError, match="give ids"):
        select_train(task, EXAMPLE, "partitioned", 0)
