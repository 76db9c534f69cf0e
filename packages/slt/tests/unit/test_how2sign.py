"""How2Sign, OpenASL and a user's own manifest."""

import logging

import numpy as np
import pytest
from PIL import Image
from polymodal.errors import UserError
from slt.data import clips, manifest
from slt.data.how2sign import How2Sign
from slt.data.manifest import Manifest

HEAD = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"


@pytest.fixture(autouse=True)
def _fake_video(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clips, "count_video_frames", lambda path: 5)
    monkeypatch.setattr(clips, "load_video", lambda path, indices: np.zeros((len(indices), 4, 4, 3), np.uint8))


def fails(reader, split, *parts):
    with pytest.raises(UserError) as caught:
        reader.items(split)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def how2sign(root):
    for folder, names in (("train", ("t-1", "t-2")), ("val", ("v-1",)), ("test", ("x-1",))):
        (root / folder / "rgb").mkdir(parents=True)
        rows = [f'a\tb\tsid{n}\t{n}\t0.1\t2.0\tHe said "{n}", ok.' for n in names]
        (root / folder / f"how2sign_realigned_{folder}.csv").write_text("\n".join([HEAD, *rows]), encoding="utf-8")
        for name in names:
            (root / folder / "rgb" / f"{name}.mp4").write_bytes(b"x")
    return root


def test_how2sign_layout(tmp_path):
    reader = How2Sign(root=how2sign(tmp_path / "h2s"))
    items = reader.items("train")
    assert [(i.id, i.sentence, i.num_frames, i.question) for i in items] == [
        ("t-1", 'He said "t-1", ok.', 5, ""),
        ("t-2", 'He said "t-2", ok.', 5, ""),
    ]
    assert reader.items("dev")[0].id == "v-1"
    assert reader.load(items[0], [0, 4]).shape == (2, 4, 4, 3)
    assert (reader.level, reader.language) == ("word", "en_XX")
    reader.check()


def test_openasl_table_with_a_split_column(tmp_path):
    root = tmp_path / "openasl"
    (root / "openasl.tsv").parent.mkdir()
    rows = ["vid\tyid\tstart\tend\traw-text\ttokenized-text\tsplit"]
    for split, folder in (("train", "train"), ("valid", "val"), ("test", "test")):
        (root / folder / "rgb" / f"clip-{split}").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / folder / "rgb" / f"clip-{split}" / "1.png")
        rows.append(f"clip-{split}\ty\t0\t1\tText of {split}.\ttext of {split} .\t{split}")
    (root / "openasl.tsv").write_text("\n".join(rows), encoding="utf-8")
    reader = How2Sign(root=root, text_column="tokenized-text")
    assert [(i.id, i.sentence, i.num_frames) for i in reader.items("dev")] == [("clip-valid", "text of valid .", 1)]
    assert How2Sign(root=root).items("test")[0].sentence == "Text of test."


def test_missing_clips_are_an_error_or_left_out(tmp_path, caplog):
    root = how2sign(tmp_path / "h2s")
    (root / "train" / "rgb" / "t-2.mp4").unlink()
    fails(How2Sign(root=root), "train", "t-2.mp4 is missing (1 of 2", "--data.skip_missing")
    with caplog.at_level(logging.WARNING):
        assert [i.id for i in How2Sign(root=root, skip_missing=True).items("train")] == ["t-1"]
    assert "1 of 2 rows have no clip" in caplog.text


