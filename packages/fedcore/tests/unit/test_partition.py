"""Partitions: sizes, label skew, repeats, the same draw for the same seed; and the papers' loop, written out slowly."""

import numpy as np
import pytest
from fedcore import partition as schemes
from fedcore.partition import (
    Partition,
    bin_targets,
    by_column,
    dirichlet_client,
    dirichlet_label,
    from_flwr,
    iid,
    shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

LABELS = np.arange(600) % 10
problems = st.tuples(st.integers(2, 6), st.integers(20, 200), st.integers(1, 15), st.integers(0, 50))
"""classes, samples, clients, seed"""


def labels_of(classes, samples, seed):
    return np.random.default_rng(seed).integers(0, classes, samples)


def skew(partition, labels):
    """Mean over clients of the share of a client's most frequent class."""
    counts = partition.counts(labels)
    return (counts.max(axis=1) / counts.sum(axis=1)).mean()


# ------------------------------------------------------------------ every scheme


@settings(max_examples=40, deadline=None)
@given(problems)
def test_every_scheme_is_a_function_of_its_seed_and_names_real_samples(problem):
    classes, samples, clients, seed = problem
    labels = labels_of(classes, samples, seed)
    for make in (
        lambda s: dirichlet_client(labels, clients, 0.3, s),
        lambda s: dirichlet_client(labels, clients, 0.3, s, refill=False),
        lambda s: dirichlet_label(labels, clients, 0.3, s),
        lambda s: shards(labels, clients, 1, s),
        lambda s: iid(samples, clients, s),
    ):
        one, again = make(seed), make(seed)
        assert len(one) == clients
        assert one.size == samples
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
        for indices in one:
            assert indices.dtype == np.int64
            assert np.all(np.diff(indices) >= 0)
        assert one.counts(labels, classes).sum(axis=1).tolist() == one.sizes


@pytest.mark.parametrize("make", [dirichlet_client, dirichlet_label, shards])
def test_another_seed_is_another_partition(make):
    option = 2 if make is shards else 0.3
    one, other = make(LABELS, 10, option, 0), make(LABELS, 10, option, 1)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ by client, with refill


@settings(max_examples=40, deadline=None)
@given(problems, st.integers(1, 40), st.sampled_from([0.05, 0.1, 1.0, 100.0]))
def test_dirichlet_client_gives_every_client_the_same_number(problem, each, alpha):
    classes, samples, clients, seed = problem
    labels = labels_of(classes, samples, seed)
    found = dirichlet_client(labels, clients, alpha, seed, each)
    assert found.sizes == [each] * clients
    # Refill takes a class's samples in turn: none is ahead of another of its class by more than one.
    times = np.bincount(np.concatenate(found.clients), minlength=samples)
    for label in np.unique(labels):
        assert np.ptp(times[labels == label]) <= 1


def test_dirichlet_client_is_the_papers_loop():
    """The loop of the authors' scripts with our generator: cumulative sums, stacks, refill with the whole class."""
    targets, clients, alpha, each, seed = labels_of(5, 90, 3), 8, 0.2, 25, 7
    rng = numpy_rng(seed, "partition", "dirichlet_client")
    members = {label: np.flatnonzero(targets == label) for label in range(5)}
    stacks = {label: list(rng.permutation(members[label])) for label in range(5)}
    expected = []
    for _ in range(clients):
        mix = rng.dirichlet([alpha] * 5)
        draws, ends, chosen = rng.random(each), np.cumsum(mix) / np.cumsum(mix)[-1], []
        for draw in draws:
            label = next(i for i, end in enumerate(ends) if draw < end)
            if not stacks[label]:
                stacks[label] = list(rng.permutation(members[label]))
            chosen.append(stacks[label].pop(0))
        expected.append(sorted(chosen))
    found = dirichlet_client(targets, clients, alpha, seed, each)
    assert [indices.tolist() for indices in found] == expected
    assert found.repeated == clients * each - len({index for chosen in expected for index in chosen}) > 0


def test_less_alpha_is_more_skew():
    found = [skew(dirichlet_client(LABELS, 20, alpha, 0), LABELS) for alpha in (0.05, 0.3, 1.0, 1000.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75
    assert found[-1] < 0.35  # 30 draws of ten classes


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from([0.01, 0.1, 1.0]))
def test_without_refill_no_sample_occurs_twice(problem, alpha):
    classes, samples, clients, seed = problem
    found = dirichlet_client(labels_of(classes, samples, seed), clients, alpha, seed, refill=False)
    assert found.repeated == 0
    assert found.sizes == [samples // clients] * clients


def test_without_refill_too_many_samples_are_refused():
    with pytest.raises(UserError, match=r"need 620 samples, the data set has 600; choose samples_per_client <= 60"):
        dirichlet_client(LABELS, 10, 0.1, 0, 62, refill=False)


# ------------------------------------------------------------------ by label


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from([0.02, 0.1, 1.0, 100.0]), st.integers(0, 1))
def test_dirichlet_label_neither_loses_nor_repeats_a_sample(problem, alpha, least):
    classes, samples, clients, seed = problem
    found = dirichlet_label(labels_of(classes, samples, seed), clients, alpha, seed, min_samples=least)
    assert sorted(np.concatenate(found.clients).tolist()) == list(range(samples))
    assert min(found.sizes) >= least
    assert found.how["moved"] <= clients * least


def test_small_clients_are_filled_from_the_largest():
    found = dirichlet_label(LABELS, 50, 0.01, 0, min_samples=5)
    assert min(found.sizes) == 5
    assert found.how["moved"] > 0
    empty = dirichlet_label(LABELS, 50, 0.01, 0, min_samples=0)
    assert empty.empty
    assert empty.how["moved"] == 0
    with pytest.raises(UserError, match=r"min_samples=13 for 50 clients; expected 0\.\.12"):
        dirichlet_label(LABELS, 50, 0.01, 0, min_samples=13)


def test_dirichlet_label_skews_too():
    assert skew(dirichlet_label(LABELS, 10, 0.05, 0), LABELS) > 0.5
    assert skew(dirichlet_label(LABELS, 10, 1000.0, 0), LABELS) < 0.13


# ------------------------------------------------------------------ shards, iid, columns


def test_two_shards_give_few_classes():
    found = shards(LABELS, 20, 2, 0)
    assert sorted(np.concatenate(found.clients).tolist()) == list(range(600))
    assert ((found.counts(LABELS) > 0).sum(axis=1) <= 3).all()
    with pytest.raises(UserError, match=r"shards_per_client=0; expected 1\.\.30"):
        shards(LABELS, 20, 0, 0)


def test_iid_is_even():
    found = iid(103, 10, 0)
    assert sorted(found.sizes) == [10] * 7 + [11] * 3
    assert sorted(np.concatenate(found.clients).tolist()) == list(range(103))
    with pytest.raises(UserError, match=r"11 clients for 10 samples; expected 1\.\.10"):
        iid(10, 11, 0)


def test_columns_are_natural_clients():
    found = by_column(np.array([2, 0, 2, 1]), ["a", "b", "c"])
    assert [indices.tolist() for indices in found] == [[1], [3], [0, 2]]
    assert found.names == ("a", "b", "c")
    named = by_column(np.array(["z", "x", "z"]))
    assert (named.names, named.sizes) == (("x", "z"), [1, 2])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: dirichlet_client(LABELS, 0, 0.1), r"0 clients for 600 samples; expected 1\.\.600"),
        (lambda: dirichlet_client(LABELS, 10, 0.0), r"alpha=0\.0; expected more than 0"),
        (lambda: dirichlet_label(LABELS, 10, float("nan")), "alpha=nan"),
        (lambda: dirichlet_client(LABELS, 10, 0.1, 0, 0), "samples_per_client=0; expected at least 1"),
        (lambda: dirichlet_label(LABELS / 2, 10, 0.1), "cut the numbers of a regression"),
        (lambda: shards(LABELS.reshape(2, -1), 10, 2), r"targets of shape \(2, 300\)"),
        (lambda: by_column(np.zeros((0,))), "expected one value a sample"),
        (lambda: Partition((np.array([0, 5]),), 5), r"client 0 has an index outside 0\.\.4"),
        (lambda: Partition((np.array([-1]),), 5), r"client 0 has an index outside 0\.\.4"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_numbers_become_five_classes():
    assert bin_targets(np.array([0, 0.99, 1, 2.5, 4, 5])).tolist() == [0, 0, 1, 2, 4, 4]
    assert bin_targets(np.array([3.0, 3.0])).tolist() == [0, 0]
    assert np.bincount(bin_targets(np.linspace(0, 5, 1000), 5)).tolist() == [200] * 5


def test_a_partition_describes_itself_in_a_line():
    found = Partition((np.array([0, 1]), np.array([1]), np.array([], dtype=np.int64)), 3, {"scheme": "mine"})
    assert repr(found) == "Partition(mine: 3 clients, 3 samples)"
    assert (found.sizes, found.empty, found.repeated) == ([2, 1, 0], [2], 1)
    assert found[1].tolist() == [1]
    assert set(schemes.__all__) >= {"dirichlet_client", "dirichlet_label", "shards", "iid", "by_column", "from_flwr"}


# ------------------------------------------------------------------ flwr-datasets, by what it offers


class _Column:
    def __init__(self, values):
        self.values = values

    def column(self, _):
        return self

    def to_pylist(self):
        return self.values


class _Rows:
    """What ``datasets.Dataset.select`` gives, as far as it is looked at."""

    column_names = ("label", "row")

    def __init__(self, size, chosen=None):
        self.chosen = list(range(size)) if chosen is None else chosen
        self._indices = None if chosen is None else _Column(chosen)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, name):
        return [number + 0 for number in self.chosen]


class _Partitioner:
    def __init__(self, parts, size, assigned=True):
        self.parts, self.num_partitions, self.whole = parts, len(parts), _Rows(size) if assigned else None

    @property
    def dataset(self):
        if self.whole is None:
            raise AttributeError("The dataset field should be set before using it.")
        return self.whole

    def load_partition(self, partition_id):
        return self.parts[partition_id]


def test_partitioners_of_flwr_are_taken_over():
    found = from_flwr(_Partitioner([_Rows(6, [4, 0]), _Rows(6, [1])], 6))
    assert [indices.tolist() for indices in found] == [[0, 4], [1]]
    assert (found.size, found.how["partitioner"]) == (6, "_Partitioner")
    whole = from_flwr(_Partitioner([_Rows(3)], 3))
    assert whole[0].tolist() == [0, 1, 2]
    named = from_flwr(_Partitioner([_Rows(6, [5, 2])], 6), index="row")
    assert named[0].tolist() == [2, 5]


def test_partitioners_that_do_not_say_enough_are_refused():
    with pytest.raises(UserError, match="list has no num_partitions"):
        from_flwr([])
    with pytest.raises(UserError, match="has no data set; assign one before"):
        from_flwr(_Partitioner([], 3, assigned=False))
    rows = _Rows(6, [1, 2])
    rows._indices = None
    with pytest.raises(UserError, match="partition 0 does not say which rows it has"):
        from_flwr(_Partitioner([rows], 6))
    with pytest.raises(UserError, match="has no column 'id'; columns: label, row"):
        from_flwr(_Partitioner([rows], 6), index="id")


def test_the_real_flwr_datasets():
    datasets = pytest.importorskip("datasets")
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    partitioner = partitioners.DirichletPartitioner(
        num_partitions=4, partition_by="label", alpha=0.5, min_partition_size=1
    )
    partitioner.dataset = datasets.Dataset.from_dict({"label": LABELS.tolist(), "row": list(range(600))})
    found = from_flwr(partitioner)
    assert sorted(np.concatenate(found.clients).tolist()) == list(range(600))
    same = from_flwr(partitioner, index="row")
    assert all(np.array_equal(a, b) for a, b in zip(found, same, strict=True))
