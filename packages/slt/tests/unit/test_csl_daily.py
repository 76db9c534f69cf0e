"""The CSL-Daily reader on folders of the official layout."""

import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from polymodal.errors import UserError
from slt.data import clips
from slt.data.csl_daily import CSLDaily
from slt.data.questions import Question, write_questions

CLIPS = {
    "S000001_P0001_T00": ("train", "我 去 学 校 。"),
    "S000001_P0002_T00": ("train", "我 去 学 校 。"),
    "S000002_P0001_T00": ("dev", "你 好 ！"),
    "S000003_P0001_T00": ("test", "ＡＢ 路 在 哪 ？"),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


def build(root, *, split_name="split_1.txt", frames=3, header=True, drop_label=(), extra_label=(), drop_split=()):
    labels = root / "sentence_label"
    labels.mkdir(parents=True)
    info = [
        {
            "name": name,
            "length": frames,
            "label_gloss": ["我"],
            "label_char": text.split(),
            "label_word": text.split(),
            "label_postag": ["r"],
            "signer": int(name[9:13]),
            "time": "2020",
        }
        for name, (_, text) in {**CLIPS, **{n: ("train", "多") for n in extra_label}}.items()
        if name not in drop_label
    ]
    (labels / "csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": info, "gloss_map": ["我"]}))
    lines = ["name|split"] * header + [f"{n}|{s}" for n, (s, _) in CLIPS.items() if n not in drop_split]
    (labels / split_name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for position, name in enumerate(CLIPS):
        folder = root / "sentence" / "frames_512x512" / name
        folder.mkdir(parents=True)
        for frame in range(frames + position):
            Image.new("RGB", (16, 16), (40 * position, 10 * frame, 0)).save(folder / f"{frame:06d}.jpg", quality=100)
    return root


@pytest.mark.parametrize("split_name", ["split_1.txt", "video_split_1.txt"])
@pytest.mark.parametrize("header", [True, False])
def test_official_layout(tmp_path, split_name, header):
    reader = CSLDaily(root=build(tmp_path / "csl", split_name=split_name, header=header))
    train = reader.items("train")
    assert [(i.id, i.sentence, i.num_frames, i.speaker) for i in train] == [
        ("S000001_P0001_T00", "我去学校。", 3, "1"),
        ("S000001_P0002_T00", "我去学校。", 4, "2"),
    ]
    assert reader.items("test")[0].sentence == "ＡＢ路在哪？"  # full-width signs are kept
    assert (reader.level, reader.language, reader.modality) == ("char", "zh_CN", "frames")
    frames = reader.load(train[1], [0, 2, 2, 3])
    assert frames.shape == (4, 16, 16, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(frames[:, 8, 8, 1], [0, 20, 20, 30], atol=3)
    reader.check()


def test_root_may_hold_the_folder(tmp_path):
    build(tmp_path / "csl-daily")
    assert len(CSLDaily(root=tmp_path).items("train")) == 2


def test_questions_beside_the_labels(tmp_path):
    root = build(tmp_path / "csl-daily")
    write_questions(root / "questions" / "dev.jsonl", [Question("S000002_P0001_T00", "怎么样？", "你好！")])
    assert CSLDaily(root=tmp_path).items("dev")[0].question == "怎么样？"


def test_ids_of_one_file_only_are_named_and_left_out(tmp_path, caplog):
    root = build(tmp_path / "csl", drop_label=("S000001_P0002_T00",), extra_label=("S000007_P0003_T00",), drop_split=())
    with caplog.at_level(logging.WARNING):
        reader = CSLDaily(root=root)
        assert [i.id for i in reader.items("train")] == ["S000001_P0001_T00"]
        reader.items("dev")
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2  # said once, not per split
    assert "S000001_P0002_T00" in messages[0]
    assert "in split_1.txt but not in csl2020ct_v2.pkl" in messages[0]
    assert "S000007_P0003_T00" in messages[1]


def test_crops_are_used_where_there_are_no_frames(tmp_path, monkeypatch):
    root = build(tmp_path / "csl")
    (root / "sentence" / "frames_512x512").rename(root / "other")
    (root / "sentence-crop").mkdir()
    for name in CLIPS:
        (root / "sentence-crop" / f"{name}.mp4").write_bytes(b"x")
    monkeypatch.setattr(clips, "count_video_frames", lambda path: len(path.name))
    monkeypatch.setattr(clips, "load_video", lambda path, indices: np.full((len(indices), 2, 2, 3), 7, np.uint8))
    reader = CSLDaily(root=root)
    item = reader.items("dev")[0]
    assert item.num_frames == len("S000002_P0001_T00.mp4")
    assert item.source == (str(root / "sentence-crop" / "S000002_P0001_T00.mp4"),)
    assert reader.load(item, [0, 1]).max() == 7


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def fails(reader, split, *parts):
    with pytest.raises(UserError) as caught:
        reader.items(split)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_errors_name_the_file(tmp_path):
    fails(CSLDaily(), "train", "--data.root")
    fails(CSLDaily(root=tmp_path / "no"), "train", "does not exist")
    fails(CSLDaily(root=tmp_path), "train", "sentence_label/csl2020ct_v2.pkl is missing")
    root = build(tmp_path / "csl")
    pkl, split = root / "sentence_label" / "csl2020ct_v2.pkl", root / "sentence_label" / "split_1.txt"
    good = split.read_text(encoding="utf-8")
    split.write_text(good + "S9|valid\n", encoding="utf-8")
    fails(CSLDaily(root=root), "train", "split_1.txt:6:", "S9|valid")
    split.write_text(good + "S000001_P0001_T00|test\n", encoding="utf-8")
    fails(CSLDaily(root=root), "train", "split_1.txt:6:", "train and test")
    split.write_text("name|split\nother|train\n", encoding="utf-8")
    fails(CSLDaily(root=root), "train", "share no id")
    split.unlink()
    fails(CSLDaily(root=root), "train", "split_1.txt is missing")
    split.write_text(good, encoding="utf-8")
    labels = pkl.read_bytes()
    pkl.write_bytes(pickle.dumps({"info": Evil()}))
    fails(CSLDaily(root=root), "train", "csl2020ct_v2.pkl", "not a pickle of plain values")
    pkl.write_bytes(pickle.dumps([1]))
    fails(CSLDaily(root=root), "train", "list `info`")
    pkl.write_bytes(pickle.dumps({"info": [{"name": "a"}]}))
    fails(CSLDaily(root=root), "train", "info[0]", "label_char")
    pkl.write_bytes(pickle.dumps({"info": [{"name": "a", "label_char": [" "]}]}))
    fails(CSLDaily(root=root), "train", "info[0]", "empty")
    pkl.write_bytes(pickle.dumps({"info": [{"name": "../a", "label_char": ["x"]}]}))
    fails(CSLDaily(root=root), "train", "not a file name")
    pkl.write_bytes(pickle.dumps({"info": [{"name": "a", "label_char": [c]} for c in "xy"]}))
    fails(CSLDaily(root=root), "train", "info[1]", "two different sentences")
    pkl.write_bytes(labels)
    (root / "sentence" / "frames_512x512" / "S000003_P0001_T00").rename(root / "gone")
    fails(CSLDaily(root=root), "test", "S000003_P0001_T00 is missing (1 of 1 clips)")
    (root / "sentence" / "frames_512x512" / "S000003_P0001_T00").mkdir()
    fails(CSLDaily(root=root), "test", "S000003_P0001_T00 has no PNG or JPEG frames")
    (root / "sentence").rename(root / "elsewhere")
    fails(CSLDaily(root=root), "test", "neither", "frames_512x512", "sentence-crop")


def test_an_empty_split_is_said(tmp_path):
    root = build(tmp_path / "csl", drop_label=("S000002_P0001_T00",))
    fails(CSLDaily(root=root), "dev", "split dev is empty")


def test_lengths_are_counted_once_and_again_after_a_change(tmp_path, monkeypatch):
    root = build(tmp_path / "csl")
    calls = []
    real = clips.count_frames
    monkeypatch.setattr(clips, "count_frames", lambda path: calls.append(path) or real(path))
    CSLDaily(root=root).items("train")
    CSLDaily(root=root).items("train")
    assert len(calls) == 2
    folder = root / "sentence" / "frames_512x512" / "S000001_P0001_T00"
    (folder / "000002.jpg").unlink()
    assert CSLDaily(root=root).items("train")[0].num_frames == 2
    assert len(calls) == 4
