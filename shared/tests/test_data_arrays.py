"""The memory-mapped array cache."""

import json
import pickle

import numpy as np
import pytest
from polymodal.data import ArrayCache, ArrayCacheWriter
from polymodal.errors import UserError

ARRAYS = {
    "a": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "b/ü": np.linspace(0, 1, 7, dtype=np.float16),
    "empty": np.zeros((0, 5), dtype=np.float32),
    "strided": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
}


@pytest.fixture
def cache(tmp_path):
    with ArrayCacheWriter(tmp_path / "cache", {"size": 24}) as writer:
        for key, array in ARRAYS.items():
            writer.add(key, array)
    return tmp_path / "cache"


def test_round_trip(cache):
    read = ArrayCache(cache)
    assert read.meta == {"size": 24}
    assert list(read) == list(ARRAYS)
    assert len(read) == 4
    assert "a" in read
    assert "c" not in read
    for key, array in ARRAYS.items():
        assert read[key].dtype == array.dtype
        assert read[key].shape == array.shape
        np.testing.assert_array_equal(read[key], array)
    assert pickle.loads(pickle.dumps(read))["a"][1, 2, 3] == 23
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0] = 1


def test_unknown_key(cache):
    with pytest.raises(UserError, match=r"has no 'c' \(4 keys\)"):
        ArrayCache(cache)["c"]


def test_nothing_appears_before_the_end_and_nothing_stays_after_an_error(tmp_path):
    writer = ArrayCacheWriter(tmp_path / "cache").__enter__()
    writer.add("a", ARRAYS["a"])
    assert not (tmp_path / "cache").exists()
    writer.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_cache_is_replaced_only_on_request(cache):
    with pytest.raises(UserError, match="exists"), ArrayCacheWriter(cache):
        pass
    with ArrayCacheWriter(cache, overwrite=True) as writer:
        writer.add("new", np.ones(3, dtype=np.float32))
    assert list(ArrayCache(cache)) == ["new"]
    assert [p.name for p in cache.parent.iterdir()] == ["cache"]


def test_keys_and_dtypes_are_checked(tmp_path):
    with ArrayCacheWriter(tmp_path / "cache") as writer:
        writer.add("a", np.zeros(1, np.uint8))
        with pytest.raises(UserError, match="'a' was added before"):
            writer.add("a", np.zeros(1, np.uint8))
        with pytest.raises(UserError, match="allowed are uint8"):
            writer.add("b", np.array(["x"], dtype=object))
    assert list(ArrayCache(tmp_path / "cache")) == ["a"]


def edit(cache, change):
    path = cache / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(schema="other"), "is broken"),
        (lambda i: i.update(schema_version=2), "schema version 2, known is 1"),
        (lambda i: i.pop("meta"), "is broken"),
        (lambda i: i["arrays"].update(a=[0, "uint8", [10**9]]), "reaches past the end"),
        (lambda i: i["arrays"].update(a=[-1, "uint8", [1]]), "entry 'a'"),
        (lambda i: i["arrays"].update(a=[0, "object", [1]]), "entry 'a'"),
        (lambda i: i["arrays"].update(a=[0, "uint8", [-1, -1]]), "entry 'a'"),
    ],
)
def test_a_tampered_index_is_refused_before_anything_is_mapped(cache, change, message):
    edit(cache, change)
    with pytest.raises(UserError, match=message):
        ArrayCache(cache)


def test_a_truncated_file_is_refused(cache):
    data = (cache / "data.bin").read_bytes()
    (cache / "data.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"data.bin has \d+ bytes, the index says \d+.*build it"):
        ArrayCache(cache)
    (cache / "data.bin").unlink()
    with pytest.raises(UserError, match=r"data\.bin is missing"):
        ArrayCache(cache)


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), ArrayCacheWriter(tmp_path / "file" / "cache"):
        pass
