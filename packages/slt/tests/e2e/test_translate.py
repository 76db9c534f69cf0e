"""``slt-translate``: the very translations of ``slt-eval``, from folders, files and ids; pictures; mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from polymodal.cli import parse_config
from slt.checkpoint import read_run_config
from slt.data import READERS
from slt.data.base import Item
from slt.data.frames import load_frames
from slt.data.landmarks import COUNT
from slt.models.backbones import build_backbone
from slt.settings import SLTConfig
from slt.translate import gather_options

COMMAND = Path(sys.executable).with_name("slt-translate")


@pytest.fixture(scope="session")
def clips(trained_run) -> list[Item]:
    """Test clips of the trained run; ``source[0]`` is the folder of frames."""
    return read_run_config(trained_run).data.items("test")


def stored(folder: Path, name: str) -> dict[str, str]:
    rows = (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return {row["video_id"]: row["prediction"] for row in map(json.loads, rows)}


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


# ------------------------------------------------------------------ translations


def test_the_same_translations_as_in_the_evaluation(trained_run, clips, slt_translate) -> None:
    folders, questions = [clip.source[0] for clip in clips], [clip.question for clip in clips]
    result = slt_translate("--checkpoint", trained_run, "--video", *folders, "--question", *questions)
    assert result.code == 0, result.err
    found = dict(line.split("\t") for line in result.out.splitlines())
    expected = stored(trained_run, "ssaw")
    assert found == {clip.source[0]: expected[clip.id] for clip in clips}
    again = slt_translate("--checkpoint", trained_run, "--video", *folders, "--question", *questions)
    assert again.out == result.out


def test_without_a_question_and_by_id(trained_run, clips, slt_translate) -> None:
    ids = [clip.id for clip in clips]
    result = slt_translate("--checkpoint", trained_run, "--video", *ids)
    assert dict(line.split("\t") for line in result.out.splitlines()) == stored(trained_run, "empty_question")
    alone = slt_translate("--checkpoint", trained_run, "--video", ids[2], "--question", "")
    assert alone.out == stored(trained_run, "empty_question")[ids[2]] + "\n"


def test_case_and_blanks_of_a_question_do_not_matter_where_texts_are_lower_cased(
    trained_run, clips, slt_translate
) -> None:
    spelled = ["  " + clip.question.upper().replace(" ", "   ") for clip in clips]
    ids = [clip.id for clip in clips]
    result = slt_translate("--checkpoint", trained_run, "--video", *ids, "--question", *spelled)
    assert dict(line.split("\t") for line in result.out.splitlines()) == stored(trained_run, "ssaw")
    unknown = [question.replace("W", "X").replace("D", "X") for question in spelled]
    other = slt_translate("--checkpoint", trained_run, "--video", *ids, "--question", *unknown)
    assert other.out != result.out  # words do matter


def test_the_extra_folder_level_of_phoenix(trained_run, clips, slt_translate, tmp_path) -> None:
    shutil.copytree(clips[1].source[0], tmp_path / "clip" / "1")
    result = slt_translate("--checkpoint", trained_run, "--video", tmp_path / "clip", "--question", clips[1].question)
    assert result.out == stored(trained_run, "ssaw")[clips[1].id] + "\n"


def test_a_video_file_goes_through_the_decoder(trained_run, clips, slt_translate, tmp_path, monkeypatch) -> None:
    clip, video = clips[3], tmp_path / "clip.mp4"
    video.write_bytes(b"")
    monkeypatch.setattr("slt.data.clips.count_video_frames", lambda path: clip.num_frames)
    monkeypatch.setattr("slt.data.clips.load_video", lambda path, rows: load_frames(clip.source[0], rows))
    result = slt_translate("--checkpoint", trained_run, "--video", video, "--question", clip.question)
    assert result.out == stored(trained_run, "ssaw")[clip.id] + "\n"


def test_a_long_question_is_cut_with_a_message(trained_run, clips, slt_translate, tmp_path) -> None:
    result = slt_translate("--checkpoint", trained_run, "--video", clips[0].id, "--question", "wetter " * 200)
    assert result.code == 0
    assert "slt-translate: the question has 202 tokens, the model takes" in result.err
    limit = int(result.err.rpartition("takes ")[2].partition(";")[0])
    assert limit + (clips[0].num_frames + 3) // 4 + 1 == 64  # the position table
    same = slt_translate("--checkpoint", trained_run, "--video", clips[0].id, "--question", "wetter " * (limit - 2))
    assert same.out == result.out
    assert "tokens" not in same.err


def test_beams_and_length_are_those_of_the_run(trained_run, clips, slt_translate, tmp_path, monkeypatch) -> None:
    seen = []

    def search(self, batch, *limits, video):
        seen.append(limits)
        return [[]]

    copy = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    text = text.replace("  beams: 4", "  beams: 2").replace("length_penalty: 1.0", "length_penalty: 0.6")
    (copy / "config.yaml").write_text(text)
    monkeypatch.setattr("slt.models.translator.SLTModel.generate", search)
    assert slt_translate("--checkpoint", copy, "--video", clips[0].id).code == 0
    assert seen == [(2, 11, 0.6)]


# ------------------------------------------------------------------ landmarks and features


@pytest.fixture
def landmarks(tmp_path) -> Path:
    """A data set of random landmarks: two clips a split, one of two files."""
    root, random = tmp_path / "poses", np.random.default_rng(0)
    root.mkdir()
    for split in ("train", "dev", "test"):
        for number in range(3):
            points = random.normal(size=(9 + number, COUNT, 4)).astype(np.float32)
            points[..., 3] = 1
            np.save(root / f"{split}{number}.npy", points)
        rows = [
            {"video_id": f"{split}-a", "video": f"{split}0.npy", "sentence": "ein bär", "question": "welches tier ?"},
            {"video_id": f"{split}-b", "video": [f"{split}1.npy", f"{split}2.npy"], "sentence": "zwei wölfe"},
        ]
        (root / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


@pytest.fixture
def pose_run(landmarks, untrained_run) -> Path:
    arguments = ["--config", "smoke", "--data", READERS["poses"], "--data.root", str(landmarks)]
    arguments += ["--data.face", "false", "--model.backbone", "pose", "--model.init_std", "0.2"]
    config = parse_config(SLTConfig, arguments, presets="slt", choices={"data": READERS})
    return untrained_run(config, "poses")


def test_landmarks_from_files_and_ids(pose_run, landmarks, slt_translate, slt_eval, tmp_path, complains) -> None:
    result = slt_eval("--checkpoint", pose_run, "--probes", "false")
    assert result.code == 0, result.err
    expected = stored(next((tmp_path / "out" / "slt").iterdir()), "ssaw")
    assert expected["test-a"] != expected["test-b"]
    picture = tmp_path / "p.png"
    arguments = ["--checkpoint", pose_run, "--question", "welches tier ?", "--picture", picture]
    assert slt_translate(*arguments, "--video", landmarks / "test0.npy").out == expected["test-a"] + "\n"
    assert is_png(picture)
    assert slt_translate("--checkpoint", pose_run, "--video", "test-b").out == expected["test-b"] + "\n"
    complains(slt_translate("--checkpoint", pose_run, "--video", landmarks), "reads landmarks", ".pose")
    broken = landmarks / "broken.npy"
    broken.write_bytes(b"no landmarks")
    complains(slt_translate("--checkpoint", pose_run, "--video", broken), "broken.npy is not a readable .npy file")


def test_a_model_on_cached_features_gets_its_frame_encoder_back(
    settings, untrained_run, slt_translate, complains, tmp_path, clips
) -> None:
    config = settings("--model.backbone", "resnet18")
    torch.manual_seed(0)
    encoder = build_backbone(config.model)
    torch.save(encoder.network.state_dict(), tmp_path / "resnet18.pth")
    model = dataclasses.replace(config.model, backbone_weights=str(tmp_path / "resnet18.pth"))
    whole = untrained_run(dataclasses.replace(config, model=model), "whole")
    cached = untrained_run(dataclasses.replace(config, model=dataclasses.replace(model, backbone="features")), "cached")
    weights = [torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (whole, cached)]
    weights[1]["state_dict"] = {k: v for k, v in weights[0]["state_dict"].items() if "backbone" not in k}
    torch.save(weights[1], cached / "checkpoints" / "best.ckpt")
    arguments = ["--video", clips[0].id, clips[1].id, "--question", "wie wird das wetter"]
    expected = slt_translate("--checkpoint", whole, *arguments)
    assert slt_translate("--checkpoint", cached, *arguments).out == expected.out
    assert expected.code == 0
    (tmp_path / "resnet18.pth").unlink()
    complains(slt_translate("--checkpoint", cached, *arguments), "cached features", "resnet18.pth", "correct the path")


# ------------------------------------------------------------------ pictures


def test_a_picture_changes_nothing_else(trained_run, clips, slt_translate, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--checkpoint", trained_run, "--video", clips[0].id, "--question", clips[0].question]
    result = slt_translate(*arguments, "--picture")
    assert result.out == stored(trained_run, "ssaw")[clips[0].id] + "\n"
    assert is_png(tmp_path / "translation.png")
    assert "translation.png" in result.err
    first = (tmp_path / "translation.png").read_bytes()
    slt_translate(*arguments, "--picture=again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    slt_translate("--checkpoint", trained_run, "--picture", "b.png", "--video", clips[0].id, clips[1].id)
    assert sorted(p.name for p in tmp_path.glob("b*.png")) == ["b-1.png", "b-2.png"]
    assert (tmp_path / "b-1.png").read_bytes() != (tmp_path / "b-2.png").read_bytes()


@pytest.mark.parametrize(
    ("fusion", "options", "drawn"),
    [
        ("ssaw", "{mode: attention}", True),
        ("ssaw", "{granularity: token}", True),
        ("cross_attention", "{}", True),
        ("gbt", "{}", True),
        ("concat", "{}", False),
        ("none", "{}", False),
        ("question_only", "{}", False),
    ],
)
def test_every_fusion(
    fusion, options, drawn, settings, untrained_run, clips, slt_translate, complains, tmp_path
) -> None:
    folder = untrained_run(settings("--model.fusion", fusion, "--model.fusion_options", options))
    arguments = ["--checkpoint", folder, "--video", clips[0].source[0], "--question", "wie wird das wetter"]
    assert slt_translate(*arguments).code == 0
    result = slt_translate(*arguments, "--picture", tmp_path / "p.png")
    if drawn:
        assert result.code == 0, result.err
        assert is_png(tmp_path / "p.png")
    else:
        complains(result, f"fusion {fusion} has no weights to draw", "leave --picture out")
        assert not (tmp_path / "p.png").exists()
        assert result.out == ""


# ------------------------------------------------------------------ what can be wrong


def test_options(trained_run, clips, slt_translate, complains, tmp_path) -> None:
    usage = "--checkpoint RUN --video CLIP"
    complains(slt_translate(), "--checkpoint is missing", usage)
    complains(slt_translate("--checkpoint", trained_run), "--video is missing", usage)
    complains(slt_translate("--checkpoint", trained_run, "--video"), "--video")
    two = ["--video", clips[0].id, "--question", "wie ?", "wann ?"]
    complains(slt_translate("--checkpoint", trained_run, *two), "2 questions for 1 clips", "one each")
    one = ["--checkpoint", trained_run, "--video", clips[0].id]
    complains(slt_translate(*one, "--picture", "p.tiff"), "p.tiff", ".png")
    complains(slt_translate(*one, "--picture", tmp_path / "no" / "p.png"), "does not exist", "make it first")
    complains(slt_translate("--checkpoint", tmp_path / "no", "--video", "x"), "no does not exist")


def test_clips_that_are_not_there_or_not_clips(trained_run, clips, slt_translate, complains, tmp_path) -> None:
    def say(video, *parts):
        complains(slt_translate("--checkpoint", trained_run, "--video", video), *parts)

    say(tmp_path / "no", f"--video {tmp_path / 'no'}: no such file or folder")
    say("no.mp4", "--video no.mp4: no such file or folder")
    say("synthetic-test-99999", "no such file or folder, and no clip of that name in synthetic")
    say(tmp_path, "no PNG or JPEG frames", f"{tmp_path}/*")
    (tmp_path / "a.pose").write_bytes(b"")
    say(tmp_path / "a.pose", "neither a folder of frames nor", ".mp4", "reads frames, not poses")
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x18ftyp")
    say(tmp_path / "cut.mp4", "cut.mp4")


def test_a_truncated_frame(trained_run, clips, slt_translate, complains, tmp_path) -> None:
    folder = Path(shutil.copytree(clips[0].source[0], tmp_path / "clip"))
    frame = folder / "images0004.png"
    frame.write_bytes(frame.read_bytes()[:50])
    complains(
        slt_translate("--checkpoint", trained_run, "--video", folder),
        str(frame),
        "50 bytes",
        "copy or extract it again",
    )


def test_data_that_moved_away(trained_run, clips, slt_translate, complains, tmp_path) -> None:
    copy = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    config = read_run_config(copy)
    text = (copy / "config.yaml").read_text()
    text = text.replace("slt.data.synthetic.Synthetic", "slt.data.phoenix.Phoenix2014T")
    for option in ("world_seed", "sizes", "frame_size", "noise", "distractors"):
        assert f"    {option}:" in text
    lines = text.splitlines()
    start = lines.index("    world_seed: 0")
    stop = lines.index(next(line for line in lines[start:] if not line.startswith("    ")))
    (copy / "config.yaml").write_text(
        "\n".join(lines[:start] + lines[stop:]).replace(str(config.data.root), "/not/here")
    )
    complains(slt_translate("--checkpoint", copy, "--video", clips[0].id), "run's data cannot be searched", "/not/here")
    result = slt_translate("--checkpoint", copy, "--video", clips[0].source[0], "--question", clips[0].question)
    assert result.out == stored(trained_run, "ssaw")[clips[0].id] + "\n"


# ------------------------------------------------------------------ as a command


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--video a b --question x", ["--video", ["a", "b"], "--question", ["x"]]),
        ("--video a --video=b --threads 1", ["--threads", "1", "--video", ["a", "b"]]),
        ("--video a --picture", ["--picture=translation.png", "--video", ["a"]]),
        ("--picture --video a", ["--picture=translation.png", "--video", ["a"]]),
        ("--picture p.svg --video a", ["--picture=p.svg", "--video", ["a"]]),
        ("--picture=p.svg --checkpoint=c", ["--picture=p.svg", "--checkpoint=c"]),
        ("--video", ["--video"]),
        ("", []),
    ],
)
def test_lists_of_clips_and_a_bare_picture(given: str, expected: list) -> None:
    found = []
    for argument in gather_options(given.split()):
        option, eq, value = argument.partition("=")
        found += [option, json.loads(value)] if eq and option in ("--video", "--question") else [argument]
    assert found == expected


@pytest.mark.parametrize("question", ["no", "wann: heute?", "[1, 2]", "null", "3", "{a: b}", 'he "asked"', "- x", "雪"])
def test_a_question_is_never_read_as_yaml(question, trained_run, clips, slt_translate, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("slt.translate.Translator.translate", lambda self, n, text, p: asked.append(text) or "")
    result = slt_translate("--checkpoint", trained_run, "--video", clips[0].id, "--question", question)
    assert result.code == 0, result.err
    assert asked == [question]


def test_help(slt_translate) -> None:
    result = slt_translate("--help")
    assert result.out.splitlines()[2] == "Example:"
    assert len(result.out.splitlines()) < 30
    assert "…" not in result.out


def test_as_a_console_script(trained_run, clips, tmp_path) -> None:
    arguments = [COMMAND, "--checkpoint", trained_run, "--video", clips[0].source[0], "--question", clips[0].question]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == stored(trained_run, "ssaw")[clips[0].id] + "\n"
    assert done.stderr == ""
    failed = subprocess.run([*arguments[:3], "--video", "no/clip"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == "slt-translate: error: --video no/clip: no such file or folder; check the path\n"
