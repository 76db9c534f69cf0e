"""The PHOENIX-2014T reader on folders of the official layout, whole and damaged."""

import json

import numpy as np
import pytest
from PIL import Image
from polymodal.errors import UserError
from slt.data import reader_class
from slt.data.phoenix import Phoenix2014T

HEADER = "name|video|start|end|speaker|orth|translation"
CLIPS = {
    "train": [
        ("11August_2010_Wednesday_tagesschau-1", 12, "Signer08", "Heute ist es  sonnig"),
        ("a-2", 9, "S1", "regen"),
    ],
    "dev": [("b-1", 10, "Signer02", "am Montag schnee")],
    "test": [("c-1", 3, "Signer01", 'wind mit "böen"')],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


def write_clip(folder, frames, size=(10, 8)):
    folder.mkdir(parents=True)
    for number in range(1, frames + 1):
        Image.new("RGB", size, (number, 0, 255 - number)).save(folder / f"images{number:04d}.png")


def row(name, speaker, sentence):
    return f"{name}|{name}/1/*.png|-1|-1|{speaker}|GLOSS X|{sentence}"


@pytest.fixture
def home(tmp_path):
    """A small data set in the layout of the archive."""
    home = tmp_path / "data" / "PHOENIX-2014-T"
    (home / "annotations/manual").mkdir(parents=True)
    for split, clips in CLIPS.items():
        rows = [row(name, speaker, sentence) for name, _, speaker, sentence in clips]
        write_csv(home, split, [HEADER, *rows])
        for name, frames, *_ in clips:
            write_clip(home / "features/fullFrame-210x260px" / split / name, frames)
    return home


def write_csv(home, split, lines, encoding="utf-8", end="\n"):
    path = home / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv"
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


def write_questions(folder, missing=()):
    folder.mkdir()
    for split, clips in CLIPS.items():
        rows = [
            {"video_id": name, "question": f"Wie WIRD {split} ?", "sentence": sentence, "topic": "t"}
            for name, _, _, sentence in clips
            if name not in missing
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def clip(home, split="train", index=0):
    return home / "features/fullFrame-210x260px" / split / CLIPS[split][index][0]


def fails(reader, split="train"):
    with pytest.raises(UserError) as error:
        reader.items(split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_items(home):
    first, second = Phoenix2014T(root=home).items("train")
    assert first.id == "11August_2010_Wednesday_tagesschau-1"
    assert first.sentence == "heute ist es sonnig"
    assert first.question == ""
    assert (first.num_frames, second.num_frames) == (12, 9)
    assert first.speaker == "Signer08"
    assert Phoenix2014T(root=home).items("test")[0].sentence == 'wind mit "böen"', "quotes are text, not syntax"


@pytest.mark.parametrize("options", [{"lowercase": False}, {"append_period": True}])
def test_text_options(home, options):
    reader = Phoenix2014T(root=home, **options)
    expected = "Heute ist es sonnig" if "lowercase" in options else "heute ist es sonnig ."
    assert reader.items("train")[0].sentence == expected
    assert reader.fingerprint() != Phoenix2014T(root=home).fingerprint()
    described = reader.describe()
    assert described["lowercase"] is options.get("lowercase", True)
    assert described["append_period"] is options.get("append_period", False)


def test_frames(home):
    reader = Phoenix2014T(root=home)
    item = reader.items("train")[0]
    frames = reader.load(item, [0, 9, 11])
    assert frames.shape == (3, 8, 10, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[:, 0, 0], [(1, 0, 254), (10, 0, 245), (12, 0, 243)])


@pytest.mark.parametrize("root", ["parent", "itself", "release"])
def test_root_may_be_above(home, root):
    if root == "release":
        (home.parent / "PHOENIX-2014-T-release-v3").mkdir()
        home.rename(home.parent / "PHOENIX-2014-T-release-v3" / "PHOENIX-2014-T")
    reader = Phoenix2014T(root=home if root == "itself" else home.parent)
    assert [len(reader.items(split)) for split in ("train", "dev", "test")] == [2, 1, 1]


def test_extra_level_of_folders(home):
    for split in CLIPS:
        for index in range(len(CLIPS[split])):
            folder = clip(home, split, index)
            frames = list(folder.iterdir())
            (folder / "1").mkdir()
            for frame in frames:
                frame.rename(folder / "1" / frame.name)
    reader = Phoenix2014T(root=home)
    item = reader.items("train")[0]
    assert item.num_frames == 12
    assert reader.load(item, [11])[0, 0, 0].tolist() == [12, 0, 243]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", ["none", "usual", "reordered", "extra", "few"])
def test_header_variants(home, header, encoding, end):
    names = HEADER.split("|")
    order = {
        "none": names,
        "usual": names,
        "reordered": ["translation", "speaker", "name", "video", "start", "end", "orth"],
        "extra": [*names, "corpus"],
        "few": ["name", "translation"],
    }[header]
    lines = [] if header == "none" else ["|".join(order)]
    for name, _, speaker, sentence in CLIPS["train"]:
        cells = dict(zip(names, row(name, speaker, sentence).split("|"), strict=True)) | {"corpus": "x"}
        lines.append("|".join(cells[column] for column in order))
    reader = Phoenix2014T(root=home)
    expected = reader.items("train")
    write_csv(home, "train", lines, encoding, end)
    found = Phoenix2014T(root=home).items("train")
    assert [(i.id, i.sentence, i.num_frames) for i in found] == [(i.id, i.sentence, i.num_frames) for i in expected]
    assert found[0].speaker == ("" if header == "few" else "Signer08")


@pytest.mark.parametrize("place", ["root", "beside", "given"])
def test_questions_are_found(home, tmp_path, place):
    folder = {"root": home.parent / "questions", "beside": home / "questions", "given": tmp_path / "mine"}[place]
    write_questions(folder)
    reader = Phoenix2014T(root=home.parent, questions=folder if place == "given" else None)
    assert [i.question for i in reader.items("train")] == ["wie wird train ?"] * 2
    assert reader.items("dev")[0].topic == "t"
    assert reader.describe()["splits"]["train"] == {
        "videos": 2,
        "frames": 21,
        "questions": 2,
        "unique_sentences": 2,
    }
    assert reader.describe()["questions"] == str(folder)


def test_missing_questions(home, tmp_path):
    write_questions(tmp_path / "q", missing=["a-2"])
    assert "no question for 'a-2'" in fails(Phoenix2014T(root=home, questions=tmp_path / "q"))
    reader = Phoenix2014T(root=home, questions=tmp_path / "q", allow_missing=True)
    assert [i.question for i in reader.items("train")] == ["wie wird train ?", ""]
    (tmp_path / "q" / "dev.jsonl").unlink()
    assert "dev.jsonl" in fails(reader, "dev")
    message = fails(Phoenix2014T(root=home, questions=tmp_path / "none"))
    assert "none does not exist; give the folder that holds train.jsonl" in message


def test_no_root():
    assert "phoenix2014t: no root folder; give the folder PHOENIX-2014-T" in fails(Phoenix2014T())


def test_root_may_be_text(home, monkeypatch):
    assert Phoenix2014T(root=str(home)).items("train") == Phoenix2014T(root=home).items("train")
    monkeypatch.setenv("HOME", str(home.parent))
    assert Phoenix2014T(root="~").items("train") == Phoenix2014T(root=home).items("train")


def test_missing_root(tmp_path):
    assert f"{tmp_path}/no does not exist; give the folder PHOENIX-2014-T" in fails(Phoenix2014T(root=tmp_path / "no"))


def test_empty_root_names_the_first_missing_file(tmp_path):
    message = fails(Phoenix2014T(root=tmp_path))
    assert f"{tmp_path}/PHOENIX-2014-T/annotations/manual/PHOENIX-2014-T.train.corpus.csv is missing" in message


def test_missing_annotation_of_a_split(home):
    (home / "annotations/manual/PHOENIX-2014-T.dev.corpus.csv").unlink()
    assert "PHOENIX-2014-T.dev.corpus.csv is missing" in fails(Phoenix2014T(root=home), "dev")


@pytest.mark.parametrize("empty", [False, True])
def test_missing_frames_name_the_first_file_and_the_line(home, empty):
    folder = clip(home, index=1)
    for frame in folder.iterdir():
        frame.unlink()
    if not empty:
        folder.rmdir()
    for _ in range(2):  # the second time from the index
        message = fails(Phoenix2014T(root=home))
        assert f"{folder}/images0001.png is missing (PHOENIX-2014-T.train.corpus.csv, line 3); unpack this" in message
    if empty:
        Image.new("RGB", (10, 8)).save(folder / "images0001.png")
        assert Phoenix2014T(root=home).items("train")[1].num_frames == 1, "an empty folder is looked at again"


def test_missing_frame_folder_of_a_split(home):
    folder = home / "features/fullFrame-210x260px/dev"
    folder.rename(folder.with_name("development"))
    assert f"{folder} does not exist; unpack the features" in fails(Phoenix2014T(root=home), "dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x|x/*.png|-1|-1|S|G", "line 2: 6 fields, expected 7 (name|video|start|end|speaker|orth|translation)"),
        ("x|x/*.png|-1|-1|S|G|ein|wort", "line 2: 8 fields, expected 7"),
        ("x|x/*.png|-1|-1|S|G| ", "line 2: the sentence is empty; fill it in or remove the line"),
        ("|x/*.png|-1|-1|S|G|wort", "line 2: the name is empty"),
        ("../x|x/*.png|-1|-1|S|G|wort", "line 2: name '../x' is no folder name"),
        ("..|x/*.png|-1|-1|S|G|wort", "line 2: name '..' is no folder name"),
    ],
)
def test_bad_rows(home, line, message):
    path = write_csv(home, "train", [HEADER, line])
    text = fails(Phoenix2014T(root=home))
    assert str(path) in text
    assert message in text


@pytest.mark.parametrize("lines", [[], [HEADER]])
def test_empty_annotation(home, lines):
    write_csv(home, "train", lines)
    assert "has no rows; copy it again" in fails(Phoenix2014T(root=home))


def test_mixed_encodings(home):
    path = write_csv(home, "train", [HEADER, row("a-2", "S", "schön")])
    path.write_bytes(path.read_bytes() + row("x", "S", "für").encode("latin-1"))
    assert f"{path}, line 3: byte 0xfc is not utf-8" in fails(Phoenix2014T(root=home))


def test_a_video_twice(home):
    write_csv(home, "train", [HEADER, row("a-2", "S", "eins"), row("a-2", "S", "zwei")])
    assert "video a-2 occurs twice" in fails(Phoenix2014T(root=home))


def test_a_video_in_two_splits(home):
    write_csv(home, "dev", [HEADER, row("a-2", "S", "eins")])
    write_clip(home / "features/fullFrame-210x260px/dev/a-2", 1)
    with pytest.raises(UserError, match="a-2 is in train and dev"):
        Phoenix2014T(root=home).check()


def test_truncated_frame(home):
    reader = Phoenix2014T(root=home)
    item = reader.items("train")[0]
    path = clip(home) / "images0003.png"
    path.write_bytes(path.read_bytes()[:40])
    assert reader.load(item, [0, 1]).shape == (2, 8, 10, 3)
    with pytest.raises(UserError, match=r"images0003\.png \(40 bytes\) cannot be decoded.*copy or extract it again"):
        reader.load(item, [0, 2])


def test_frames_are_counted_once(home, monkeypatch):
    expected = Phoenix2014T(root=home).items("train")

    def forbidden(_):
        raise AssertionError("counted again")

    monkeypatch.setattr("slt.data.phoenix.count_frames", forbidden)
    assert Phoenix2014T(root=home).items("train") == expected


def test_a_clip_that_changed_after_indexing(home):
    reader = Phoenix2014T(root=home)
    item = reader.items("train")[0]
    (clip(home) / "images0012.png").unlink()
    with pytest.raises(UserError, match=r"has 11 frames, 12 when it was indexed; the index was dropped"):
        reader.load(item, [0])
    again = Phoenix2014T(root=home)
    assert again.items("train")[0].num_frames == 11
    assert again.load(again.items("train")[0], [10]).shape[0] == 1


def test_a_new_clip_is_seen(home):
    Phoenix2014T(root=home).items("train")
    write_clip(home / "features/fullFrame-210x260px/train/new", 4)
    write_csv(home, "train", [HEADER, row("new", "S", "neu")])
    assert Phoenix2014T(root=home).items("train")[0].num_frames == 4


def test_fingerprint(home, tmp_path):
    first = Phoenix2014T(root=home).fingerprint()
    lines = (home / "annotations/manual/PHOENIX-2014-T.train.corpus.csv").read_text(encoding="utf-8").splitlines()
    write_csv(home, "train", [lines[0], *lines[:0:-1]])
    assert Phoenix2014T(root=home).fingerprint() == first, "order of rows does not matter"
    home.rename(tmp_path / "moved")
    assert Phoenix2014T(root=tmp_path / "moved").fingerprint() == first, "neither does the place"
    write_questions(tmp_path / "moved" / "questions")
    second = Phoenix2014T(root=tmp_path / "moved").fingerprint()
    assert second != first
    (tmp_path / "moved/features/fullFrame-210x260px/test/c-1/images0003.png").unlink()
    (tmp_path / "moved/features/fullFrame-210x260px/test/c-1").rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "moved/features/fullFrame-210x260px/test/c-1")
    assert Phoenix2014T(root=tmp_path / "moved").fingerprint() != second


def test_unknown_split(home):
    with pytest.raises(UserError, match="split 'val'; expected one of train, dev, test"):
        Phoenix2014T(root=home).items("val")


def test_readers_by_name():
    assert reader_class("phoenix2014t") is Phoenix2014T
    with pytest.raises(UserError, match="unknown data 'phoenix'; did you mean phoenix2014t"):
        reader_class("phoenix")
