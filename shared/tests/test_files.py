"""Writes that are whole or not there, and what a full disk or a closed folder looks like."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from polymodal.callbacks import AtomicCheckpointIO
from polymodal.errors import UserError
from polymodal.files import append_text, atomic_write, check_writable, remove_unfinished, write_json, write_text


def raises(number: int):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_writes_and_replaces(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "eins\n")
    write_text(tmp_path / "a.txt", "zwei ü\n")
    write_json(tmp_path / "b.json", {"ü": [1, 2]})
    append_text(tmp_path / "a.txt", "drei\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "zwei ü\ndrei\n"
    assert "ü" in (tmp_path / "b.json").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.json"]


@pytest.mark.parametrize("error", [ValueError("own"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(handle) -> None:
        handle.write(b"half of the new")
        raise error

    with pytest.raises(type(error)) as found:
        atomic_write(path, writer)
    assert found.value is error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", raises(errno.ENOSPC))
    if when == "replace":
        monkeypatch.setattr(Path, "replace", raises(errno.EDQUOT))
    writer = raises(errno.ENOSPC) if when == "write" else lambda handle: handle.write(b"new")
    with pytest.raises(UserError, match=r"disk full while writing .*a\.json .*MiB free.*--resume") as found:
        atomic_write(path, writer)
    assert "\n" not in str(found.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_torch_hides_a_full_disk_and_we_find_it(tmp_path: Path) -> None:
    class Full:
        """A handle on a disk with 100 bytes left."""

        left = 100

        def write(self, data) -> int:
            self.left -= len(data)
            if self.left < 0:
                raises(errno.ENOSPC)()
            return len(data)

        def flush(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="unexpected pos"):  # what torch makes of it
        torch.save({"a": torch.zeros(1000)}, Full())
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"the older checkpoint")
    with pytest.raises(UserError, match="disk full"):
        atomic_write(path, lambda handle: torch.save({"a": torch.zeros(1000)}, Full()))
    assert path.read_bytes() == b"the older checkpoint"


def test_an_error_of_the_checkpoint_itself_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="local object") as found:
        AtomicCheckpointIO().save_checkpoint({"f": lambda: 0}, tmp_path / "last.ckpt")
    assert not isinstance(found.value, UserError)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    save = AtomicCheckpointIO().save_checkpoint
    path = small_disk / "last.ckpt"
    save({"a": torch.zeros(50_000)}, path)
    before = path.read_bytes()
    for size in (220_000, 1_000_000):
        with pytest.raises(UserError, match="disk full"):
            save({"a": torch.zeros(size)}, path)
        assert path.read_bytes() == before
        assert [p.name for p in small_disk.iterdir()] == ["last.ckpt"]
    with pytest.raises(UserError, match="disk full"):
        append_text(small_disk / "metrics.csv", "x" * 2_000_000)


def test_closed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/runs.*--out"):
        check_writable(tmp_path / "file" / "runs")
    with pytest.raises(UserError, match="cannot write .*gone/a.txt.*--out"):
        write_text(tmp_path / "gone" / "a.txt", "x")
    monkeypatch.setattr(Path, "open", raises(errno.EROFS))
    for write in (write_text, append_text):
        with pytest.raises(UserError, match="cannot write .*Read-only file system"):
            write(tmp_path / "a.txt", "x")


def test_a_folder_that_can_be_written_stays_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_halves_of_killed_writes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.last.ckpt.123.tmp", ".manifest.json.7.tmp", "checkpoints/last.ckpt", "notes.tmp"):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["last.ckpt", "notes.tmp"]
