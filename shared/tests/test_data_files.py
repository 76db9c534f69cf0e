"""Folder checks, text files, untrusted pickles and archives."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from polymodal import data, untrusted
from polymodal.errors import UserError


def one_line(error):
    return "\n" not in str(error.value)


def test_require_files_names_the_first_missing_file(tmp_path):
    (tmp_path / "a.csv").write_text("")
    assert data.require_files(tmp_path, ["a.csv"], "set") == [tmp_path / "a.csv"]
    with pytest.raises(UserError, match=r"set: .*b\.csv is missing \(2 of 3 files are missing\); fetch it") as error:
        data.require_files(tmp_path, ["a.csv", "b.csv", "c.csv"], "set", "fetch it")
    assert one_line(error)


def test_require_dir(tmp_path):
    (tmp_path / "file").write_text("")
    assert data.require_dir(str(tmp_path), "root") == tmp_path
    with pytest.raises(UserError, match=r"root: .*no does not exist; give the root"):
        data.require_dir(tmp_path / "no", "root", "give the root")
    with pytest.raises(UserError, match="is a file, not a folder"):
        data.require_dir(tmp_path / "file", "root")


def test_natural_order():
    names = ["images10.png", "images2.png", "a", "images002.png", "2", "10"]
    assert sorted(names, key=data.natural_key) == ["2", "10", "a", "images2.png", "images002.png", "images10.png"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"end"])
def test_text_lines(tmp_path, mark, end, last):
    path = tmp_path / "a.csv"
    path.write_bytes(mark + end.join(["für", "", "雨"][i].encode() for i in range(3)) + (end if not last else b""))
    assert data.read_text_lines(path, "text") == ["für", "", "雨"]


def test_mixed_encodings_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("für\n".encode() + "für\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv, line 2: byte 0xfc is not utf-8; .*iconv") as error:
        data.read_text_lines(path, "text")
    assert one_line(error)
    with pytest.raises(UserError, match=r"no\.csv is missing"):
        data.read_text_lines(tmp_path / "no.csv", "text")


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", "/x")
    assert data.cache_dir("a", "b") == Path("/x/a/b")
    monkeypatch.delenv("POLYMODAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    monkeypatch.setattr("sys.platform", "linux")
    assert data.cache_dir("a") == Path("/y/polymodal/a")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir("a") == Path.home() / ".cache/polymodal/a"
    monkeypatch.setattr("sys.platform", "darwin")
    assert data.cache_dir("a") == Path.home() / "Library/Caches/polymodal/a"


VALUE = {"info": [{"name": "S1", "length": 3, "label": ["a", "b"], "time": (1.5, None, True, b"x", {2})}]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_load(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    value = VALUE if protocol >= 4 else {"info": [{"name": "S1", "length": 3, "time": (1.5, None, True)}]}
    path.write_bytes(pickle.dumps(value, protocol))
    assert data.safe_unpickle(path) == value


class Touch:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_cannot_run_code(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(UserError, match=r"a\.pkl is not a pickle of plain values \(it asks for \w+\.open\)") as error:
        data.safe_unpickle(path)
    assert one_line(error)
    assert not (tmp_path / "touched").exists()
    pickle.loads(path.read_bytes()).close()  # the test's pickle does work elsewhere
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(VALUE)[:-9], pickle.dumps(Path("x"))])
def test_broken_pickles(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pkl is not a pickle"):
        data.safe_unpickle(tmp_path / "a.pkl")


def test_size_is_checked_before_reading(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(VALUE))
    with pytest.raises(UserError, match=r"more than the 5 allowed"):
        data.safe_unpickle(tmp_path / "a.pkl", max_bytes=5)


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as tape:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))


KINDS = [("a.zip", make_zip), ("a.tar.gz", make_tar)]


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_extract(tmp_path, name, make):
    make(tmp_path / name, {"x/1.txt": b"one", "x/y/2.txt": b"two" * 1000})
    files = data.safe_extract(tmp_path / name, tmp_path / "out")
    assert files == [tmp_path / "out/x/1.txt", tmp_path / "out/x/y/2.txt"]
    assert files[0].read_bytes() == b"one"
    assert files[1].read_bytes() == b"two" * 1000


@pytest.mark.parametrize("bad", ["../evil.txt", "/tmp/evil.txt", "x/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
@pytest.mark.parametrize(("name", "make"), KINDS)
def test_members_outside_the_folder_are_refused(tmp_path, name, make, bad):
    make(tmp_path / name, {"good.txt": b"", bad: b"evil"})
    with pytest.raises(UserError, match="points outside the folder"):
        data.safe_extract(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written before all names were checked"


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_total_size_is_checked(tmp_path, name, make):
    make(tmp_path / name, {"a": b"0" * 600, "b": b"0" * 600})
    with pytest.raises(UserError, match="unpacks to 1200 bytes, more than the 1000 allowed"):
        data.safe_extract(tmp_path / name, tmp_path / "out", max_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tape:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tape.addfile(info)
    with pytest.raises(UserError, match="'link' is a link or device"):
        data.safe_extract(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_truncated_archives(tmp_path, name, make):
    make(tmp_path / name, {"a": bytes(range(256)) * 64})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be unpacked") as error:
        data.safe_extract(tmp_path / name, tmp_path / "out")
    assert one_line(error)


def test_a_member_larger_than_declared_is_refused(tmp_path):
    with pytest.raises(UserError, match="larger than the archive says"):
        untrusted._copy(io.BytesIO(b"12345"), tmp_path / "x", 4, tmp_path / "a.zip")
    with pytest.raises(UserError, match="cut short by 2 bytes"):
        untrusted._copy(io.BytesIO(b"123"), tmp_path / "x", 5, tmp_path / "a.zip")
