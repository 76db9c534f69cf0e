"""The batch sampler, the lazy loader and the index cache."""

import json
import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.data import LengthBucketBatchSampler, drop_index, indexed
from polymodal.errors import UserError
from polymodal.loading import LazyLoader

_RNG = random.Random(1)
LENGTHS = [_RNG.randint(16, 120) for _ in range(97)]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_yields_index_and_epoch_and_every_sample_once():
    sampler = LengthBucketBatchSampler(LENGTHS, batch_size=8, seed=3)
    sampler.set_epoch(5)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 13
    assert {epoch for batch in batches for _, epoch in batch} == {5}
    assert sorted(index for batch in batches for index, _ in batch) == list(range(97))


def test_order_is_a_function_of_seed_and_epoch():
    first = LengthBucketBatchSampler(LENGTHS, batch_size=8, seed=3)
    other = LengthBucketBatchSampler(LENGTHS, batch_size=8, seed=3)
    other.set_epoch(9)
    list(other)  # what was iterated before does not matter
    other.set_epoch(2)
    first.set_epoch(2)
    assert list(first) == list(other)
    assert first.batches(2) != first.batches(3)
    assert LengthBucketBatchSampler(LENGTHS, batch_size=8, seed=4).batches(2) != first.batches(2)


def test_pools_make_batches_of_similar_length():
    def spread(pool):
        batches = LengthBucketBatchSampler(LENGTHS, batch_size=8, pool=pool).batches(0)
        return sum(max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in batches) / len(batches)

    assert spread(12) < 0.25 * spread(1)


def test_evaluation_goes_from_long_to_short_and_never_changes():
    sampler = LengthBucketBatchSampler(LENGTHS, batch_size=8, shuffle=False)
    lengths = [LENGTHS[i] for i in flat(sampler.batches(0))]
    assert lengths == sorted(LENGTHS, reverse=True)
    assert sampler.batches(0) == sampler.batches(7)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(20, 200),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 30),
)
def test_budget_holds_and_the_number_of_batches_is_constant(lengths, budget, world, seed, epoch):
    ranks = [
        LengthBucketBatchSampler(lengths, max_total=budget, seed=seed, rank=rank, world_size=world, pool=3)
        for rank in range(world)
    ]
    batches = ranks[0].batches(epoch)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert len(batches) == len(ranks[0]) * world
    for sampler in ranks:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    assert {index for share in shares for batch in share for index, _ in batch} == set(range(len(lengths)))
    if len(lengths) >= len(batches):
        assert sorted(flat(batches)) == list(range(len(lengths)))  # batches were halved, nothing was repeated


def test_ranks_take_different_batches():
    shares = [LengthBucketBatchSampler(LENGTHS, batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    seen = [{index for batch in share for index, _ in batch} for share in shares]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(97))


def test_fewer_samples_than_ranks_repeats_some():
    sampler = LengthBucketBatchSampler([5, 6], batch_size=1, world_size=4)
    assert sorted(flat(sampler.batches(0))) == [0, 0, 1, 1]


def test_drop_last():
    sampler = LengthBucketBatchSampler(LENGTHS, batch_size=8, drop_last=True, world_size=5)
    assert [len(batch) for batch in sampler.batches(0)] == [8] * 10
    with pytest.raises(UserError, match="97 samples do not fill 1 batches of 98"):
        LengthBucketBatchSampler(LENGTHS, batch_size=98, drop_last=True)


@pytest.mark.parametrize("size", [{"batch_size": 8}, {"max_total": 300}])
@pytest.mark.parametrize("done", [0, 1, 6, 11])
def test_resume_in_mid_epoch_goes_on_with_the_next_batch(size, done):
    sampler = LengthBucketBatchSampler(LENGTHS, **size, seed=2)
    sampler.set_epoch(4)
    whole = list(sampler)
    state = json.loads(json.dumps(sampler.state_dict(done)))

    resumed = LengthBucketBatchSampler(LENGTHS, **size, seed=2)
    resumed.load_state_dict(state)
    resumed.set_epoch(4)  # Lightning does this before the epoch; the place must survive it
    assert list(resumed) == whole[done:]
    assert len(resumed) == len(sampler)  # Lightning compares its own count with the whole epoch
    assert list(resumed) == whole, "a second pass over the epoch is a whole one"
    resumed.start_batch = 3
    resumed.set_epoch(5)
    assert len(list(resumed)) == len(resumed), "the place does not carry into the next epoch"


def test_a_place_in_other_data_is_refused():
    state = LengthBucketBatchSampler(LENGTHS, batch_size=8).state_dict(3)
    with pytest.raises(UserError, match="same settings"):
        LengthBucketBatchSampler(LENGTHS, batch_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 4, "max_total": 9},
        {"batch_size": 0},
        {"batch_size": 2, "pool": 0},
        {"batch_size": 2, "rank": 1},
        {"batch_size": 2, "lengths": []},
        {"batch_size": 2, "lengths": [3, 0]},
    ],
)
def test_bad_options_raise(options):
    with pytest.raises(ValueError):
        LengthBucketBatchSampler(**{"lengths": [1, 2, 3], **options})


class Echo:
    """Gives back its keys."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("workers", [0, 1])
def test_the_place_may_be_set_after_the_iterator_was_made(workers):
    sampler = LengthBucketBatchSampler(LENGTHS, batch_size=8)
    loader = LazyLoader(Echo(), batch_sampler=sampler, num_workers=workers, collate_fn=list)
    iterator = iter(loader)  # Lightning does this before on_train_start
    sampler.set_epoch(2)
    sampler.start_batch = 5
    assert [[index for index, _ in batch] for batch in iterator] == sampler.batches(2)[5:]


class Broken(Echo):
    """One bad file."""

    def __getitem__(self, key):
        raise UserError(f"frame {key[0]}.png: cannot be decoded; copy it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line_from_any_process(workers):
    sampler = LengthBucketBatchSampler([1], batch_size=1)
    with pytest.raises(UserError) as error:
        list(LazyLoader(Broken(), batch_sampler=sampler, num_workers=workers, collate_fn=list))
    assert str(error.value) == "frame 0.png: cannot be decoded; copy it again"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_index_is_built_once_per_state(cache):
    calls = []

    def build():
        calls.append(1)
        return {"n": len(calls)}

    assert indexed("frames a", [1, 2], build) == {"n": 1}
    assert indexed("frames a", [1, 2], build) == {"n": 1}
    assert indexed("frames b", [1, 2], build) == {"n": 2}
    assert indexed("frames a", [1, 3], build) == {"n": 3}
    assert len(list((cache / "index").iterdir())) == 2, "a new state overwrites the old one"
    drop_index("frames a")
    assert indexed("frames a", [1, 3], build) == {"n": 4}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 99, "identity": "frames a"}', b"\xff\xfe"])
def test_a_broken_index_is_made_again(cache, content, caplog):
    indexed("frames a", 0, lambda: 1)
    (file,) = (cache / "index").iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert indexed("frames a", 0, lambda: 2) == 2
    assert indexed("frames a", 0, lambda: 3) == 2


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "file"))
    assert indexed("frames a", 0, lambda: 7) == 7
    assert "cannot be written" in caplog.text
