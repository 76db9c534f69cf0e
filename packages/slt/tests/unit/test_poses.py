"""Landmarks of signers: normalisation and masking, the Poses reader, the fingerspelling builder."""

import json
import struct
import sys
import types

import numpy as np
import pytest
from polymodal.errors import UserError
from slt.data import fingerspelling, landmarks
from slt.data.fingerspelling import CATEGORIES, ONE_HANDED, QUESTIONS, build_fingerspelling
from slt.data.landmarks import BODY, COUNT, FACE, HAND, SECTIONS, local_hands, mirror, normalise_pose
from slt.data.leak import overlap
from slt.data.poses import Poses, read_pose

POINTS = {
    "POSE_LANDMARKS": [*BODY, "LEFT_HIP"],
    "FACE_LANDMARKS": [str(i) for i in range(478)],
    "LEFT_HAND_LANDMARKS": list(HAND),
    "RIGHT_HAND_LANDMARKS": list(HAND),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


def clip(frames=5, seed=0):
    """Raw landmarks in pixels, all seen, shoulders 100 apart around (200, 300)."""
    points = np.random.default_rng(seed).uniform(100, 300, (frames, COUNT, 4))
    points[..., 3] = 0.9
    points[:, 1, :2], points[:, 2, :2] = (250, 300), (150, 300)
    return points


def test_selection_is_77_different_points():
    assert len(set(FACE)) == 28
    assert len(set(HAND)) == 21
    assert len(BODY) + 2 * len(HAND) + len(FACE) == COUNT
    assert [SECTIONS[s].stop - SECTIONS[s].start for s in ("body", "left", "right", "face")] == [7, 21, 21, 28]


def test_normalised_clip_does_not_know_place_and_size():
    raw = clip()
    moved = raw.copy()
    moved[..., :2] = moved[..., :2] * 2.5 + (40, -7)
    one, two = normalise_pose(raw), normalise_pose(moved)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(one[:, 1:3, :2], np.tile([[0.5, 0], [-0.5, 0]], (5, 1, 1)), atol=1e-6)
    expected = (raw[3, 40, :2] - (200, 300)) / 100
    np.testing.assert_allclose(one[3, 40], [*expected, 0, 1], rtol=1e-6)


def test_what_is_not_seen_is_zero_whatever_it_holds():
    raw = clip()
    raw[2, SECTIONS["left"], 3] = 0
    raw[1, 0, 0] = np.nan
    other = raw.copy()
    other[2, SECTIONS["left"], :3] = 1e9
    one = normalise_pose(raw)
    np.testing.assert_array_equal(one, normalise_pose(other))
    assert not one[2, SECTIONS["left"]].any()
    assert not one[1, 0].any()
    assert one[1, SECTIONS["left"], 3].all()
    assert landmarks.missing_hand(one, "left") == pytest.approx(0.2)
    assert landmarks.missing_hand(one, "right") == 0.0


def test_shoulders_are_needed_once():
    raw = clip()
    raw[1:, 1, 3] = 0
    assert np.isfinite(normalise_pose(raw)).all()
    raw[0, 1, 3] = 0
    with pytest.raises(ValueError, match="both shoulders"):
        normalise_pose(raw)
    raw = clip()
    raw[:, 1] = raw[:, 2]
    with pytest.raises(ValueError, match="coincide"):
        normalise_pose(raw)


def test_local_hands_do_not_know_where_the_hand_is():
    points = normalise_pose(clip())
    moved = points.copy()
    moved[:, SECTIONS["right"], :2] = moved[:, SECTIONS["right"], :2] * 3 + 2
    one, two = local_hands(points), local_hands(moved)
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert not one[:, SECTIONS["right"]][:, 0, :3].any()
    knuckle = np.linalg.norm(one[:, SECTIONS["right"]][:, HAND.index("MIDDLE_FINGER_MCP"), :2], axis=-1)
    assert np.median(knuckle) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(one[:, SECTIONS["body"]], points[:, SECTIONS["body"]])


def test_local_hands_without_a_wrist_are_masked():
    points = normalise_pose(clip())
    points[1, SECTIONS["left"].start] = 0
    one = local_hands(points)
    assert not one[1, SECTIONS["left"]].any()
    assert one[0, SECTIONS["left"], 3].all()
    points[:, SECTIONS["left"]] = 0
    assert not local_hands(points)[:, SECTIONS["left"]].any()


def test_mirror_exchanges_hands_and_is_its_own_inverse():
    points = normalise_pose(clip())
    points[:, SECTIONS["right"]] = 0
    turned = mirror(points)
    assert not turned[:, SECTIONS["left"]].any()
    np.testing.assert_allclose(turned[:, 28:49, 0], -points[:, 7:28, 0])
    np.testing.assert_allclose(turned[:, BODY.index("LEFT_WRIST"), 0], -points[:, BODY.index("RIGHT_WRIST"), 0])
    corner = 49 + FACE.index("61")
    np.testing.assert_allclose(turned[:, corner, 1], points[:, 49 + FACE.index("291"), 1])
    np.testing.assert_array_equal(mirror(turned), points)


def fake_pose(raw, components=tuple(POINTS), persons=None):
    """What pose-format would read: the canonical points of ``raw`` laid out over full MediaPipe components."""
    parts, confidences = [], []
    sections = {"POSE_LANDMARKS": "body", "FACE_LANDMARKS": "face"}
    sections |= {"LEFT_HAND_LANDMARKS": "left", "RIGHT_HAND_LANDMARKS": "right"}
    wanted = {"body": BODY, "left": HAND, "right": HAND, "face": FACE}
    for name in components:
        block = np.zeros((len(raw), len(POINTS[name]), 4))
        for row, point in enumerate(wanted[sections[name]]):
            block[:, POINTS[name].index(point)] = raw[:, SECTIONS[sections[name]].start + row]
        parts.append(block[..., :3])
        confidences.append(block[..., 3])
    data, confidence = np.concatenate(parts, 1)[:, None], np.concatenate(confidences, 1)[:, None]
    if persons:
        data = np.concatenate([np.zeros_like(data), data], 1)
        confidence = np.concatenate([np.full_like(confidence, 0.01), confidence], 1)
    header = types.SimpleNamespace(
        components=[types.SimpleNamespace(name=name, points=POINTS[name]) for name in components]
    )
    return types.SimpleNamespace(
        header=header, body=types.SimpleNamespace(data=np.ma.array(data), confidence=confidence)
    )


@pytest.fixture
def pose_format(monkeypatch):
    """A stand-in for the package: file content -> pose."""
    table = {}

    class Pose:
        @staticmethod
        def read(content):
            if content not in table:
                raise struct.error("unpack_from requires a buffer")
            return table[content]

    monkeypatch.setitem(sys.modules, "pose_format", types.SimpleNamespace(Pose=Pose))
    return table


def test_read_pose_selects_by_name(tmp_path, pose_format):
    raw = clip()
    path = tmp_path / "a.pose"
    path.write_bytes(b"a")
    pose_format[b"a"] = fake_pose(raw)
    np.testing.assert_allclose(read_pose(path), normalise_pose(raw), rtol=1e-6)
    pose_format[b"a"] = fake_pose(raw, persons=2)
    np.testing.assert_allclose(read_pose(path), normalise_pose(raw), rtol=1e-6)
    pose_format[b"a"] = fake_pose(raw, components=tuple(POINTS)[::2] + tuple(POINTS)[3:])  # no face
    found = read_pose(path)
    assert not found[:, SECTIONS["face"]].any()
    np.testing.assert_allclose(found[:, :49], normalise_pose(raw)[:, :49], rtol=1e-6)


def test_read_pose_errors(tmp_path, pose_format, monkeypatch):
    path = tmp_path / "a.pose"
    with pytest.raises(UserError, match=r"a\.pose is missing"):
        read_pose(path)
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a\.pose is truncated or not a \.pose file"):
        read_pose(path)
    pose_format[b"broken"] = fake_pose(clip(), components=("POSE_LANDMARKS", "LEFT_HAND_LANDMARKS"))
    with pytest.raises(UserError, match="no RIGHT_HAND_LANDMARKS"):
        read_pose(path)
    pose_format[b"broken"] = fake_pose(clip(0))
    with pytest.raises(UserError, match="has no frame"):
        read_pose(path)
    blind = clip()
    blind[:, 1, 3] = 0
    pose_format[b"broken"] = fake_pose(blind)
    with pytest.raises(UserError, match=r"a\.pose: no frame shows both shoulders"):
        read_pose(path)
    monkeypatch.setitem(sys.modules, "pose_format", None)
    with pytest.raises(UserError, match=r"polymodal-slt\[pose\]"):
        read_pose(path)


def test_real_pose_files(tmp_path):
    pytest.importorskip("pose_format")
    from pose_format.numpy import NumPyPoseBody
    from pose_format.pose import Pose
    from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

    raw = clip()
    fake = fake_pose(raw)
    components = [PoseHeaderComponent(name, points, [], [], "XYZC") for name, points in POINTS.items()]
    header = PoseHeader(version=0.2, dimensions=PoseHeaderDimensions(500, 500, 0), components=components)
    path = tmp_path / "a.pose"
    with path.open("wb") as file:
        Pose(header, NumPyPoseBody(25.0, fake.body.data, fake.body.confidence)).write(file)
    np.testing.assert_allclose(read_pose(path), normalise_pose(raw), atol=1e-5)
    whole = path.read_bytes()
    for keep in (0, 3, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="truncated or not a"):
            read_pose(path)


def folder(root, rows):
    root.mkdir()
    for name, frames in (("a", 3), ("b", 4)):
        np.save(root / f"{name}.npy", normalise_pose(clip(frames, seed=frames)))
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_reader_joins_files(tmp_path):
    rows = [{"video_id": "1", "video": ["a.npy", "b.npy", "a.npy"], "sentence": "aba", "question": "which ?"}]
    root = folder(tmp_path / "p", rows)
    reader = Poses(root=root, hands="global")
    (item,) = reader.items("train")
    assert (item.num_frames, reader.landmarks, reader.modality) == (10, 77, "pose")
    got = reader.load(item, [0, 3, 9])
    a, b = np.load(root / "a.npy"), np.load(root / "b.npy")
    np.testing.assert_array_equal(got, np.stack([a[0], b[0], a[2]]))
    assert got.dtype == np.float32
    bare = Poses(root=root, face=False)
    assert bare.load(item, [4]).shape == (1, 49, 4) == (1, bare.landmarks, 4)
    np.testing.assert_allclose(bare.load(item, [4])[0], local_hands(b)[1, :49])


def test_reader_errors(tmp_path):
    with pytest.raises(UserError, match="hands='other'"):
        Poses(hands="other")
    for video, part in (
        (3, "a path or a list"),
        ([], "a list of paths"),
        ("c.mp4", "not a .pose"),
        ("c.npy", "not exist"),
    ):
        root = folder(tmp_path / f"p{part[2]}{len(part)}", [{"video_id": "1", "video": video, "sentence": "x"}])
        with pytest.raises(UserError, match=r"train\.jsonl:1:") as caught:
            Poses(root=root).items("train")
        assert part in str(caught.value)
    root = folder(tmp_path / "q", [{"video_id": "1", "video": "a.npy", "sentence": "x"}])
    np.save(root / "a.npy", np.zeros((3, 5)))
    with pytest.raises(UserError, match=r"a\.npy has shape \(3, 5\)"):
        Poses(root=root).items("train")
    (root / "a.npy").write_bytes((root / "b.npy").read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.npy is not a readable"):
        Poses(root=root).items("train")


def test_dataset_file_sets_options(tmp_path):
    root = folder(tmp_path / "p", [])
    stated = {"schema": "slt.dataset", "schema_version": 1, "language": "de_DE", "level": "char"}
    (root / "dataset.json").write_text(json.dumps(stated), encoding="utf-8")
    assert (Poses(root=root).language, Poses(root=root).level) == ("de_DE", "char")
    assert Poses(root=root, level="word").level == "word"
    assert (Poses().language, Poses().level) == ("en_XX", "word")
    (root / "dataset.json").write_text(json.dumps(stated | {"schema_version": 2}), encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset\.json.*version 2"):
        Poses(root=root)
    (root / "dataset.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset\.json is not a dataset file"):
        Poses(root=root)


LETTERS = "ABCDEFGHIJKLMNOPRSTUVXYZ"  # no Q, no W


@pytest.fixture
def lexicon(tmp_path, monkeypatch):
    """Five sign languages; a letter's clip holds its number in the right wrist's x; ``ise`` signs with the left."""
    root = tmp_path / "lexicon"
    root.mkdir()
    lines = ["path,spoken_language,signed_language,start,end,words,glosses,priority"]
    for language in ("ase", "gsg", "ise", "mfs", "ssp"):
        for letter in LETTERS:
            name = f"{language}/fs-{letter}.pose"
            (root / language).mkdir(exist_ok=True)
            (root / name).write_bytes(b"x")
            lines.append(f"{name},en,{language},0,1000,{letter if language != 'gsg' else letter.lower()},{letter},0")
    lines.append("ase/fs-A.pose,en,ase,0,1,SCH,SCH,0")
    (root / "data.csv").write_text("\n".join(lines), encoding="utf-8")

    def read(path):
        points = np.zeros((20, COUNT, 4), np.float32)
        hand = "left" if path.parent.name == "ise" else "right"
        points[:, SECTIONS[hand], 3] = 1
        points[:, SECTIONS[hand].start, 0] = ord(path.stem[-1]) * (-1 if hand == "left" else 1)
        points[:, SECTIONS["body"], 3] = 1
        points[:, 0, 1] = np.arange(20)
        return points

    monkeypatch.setattr(fingerspelling, "read_pose", read)
    return root


LANGUAGES = ("ase", "gsg", "ise", "mfs", "ssp")


def test_word_list_is_clean():
    words = [word for text in CATEGORIES.values() for word in text.split()]
    assert len(words) == len(set(words))
    assert all(word.isascii() and word.islower() for word in words)
    assert set(QUESTIONS) == set(CATEGORIES)
    for questions in QUESTIONS.values():
        assert all(overlap(question, word, "en") == 0 for question in questions for word in words)
    assert len(ONE_HANDED) == 13


def test_recordings_of_test_are_not_in_training(tmp_path, lexicon):
    out = tmp_path / "out"
    counts = build_fingerspelling(lexicon, out, languages=LANGUAGES, folds=5, fold=1)
    reader = Poses(root=out, hands="global", face=False)
    assert reader.level == "char"
    reader.check()
    used = {split: {s for i in reader.items(split) for s in i.source} for split in ("train", "dev", "test")}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["dev"]
    assert {i.speaker for i in reader.items("test")} == {"gsg"}
    assert {i.speaker for i in reader.items("dev")} == {"ise"}
    assert {i.speaker for i in reader.items("train")} == {"ase", "mfs", "ssp"}
    assert counts == {split: len(reader.items(split)) for split in used}
    for item in [*reader.items("dev")[:3], *reader.items("test")[:3]]:  # the left-handed ones are mirrored
        got = reader.load(item, range(item.num_frames))
        spelled = "".join(chr(int(x)) for x in got[::12, SECTIONS["right"].start, 0])
        assert spelled == item.sentence.upper()
        assert (got[:12, 0, 1] == np.linspace(0, 19, 12).round()).all()
        assert item.topic in CATEGORIES
        assert item.question in QUESTIONS[item.topic]
    assert not any("w" in i.sentence for i in reader.items("train"))  # no clip for W


def test_words_of_test_are_not_in_training(tmp_path, lexicon):
    build_fingerspelling(lexicon, tmp_path / "out", split="words", languages=LANGUAGES, letter_frames=0)
    reader = Poses(root=tmp_path / "out")
    words = {split: {i.sentence for i in reader.items(split)} for split in ("train", "dev", "test")}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["dev"]
    assert all(len(w) > 5 for w in words.values())
    assert len(words["train"]) > 3 * len(words["test"])
    assert reader.items("test")[0].num_frames == 20 * len(reader.items("test")[0].sentence)


def test_folds_cover_every_language_once():
    tests = [fingerspelling._languages_by_split("recordings", ONE_HANDED, 5, f) for f in range(5)]
    assert sorted(code for split in tests for code in split["test"]) == sorted(ONE_HANDED)
    for split in tests:
        assert sorted(c for codes in split.values() for c in codes) == sorted(ONE_HANDED)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"split": "signers"}, "split='signers'"),
        ({"folds": 2}, "folds=2; expected 3..5"),
        ({"fold": 5}, "fold=5; expected 0..2"),
        ({"languages": ("ase", "xyz", "gsg")}, "sign language 'xyz'"),
    ],
)
def test_builder_options(tmp_path, lexicon, options, part):
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        build_fingerspelling(lexicon, tmp_path / "out", **{"languages": LANGUAGES, "folds": 3, **options})


def test_builder_files(tmp_path, lexicon):
    with pytest.raises(UserError, match=r"data\.csv is missing.*spoken-to-signed"):
        build_fingerspelling(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        build_fingerspelling(lexicon, tmp_path / "full", languages=LANGUAGES)
    (lexicon / "ase" / "fs-B.pose").unlink()
    with pytest.raises(UserError, match=r"data\.csv:3: .*fs-B\.pose is missing"):
        build_fingerspelling(lexicon, tmp_path / "out", languages=LANGUAGES)
    (lexicon / "data.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.csv:1: expected the columns"):
        build_fingerspelling(lexicon, tmp_path / "out", languages=LANGUAGES)
