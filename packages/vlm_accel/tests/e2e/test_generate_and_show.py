"""vlm-generate and vlm-show on checkpoints with real processors, and what they say to bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vlm_checkpoints
from PIL import Image
from vlm_accel import generate_command, show_command
from vlm_accel.bench_command import main as bench_main

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm")
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        return folder / name if (folder / name).is_dir() else vlm_checkpoints.write(name, folder / name)

    return get


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(4):
        pixels = draw.integers(0, 255, (56, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder / "0.png"


def call(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], *words: object) -> int:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["vlm", *map(str, words)])
    return main()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_on_every_family(
    family: str, checkpoint: Callable[[str], Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answer.json"
    code = call(
        monkeypatch, generate_command.main, "--model", checkpoint(family), "--images", picture, picture, "--question",
        "what is it ?", "--method", "recycle+lightvlm", "--schedule", "keep35", "--kv", "ratio:0.5",
        "--max_new_tokens", 3, "--out", out,
    )  # fmt: skip
    assert code == 0
    told = json.loads(out.read_text())
    stats = told["answer"]["stats"]
    assert stats["tokens/llm_05"] < stats["tokens/image"]
    assert stats["macs/prefill"] < stats["macs/prefill_plain"]
    assert told["plain"]["stats"]["time/prefill_ms"] > 0
    assert isinstance(told["answer"]["answer"], str)


@pytest.mark.parametrize("family", VIDEO)
def test_videos_keep_every_slice(
    family: str, checkpoint: Callable[[str], Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = call(
        monkeypatch, show_command.main, "--model", checkpoint(family), "--video", picture.parent, "--frames", 4,
        "--question", "what is it ?", "--out", tmp_path / "shown",
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    segments = [line for line in text.out.splitlines() if line.startswith("segment ")]
    assert len(segments) == (2 if family.startswith("qwen") else 4)
    assert all("llm" in line for line in segments)


def test_shows_every_step_of_every_tile(
    checkpoint: Callable[[str], Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shown"
    code = call(
        monkeypatch, show_command.main, "--model", checkpoint("llava_next"), "--images", picture, "--method",
        "recycle+lightvlm", "--schedule", "keep35", "--out", out,
    )  # fmt: skip
    assert code == 0
    (told,) = out.glob("*.json")
    steps = json.loads(told.read_text())["steps"]
    assert [step["stage"] for step in steps][:1] == ["splice"]
    assert len(list(out.glob("*.png"))) == len(steps)


BAD = {
    "no picture": (["--model", "MODEL"], "--images FILE"),
    "no such model": (["--model", "nowhere", "--images", "PICTURE"], "no config.json"),
    "no such picture": (["--model", "MODEL", "--images", "nothing.png"], "no such file"),
    "no picture in the file": (["--model", "MODEL", "--images", "BROKEN"], "cannot be read"),
    "unknown method": (["--model", "MODEL", "--images", "PICTURE", "--method", "lightvln"], "did you mean"),
    "ratio out of range": (["--model", "MODEL", "--images", "PICTURE", "--ratio", "1.5"], "(0, 1]"),
    "both ratio and schedule": (
        ["--model", "MODEL", "--images", "PICTURE", "--ratio", "0.5", "--schedule", "keep3"],
        "not both",
    ),
    "layer beyond the model": (
        ["--model", "MODEL", "--images", "PICTURE", "--schedule", "ov_image", "--method", "rank1"],
        "layers",
    ),
    "unknown preset": (["--model", "MODEL", "--images", "PICTURE", "--schedule", "keep4"], "known: "),
    "bad budget": (["--model", "MODEL", "--images", "PICTURE", "--kv", "half"], "ratio:0.5"),
    "no video model": (["--model", "MODEL", "--video", "FOLDER"], "takes no videos"),
    "no new tokens": (["--model", "MODEL", "--images", "PICTURE", "--max_new_tokens", "0"], "start at 1"),
    "pictures for the built-in model": (["--images", "PICTURE"], "--model DIR"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, checkpoint: Callable[[str], Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words, hint = BAD[name]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    places = {
        "MODEL": str(checkpoint("llava")), "PICTURE": str(picture), "BROKEN": str(tmp_path / "broken.png"),
        "FOLDER": str(picture.parent),
    }  # fmt: skip
    code = call(monkeypatch, generate_command.main, *(places.get(word, word) for word in words))
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("vlm-generate: error:")]
    assert code == 2, told
    assert len(lines) == 1
    assert hint in lines[0]


def test_unsupported_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    code = call(monkeypatch, generate_command.main, "--model", tmp_path, "--images", picture)
    assert code == 2
    assert "blip-2" in (told := capsys.readouterr().err)
    assert "qwen2_5_vl" in told


@pytest.mark.parametrize("main", [generate_command.main, show_command.main, bench_main])
def test_help_starts_with_an_example(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, main, "--help") == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2] == "Example:"
    assert len(text.splitlines()) < 100
