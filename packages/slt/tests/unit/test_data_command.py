"""``slt-data``: every subcommand on a small world, exit codes, one-line errors."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from polymodal.data import ArrayCache
from slt import data_command
from slt.data import fingerspelling, survey
from slt.data.landmarks import COUNT
from slt.data.manifest import Manifest
from slt.data.phoenix import Phoenix2014T
from slt.data.synthetic import Synthetic


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command; returns exit code, stdout, stderr."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slt-data", *map(str, arguments)])
        code = data_command.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small world; (options of the command, its PHOENIX root, its question folder)."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    data = Synthetic(root=tmp_path / "worlds", sizes=(6, 3, 3))
    data.prepare()
    options = ["--data", "phoenix2014t", "--data.root", data.home(), "--data.questions", data.questions_default()]
    return options, data.home(), data.questions_default()


def error(result, *parts):
    code, _, err = result
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert ": error: " in last
    for part in parts:
        assert part in last, last


def test_help_and_unknown_commands(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in ("validate", "build", "stats", "cache", "synth", "trim", "fingerspelling"):
        assert f"  {name} " in out
    assert call("nonsense")[0] == 2
    for name in data_command._TABLE:
        code, out, _ = call(name, "--help")
        assert code == 0
        assert f"slt-data {name}" in out
        assert len(out.splitlines()) < 60


def test_validate_passes_on_a_whole_data_set(call, world):
    code, out, err = call("validate", *world[0], "--frames", "all")
    assert code == 0, err
    assert "train 6, dev 3, test 3 clips" in out
    assert "| dev | 3 | 0 | 0.0 % | 0 (> 30 %) |" in out
    assert "clips decoded: 12/12" in err
    assert out.endswith("ok\n")
    assert call("validate", *world[0], "--frames", "none")[1].endswith("ok (no frame was decoded)\n")


def edit(path, change):
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [(number, json.loads(line)) for number, line in enumerate(lines)]
    number, row = next((n, r) for n, r in rows if "video_id" in r)
    lines[number] = json.dumps(change(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return number + 1


def test_validate_refuses_leaks_unless_told(call, world):
    options, _, questions = world
    line = edit(questions / "dev.jsonl", lambda row: {**row, "question": row["sentence"] + " ?"})
    error(call("validate", *options), f"dev.jsonl:{line}:", "100 %", "1 of 3 questions leak", "--allow_leaks")
    code, out, _ = call("validate", *options, "--allow_leaks", "true")
    assert code == 0
    assert "1 (33.3 %)" in out
    assert call("validate", *options, "--threshold", "1.0")[0] == 0


def test_validate_names_bad_questions_and_frames(call, world):
    options, home, questions = world
    whole = (questions / "test.jsonl").read_text(encoding="utf-8")
    line = edit(questions / "test.jsonl", lambda row: {**row, "video_id": "unknown"})
    error(call("validate", *options), f"test.jsonl:{line}:", "unknown video_id 'unknown'")
    (questions / "test.jsonl").write_text(whole, encoding="utf-8")
    frame = sorted((home / "features" / "fullFrame-210x260px" / "test").rglob("*.png"))[0]
    with frame.open("r+b") as file:
        file.truncate(40)
    code, out, err = call("validate", *options)
    assert code == 2
    assert f"broken: frame {frame}" in out
    assert "1 clips cannot be decoded" in err.splitlines()[-1]
    error(call("validate", "--data", "phoenix"), "did you mean phoenix2014t")
    error(call("validate", "--data", "phoenix2014t", "--data.root", home / "no"), "does not exist")


def test_stats_show_what_questions_alone_are_worth(call, world):
    options, _, questions = world
    edit(questions / "dev.jsonl", lambda row: {**row, "question": row["sentence"]})
    code, out, err = call("stats", *options)
    assert code == 0, err
    assert "| train | 6 | " in out
    assert "sentences that occur in train too: 0 of dev" in out
    row = next(line for line in out.splitlines() if line.startswith("| dev |") and line.count("|") == 4)
    assert float(row.split("|")[2]) > 0  # the copied question scores
    assert "BLEU|nrefs:1|case:lc" in out


def test_build_templates(call, world, tmp_path):
    options, _, _ = world
    code, out, err = call("build", *options[:4], "--source", "template", "--out", tmp_path / "q")
    assert code == 0, err
    assert "train.jsonl: 6 questions" in out
    found = Phoenix2014T(root=options[3], questions=tmp_path / "q").items("dev")
    assert all(item.question for item in found)
    assert call("validate", *options[:4], "--data.questions", tmp_path / "q")[0] == 0
    error(call("build", *options[:4], "--out", tmp_path / "q"), "train.jsonl exists", "--overwrite")
    assert call("build", *options[:4], "--out", tmp_path / "q", "--overwrite", "true")[0] == 0


def test_build_from_the_predecessors_files(call, world, tmp_path):
    options, home, _ = world
    items = Phoenix2014T(root=home).items("dev")
    lines = [f"dev/{item.id} {item.sentence}%wie wird {n} ?%GLOSS" for n, item in enumerate(items)]
    (tmp_path / "gbt.dev").write_text("\n".join(lines), encoding="utf-8")
    plain = options[:4]
    code, out, err = call("build", *plain, "--source", "gbt", "--dev", tmp_path / "gbt.dev", "--out", tmp_path / "q")
    assert code == 0, err
    assert "dev.jsonl: 3 questions" in out
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["dev.jsonl"]
    found = Phoenix2014T(root=home, questions=tmp_path / "q").items("dev")
    assert [item.question for item in found] == [f"wie wird {n} ?" for n in range(3)]
    more = ["--source", "gbt", "--out", tmp_path / "r"]
    error(call("build", *plain, *more), "--train FILE")
    error(call("build", *plain, *more, "--dev", tmp_path / "none"), "none is missing")
    (tmp_path / "gbt.dev").write_text(
        "\n".join([*lines[:2], lines[2].replace(items[2].sentence, "x")]), encoding="utf-8"
    )
    error(call("build", *plain, *more, "--dev", tmp_path / "gbt.dev"), "gbt.dev:3:", "differs from the annotation")
    (tmp_path / "gbt.dev").write_text("\n".join(lines[:2]), encoding="utf-8")
    error(call("build", *plain, *more, "--dev", tmp_path / "gbt.dev"), "no question for", "allow_missing")
    assert not (tmp_path / "r").exists()


def test_cache_of_frames(call, world, tmp_path):
    code, out, err = call("cache", *world[0], "--size", "24", "--workers", "2", "--out", tmp_path / "c")
    assert code == 0, err
    assert "12 clips" in out
    assert len(ArrayCache(tmp_path / "c")) == 12
    error(call("cache", *world[0], "--size", "24", "--out", tmp_path / "c"), "exists")
    error(call("cache", *world[0], "--what", "features"), "--weights FILE")


def test_cache_of_features(call, world, tmp_path):
    import torch
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "r.pth")
    small = ["--frame_size", "32", "--resize", "36", "--weights", tmp_path / "r.pth", "--out", tmp_path / "f"]
    code, _, err = call("cache", *world[0], "--what", "features", *small)
    assert code == 0, err
    cache = ArrayCache(tmp_path / "f")
    assert {cache[key].shape[1] for key in cache} == {512}
    assert {cache[key].dtype for key in cache} == {np.dtype(np.float16)}


def test_synth_writes_a_world_that_reads_as_phoenix(call, tmp_path):
    code, out, err = call("synth", "--out", tmp_path / "w", "--sizes", "[4,2,2]", "--seed", "3")
    assert code == 0, err
    words = out.splitlines()[-1].split()
    options = words[words.index("--data") :]
    assert call("validate", *options)[0] == 0
    error(call("synth", "--out", tmp_path / "w", "--noise", "2"), "noise=2")


def test_trim_needs_folders(call, tmp_path, world):
    error(call("trim", *world[0]), "--model DIR")
    error(call("trim", *world[0], "--model", tmp_path / "no", "--out", tmp_path / "o"), str(tmp_path / "no"))


def test_fingerspelling(call, tmp_path, monkeypatch):
    lexicon = tmp_path / "lexicon"
    rows = ["path,signed_language,words"]
    for language in fingerspelling.ONE_HANDED:
        (lexicon / language).mkdir(parents=True)
        for letter in "ABCDEFGHIKLMNOPRSTUVY":
            (lexicon / language / f"{letter}.pose").touch()
            rows.append(f"{language}/{letter}.pose,{language},{letter}")
    (lexicon / "data.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(fingerspelling, "read_pose", lambda path: np.ones((15, COUNT, 4), np.float32))
    code, out, err = call("fingerspelling", "--lexicon", lexicon, "--out", tmp_path / "fs", "--letter_frames", "3")
    assert code == 0, err
    assert "use it: slt-train --data poses --data.root" in out
    code, out, err = call("validate", "--data", "poses", "--data.root", tmp_path / "fs")
    assert code == 0, err
    assert "no question folder" not in err
    error(call("fingerspelling"), "--lexicon DIR")


def test_validate_names_the_manifest_of_an_inline_leak(call, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "own" / "clip").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "own" / "clip" / "1.png")
    for split in ("train", "dev", "test"):
        row = {"video_id": split, "video": "clip", "sentence": "green apples", "question": "green apples ?"}
        (tmp_path / "own" / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    error(call("validate", "--data", "manifest", "--data.root", tmp_path / "own"), "own/train.jsonl: the question of")


def test_broken_clips_checks_its_option(tmp_path):
    with pytest.raises(Exception, match="expected none, sample"):
        survey.broken_clips(Manifest(), "some")


def test_readers_travel_to_workers(world):
    reader = Phoenix2014T(root=world[1], questions=world[2])
    reader.items("train")
    again = pickle.loads(pickle.dumps(reader))
    assert again.fingerprint() == reader.fingerprint()


def test_the_command_and_the_readers_import_no_torch():
    code = """
import sys, slt.data, slt.data_command
from slt.data import READERS, reader_class
for name in READERS: reader_class(name)
import slt.data.cache, slt.data.fingerspelling, slt.data.survey, slt.data.templates, slt.data.gbt
heavy = {"torch", "transformers", "lightning", "pose_format", "av", "torchcodec"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