def test_how2sign_errors(tmp_path):
    fails(How2Sign(), "train", "--data.root")
    (tmp_path / "empty").mkdir()
    fails(How2Sign(root=tmp_path / "empty"), "dev", "no table", "val")
    root = how2sign(tmp_path / "h2s")
    table = root / "train" / "how2sign_realigned_train.csv"
    fails(How2Sign(root=root, id_column="NAME"), "train", "train.csv:1:", "no column NAME", "--data.id_column")
    table.write_text(f"{HEAD}\na\tb\tc\tt-1\t0\t1\tx\na\tb\tc\tt-1\t0\t1\tx\n", encoding="utf-8")
    fails(How2Sign(root=root), "train", "train.csv:3:", "already given on line 2")
    table.write_text(f"{HEAD}\na\tb\tc\tt-1\t0\t1\t \n", encoding="utf-8")
    fails(How2Sign(root=root), "train", "train.csv:2:", "SENTENCE is empty")
    table.write_text(f"{HEAD}\na\tb\tc\t../t\t0\t1\tx\n", encoding="utf-8")
    fails(How2Sign(root=root), "train", "not a file name")
    table.write_text(HEAD, encoding="utf-8")
    fails(How2Sign(root=root), "train", "no row for split train")
    table.write_text("", encoding="utf-8")
    fails(How2Sign(root=root), "train", "no column")


def own(root, rows):
    root.mkdir()
    (root / "clips" / "one").mkdir(parents=True)
    for frame in range(3):
        Image.new("RGB", (4, 4), (frame, 0, 0)).save(root / "clips" / "one" / f"{frame}.png")
    (root / "two.mp4").write_bytes(b"x")
    (root / "three.pose").write_bytes(b"x")
    (root / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root


ONE = '{"video_id": "1", "video": "clips/one", "sentence": "Ein Satz", "question": "Was ?", "speaker": "s"}'
TWO = '{"video_id": "2", "video": "two.mp4", "sentence": "Noch einer"}'


def test_manifest_rows(tmp_path):
    reader = Manifest(root=own(tmp_path / "own", [ONE, "", TWO]), language="de_DE", lowercase=True)
    one, two = reader.items("train")
    assert (one.sentence, one.question, one.num_frames, one.speaker) == ("ein satz", "was ?", 3, "s")
    assert (two.id, two.question, two.num_frames) == ("2", "", 5)
    assert reader.load(one, [1, 2])[:, 0, 0, 0].tolist() == [1, 2]
    assert (reader.language, reader.level) == ("de_DE", "word")
    assert manifest.Manifest().language == "en_XX"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"video_id": "1", "video": "two.mp4", "sentence": "x"}', ("already given on line 1",)),
        ('{"video_id": "3", "sentence": "x"}', ("'video' is missing",)),
        ('{"video_id": "3", "video": "no.mp4", "sentence": "x"}', ("no.mp4 does not exist", "relative to")),
        ('{"video_id": "3", "video": "three.pose", "sentence": "x"}', ("--data poses",)),
        ('{"video_id": "3", "video": "", "sentence": "x"}', ("must be a path",)),
        ('{"video_id": "3", "video": "two.mp4", "sentence": " "}', ("empty",)),
        ('{"video_id": "3", "video": "two.mp4", "sentence": "x", "gloss": "y"}', ("'gloss'", "allowed")),
        ('{"video_id": 3, "video": "two.mp4", "sentence": "x"}', ("video_id must be text",)),
        ('{"video_id": "3", "video": "two.mp4", "sentence": "schÃ¶n"}', ("wrongly decoded",)),
        ('{"schema": "slt.manifest", "schema_version": 1}', ("'video_id' is missing",)),
    ],
)
def test_manifest_errors_name_the_line(tmp_path, row, parts):
    fails(Manifest(root=own(tmp_path / "own", [ONE, row])), "train", "train.jsonl:2:", *parts)


def test_manifest_header_and_files(tmp_path):
    root = own(tmp_path / "own", ['{"schema": "slt.manifest", "schema_version": 1}', ONE])
    assert len(Manifest(root=root).items("train")) == 1
    fails(Manifest(root=root), "dev", "dev.jsonl is missing")
    fails(Manifest(), "dev", "--data.root")
    (root / "dev.jsonl").write_text('{"schema": "slt.manifest", "schema_version": 2}', encoding="utf-8")
    fails(Manifest(root=root), "dev", "dev.jsonl:1:", "newer")
    (root / "dev.jsonl").write_text("", encoding="utf-8")
    fails(Manifest(root=root), "dev", "no rows")
    with pytest.raises(UserError, match="level='syllable'"):
        Manifest(level="syllable")
