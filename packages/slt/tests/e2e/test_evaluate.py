"""``slt-eval``: a checkpoint's scores, anybody's predictions, and one line for everything that can be wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
import torch
import yaml
from polymodal.testing import manifest
from slt.checkpoint import load_trained, locate, read_run_config
from slt.data.cache import build_frame_cache
from slt.data.synthetic import Synthetic
from slt.evaluate import translate_split
from slt.tokenizer import Tokenizer

COMMAND = Path(sys.executable).with_name("slt-eval")


def run_of(result) -> Path:
    """The run folder that a command named at its end."""
    (line,) = [line for line in result.out.splitlines() if line.startswith("run folder")]
    return Path(line.split(maxsplit=2)[2])


def predictions(folder: Path, name: str) -> dict[str, str]:
    rows = (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return {row["video_id"]: row["prediction"] for row in map(json.loads, rows)}


@pytest.fixture
def copy(trained_run, tmp_path) -> Path:
    """A copy of the trained run to damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


def edit_checkpoint(folder: Path, change) -> None:
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


# ------------------------------------------------------------------ a checkpoint


def test_a_run_is_scored_as_at_the_end_of_its_training(trained_run, slt_eval) -> None:
    result = slt_eval("--checkpoint", trained_run)
    assert result.code == 0, result.err
    before, now = manifest(trained_run), manifest(run_of(result))
    assert now["metrics"] == pytest.approx(before["metrics"], abs=1e-9)
    assert set(now["metrics"]) == set(before["metrics"])
    for name in ("ssaw", "shuffled_question", "empty_question", "question_only"):
        assert predictions(run_of(result), name) == predictions(trained_run, name)
    assert len(set(predictions(trained_run, "ssaw").values())) > 1  # else equality would prove little
    assert predictions(trained_run, "ssaw") != predictions(trained_run, "empty_question")
    assert now["job_type"] == "eval"
    assert (now["method"], now["fidelity"], now["seed"]) == ("ssaw", "reconstruction", 3)
    assert now["metric_signatures"] == before["metric_signatures"]
    assert now["data"] == before["data"]
    assert now["checkpoint"] == str(trained_run / "checkpoints" / "best.ckpt")


def test_what_is_printed_and_written(trained_run, slt_eval) -> None:
    result = slt_eval("--checkpoint", trained_run / "checkpoints" / "last.ckpt", "--samples", 2)
    folder = run_of(result)
    for row in ("ssaw", "shuffled_question", "empty_question", "question_only", "copy_question", "question_1nn"):
        assert f"\n{row} " in result.out
    for piece in ("BLEU-1", "BLEU-4", "ROUGE-L coco", "ROUGE-L slrt", "chrF", "BLEU-4 unique", "tok:word", "case:lc"):
        assert piece in result.out
    assert "stand in its question" in result.out
    assert f"synthetic test: {trained_run}/checkpoints/last.ckpt" in result.out
    report = json.loads((folder / "audit.json").read_text())
    assert report["rows"][0]["name"] == report["model"] == "ssaw"
    assert "| ssaw |" in (folder / "audit.md").read_text()
    assert len((folder / "samples" / "test-translations.jsonl").read_text().splitlines()) == 2
    with (folder / "metrics.csv").open() as handle:
        logged = {row["name"]: float(row["value"]) for row in csv.DictReader(handle)}
    assert logged == pytest.approx(manifest(folder)["metrics"])
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["data"]["class_path"] == "slt.data.synthetic.Synthetic"
    assert stored["data"]["init_args"]["sizes"] == [12, 6, 6]


def test_the_configuration_of_an_evaluation_repeats_it(trained_run, slt_eval) -> None:
    first = run_of(slt_eval("--checkpoint", trained_run, "--probes", "false"))
    again = run_of(slt_eval("--config", first))
    assert again != first
    assert manifest(again)["metrics"] == manifest(first)["metrics"]
    assert "test/shuffled_question/bleu4" not in manifest(again)["metrics"]


def test_dev_has_val_names_and_says_how_to_get_question_only(trained_run, slt_eval) -> None:
    result = slt_eval("--checkpoint", trained_run, "--split", "dev")
    names = set(manifest(run_of(result))["metrics"])
    assert {"val/bleu4", "val/rouge_l", "val/copy_question/bleu4", "val/overlap"} <= names
    assert not any(name.startswith("test/") for name in names)
    assert "question_only left out" in result.out
    assert "--question_only RUN" in result.out


def test_question_only_from_a_run_that_translates_any_split(trained_run, settings, untrained_run, slt_eval) -> None:
    blind = untrained_run(settings("--model.fusion", "question_only"))
    result = slt_eval("--checkpoint", trained_run, "--split", "dev", "--question_only", blind)
    assert result.code == 0, result.err
    assert "val/question_only/bleu4" in manifest(run_of(result))["metrics"]
    found = predictions(run_of(result), "question_only")
    assert set(found) == {item.id for item in read_run_config(blind).data.items("dev")}
    own = slt_eval("--checkpoint", blind, "--split", "dev")
    assert predictions(run_of(own), "question_only") == found
    assert "left out" not in own.out


def test_question_only_from_a_file_and_from_the_probe_of_a_run(trained_run, slt_eval, complains, tmp_path) -> None:
    own = trained_run / "predictions" / "ssaw.jsonl"
    world = read_run_config(trained_run).data
    data = ["--data", "synthetic", "--data.root", world.root, "--data.sizes", "[12,6,6]"]
    result = slt_eval("--pred", own, *data, "--question_only", trained_run)
    assert predictions(run_of(result), "question_only") == predictions(trained_run, "question_only")
    file = trained_run / "predictions" / "question_only.jsonl"
    assert manifest(run_of(slt_eval("--pred", own, *data, "--question_only", file)))["metrics"] == pytest.approx(
        manifest(run_of(result))["metrics"]
    )
    complains(
        slt_eval("--checkpoint", trained_run, "--split", "dev", "--question_only", trained_run),
        "no predictions/question_only.jsonl for dev",
        "slt-train --fusion question_only",
    )


def test_options_of_the_data_show_in_signatures(trained_run, slt_eval) -> None:
    result = slt_eval("--checkpoint", trained_run, "--data.append_period", "true", "--data.lowercase", "false")
    signature = manifest(run_of(result))["metric_signatures"]["test/bleu4"]
    assert "case:mixed|period:added" in signature
    assert signature in result.out
    assert "question_only left out" in result.out  # the run's own probe saw other texts


def test_other_data_by_name(trained_run, slt_eval) -> None:
    data = read_run_config(trained_run).data
    options = ["--data", "phoenix2014t", "--data.root", data.home(), "--data.questions", data.questions_default()]
    result = slt_eval("--checkpoint", trained_run, *options)
    assert result.code == 0, result.err
    assert predictions(run_of(result), "ssaw") == predictions(trained_run, "ssaw")
    assert manifest(run_of(result))["data"]["name"] == "phoenix2014t"


def test_frames_are_read_and_encoded_once(trained_run, monkeypatch) -> None:
    trained = load_trained(trained_run, device="cpu")
    read, encoded = [], []
    load, encode = Synthetic.load, trained.module.model.encode_video
    monkeypatch.setattr(Synthetic, "load", lambda self, item, rows: read.append(item.id) or load(self, item, rows))
    monkeypatch.setattr(trained.module.model, "encode_video", lambda f, n: encoded.append(len(n)) or encode(f, n))
    ids = [item.id for item in trained.config.data.items("test")]
    variants = {"own": dict.fromkeys(ids, "wie wird das wetter"), "none": dict.fromkeys(ids, "")}
    found = translate_split(trained, "test", trained.config.loader, variants)
    assert sorted(read) == sorted(ids)
    assert sum(encoded) == len(ids)
    assert found["none"] == predictions(trained_run, "empty_question")
    small = dataclasses.replace(trained.config.loader, eval_batch_size=1)
    assert translate_split(trained, "test", small, variants) == found


def test_a_frame_cache_is_used_where_it_is_there_and_else_does_no_harm(
    settings, untrained_run, slt_eval, tmp_path
) -> None:
    config = settings()
    build_frame_cache(config.data, tmp_path / "cache", size=24)
    loader = dataclasses.replace(config.loader, frame_cache=tmp_path / "cache")
    folder = untrained_run(dataclasses.replace(config, loader=loader))
    first = slt_eval("--checkpoint", folder, "--probes", "false")
    assert "decoded anew" not in first.err
    other = slt_eval("--checkpoint", folder, "--probes", "false", "--data.lowercase", "false")
    assert "frames are decoded anew" in other.err  # other data: their clips may not be in the cache
    shutil.rmtree(tmp_path / "cache")
    second = slt_eval("--checkpoint", folder, "--probes", "false")
    assert "frames are decoded anew" in second.err
    assert predictions(run_of(first), "ssaw") == predictions(run_of(second), "ssaw")


# ------------------------------------------------------------------ a file of predictions


def test_perfect_and_imperfect_predictions(trained_run, slt_eval, tmp_path) -> None:
    data = read_run_config(trained_run).data
    options = ["--data", "synthetic", "--data.root", data.root, "--data.sizes", "[12,6,6]"]
    items = data.items("test")
    perfect = tmp_path / "perfect.txt"
    perfect.write_text("".join(f"{item.sentence.upper()}\n" for item in items))
    result = slt_eval("--pred", perfect, *options)
    metrics = manifest(run_of(result))["metrics"]
    assert [metrics[f"test/bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert run_of(result).name.startswith("perfect-")
    wrong = tmp_path / "wrong.jsonl"
    rows = [{"video_id": item.id, "hypothesis": f"{item.sentence} heute"} for item in reversed(items)]
    wrong.write_text("\n".join(map(json.dumps, rows)))
    result = slt_eval("--pred", wrong, "--name", "my model!", *options)
    expected = sacrebleu.corpus_bleu(
        [f"{item.sentence} heute" for item in items],
        [[item.sentence for item in items]],
        tokenize="none",
        smooth_method="none",
        force=True,
    )
    assert manifest(run_of(result))["metrics"]["test/bleu4"] == pytest.approx(expected.score)
    assert manifest(run_of(result))["method"] == "my-model-"
    assert "question_only left out" in result.out


def test_references_of_a_file(slt_eval, complains, tmp_path) -> None:
    reference, pred = tmp_path / "ref.jsonl", tmp_path / "pred.txt"
    rows = [("a", "Ich fahre nach Hause", "Wohin fährst du ?"), ("b", "Es schneit im Norden", "Wie ist es im Norden ?")]
    reference.write_text(
        "\n".join(json.dumps({"video_id": v, "sentence": s, "question": q}, ensure_ascii=False) for v, s, q in rows)
    )
    pred.write_text("ich fahre nach hause\nes schneit im norden\n")
    result = slt_eval("--pred", pred, "--reference", reference, "--lowercase", "true")
    metrics = manifest(run_of(result))["metrics"]
    assert metrics["test/bleu4"] == pytest.approx(100)
    assert metrics["test/overlap"] == pytest.approx((0 / 4 + 3 / 4) / 2)  # "es", "im", "norden" of four words
    assert "question_1nn left out" in result.out
    assert "case:lc" in result.out
    assert f"{reference}: {pred}" in result.out
    cased = slt_eval("--pred", pred, "--reference", reference, "--level", "char")
    assert "case:mixed" in cased.out
    assert "tok:char" in cased.out
    assert manifest(run_of(cased))["metrics"]["test/bleu4"] < 100
    complains(slt_eval("--pred", pred, "--level", "char"), "--level and --lowercase go with --reference")
    complains(
        slt_eval("--pred", pred, "--reference", reference, "--data", "synthetic"), "--reference and --data exclude"
    )
    complains(slt_eval("--checkpoint", tmp_path, "--reference", reference), "--reference goes with --pred")


def test_a_name_that_is_computed_here_is_refused(slt_eval, complains, tmp_path) -> None:
    (tmp_path / "ref.jsonl").write_text('{"video_id": "a", "sentence": "x y", "question": "z"}\n')
    (tmp_path / "copy_question.txt").write_text("x y\n")
    result = slt_eval("--pred", tmp_path / "copy_question.txt", "--reference", tmp_path / "ref.jsonl")
    complains(result, "copy_question", "choose another name")


# ------------------------------------------------------------------ what can be wrong


def test_options_that_are_missing_or_too_many(slt_eval, complains, trained_run, tmp_path) -> None:
    complains(slt_eval(), "--checkpoint RUN", "--pred FILE")
    complains(slt_eval("--checkpoint", trained_run, "--pred", tmp_path / "p.jsonl"), "--checkpoint RUN", "--pred FILE")
    complains(slt_eval("--checkpoint", trained_run, "--data", "poses", "--data.root", tmp_path), "trained on frames")
    complains(slt_eval("--checkpoint", trained_run, "--data.nonsense", "1"), "nonsense")
    complains(slt_eval("--checkpoint", trained_run, "--data", "fenix"), "unknown name", "phoenix2014t")
    if not torch.cuda.is_available():
        complains(slt_eval("--checkpoint", trained_run, "--device", "cuda"), "--device cuda", "use auto or cpu")


def test_paths_that_lead_nowhere(slt_eval, complains, trained_run, tmp_path) -> None:
    complains(slt_eval("--checkpoint", tmp_path / "no"), str(tmp_path / "no"), "does not exist", "slt-train")
    complains(slt_eval("--checkpoint", tmp_path), "not a run folder", "manifest.json")
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", tmp_path / "lonely.ckpt")
    complains(slt_eval("--checkpoint", tmp_path / "lonely.ckpt"), "lonely.ckpt", "no config.yaml", "run folder")
    assert not (tmp_path / "out").exists()  # no run folder for a mistake


def test_runs_that_are_no_training_runs(slt_eval, complains, copy) -> None:
    stated = manifest(copy)
    (copy / "manifest.json").write_text(json.dumps({**stated, "task": "css"}))
    complains(slt_eval("--checkpoint", copy), "run of task 'css'", "slt-train")
    (copy / "manifest.json").write_text(
        json.dumps({**stated, "job_type": "eval", "checkpoint": "runs/slt/x/best.ckpt"})
    )
    complains(slt_eval("--checkpoint", copy), "is an evaluation", "runs/slt/x/best.ckpt")
    (copy / "manifest.json").write_text(json.dumps({**stated, "schema_version": 99}))
    complains(slt_eval("--checkpoint", copy), "schema version 99", "install a newer polymodal")


def test_run_folders_with_something_missing(slt_eval, complains, copy) -> None:
    (copy / "checkpoints" / "best.ckpt").unlink()
    assert locate(copy)[1].name == "last.ckpt"
    for path in (copy / "checkpoints").iterdir():
        path.unlink()
    complains(slt_eval("--checkpoint", copy), "neither best.ckpt nor last.ckpt")
    (copy / "config.yaml").write_text("model:\n  colour: green\n")
    (copy / "checkpoints" / "best.ckpt").write_bytes(b"")
    complains(slt_eval("--checkpoint", copy), "config.yaml", "colour", "another version")
    (copy / "config.yaml").unlink()
    complains(slt_eval("--checkpoint", copy), "config.yaml is missing")


def test_another_vocabulary(slt_eval, complains, copy) -> None:
    Tokenizer.build("word", ["ganz andere wörter"], "de_DE").save(copy / "tokenizer")
    complains(slt_eval("--checkpoint", copy), "best.ckpt has vocabulary", "tokenizer/")
    shutil.rmtree(copy / "tokenizer")
    complains(slt_eval("--checkpoint", copy), "slt_tokenizer.json does not exist")


def test_checkpoints_that_cannot_be_read(slt_eval, complains, copy) -> None:
    path = copy / "checkpoints" / "best.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    complains(slt_eval("--checkpoint", copy), "best.ckpt is damaged")
    path.write_bytes(b"no checkpoint at all")
    complains(slt_eval("--checkpoint", copy), "best.ckpt is damaged")
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, path)
    complains(slt_eval("--checkpoint", copy), "best.ckpt", "could run code")
    torch.save({"weights": torch.zeros(2)}, path)
    complains(slt_eval("--checkpoint", copy), "best.ckpt has no state_dict")
    torch.save({"state_dict": {}}, path)
    complains(slt_eval("--checkpoint", copy), "best.ckpt is not a checkpoint of slt-train")


def test_checkpoints_of_another_stage_version_or_network(slt_eval, complains, copy) -> None:
    edit_checkpoint(copy, lambda c: c["slt"].update(stage=1))
    complains(slt_eval("--checkpoint", copy), "stage 1 (alignment)", "--stage1_checkpoint")
    edit_checkpoint(copy, lambda c: c["slt"].update(stage=2, schema_version=99))
    complains(slt_eval("--checkpoint", copy), "newer version")
    edit_checkpoint(copy, lambda c: c["slt"].update(schema_version=1))
    text = (copy / "config.yaml").read_text()
    assert "ffn: 64" in text
    (copy / "config.yaml").write_text(text.replace("ffn: 64", "ffn: 48"))
    complains(slt_eval("--checkpoint", copy), "does not fit", "config.yaml", "mixed run folders")


def test_a_checkpoint_needs_neither_pretrained_files_nor_training_data(copy) -> None:
    text = (copy / "config.yaml").read_text()
    for option in ("pretrained_text", "pretrained_translator"):
        assert f"{option}: null" in text
        text = text.replace(f"{option}: null", f"{option}: /not/here")
    (copy / "config.yaml").write_text(text.replace(f"root: {read_run_config(copy).data.root}", "root: /not/here"))
    trained = load_trained(copy, device="cpu")
    assert str(trained.config.data.root) == "/not/here"
    assert not trained.module.training
    assert trained.module.max_new_tokens == 11  # 1.5 times the longest training target: five words, end, tag


def test_broken_frames_stop_the_run_with_their_name(trained_run, slt_eval, complains, tmp_path) -> None:
    data = read_run_config(trained_run).data
    home = Path(shutil.copytree(data.world(), tmp_path / "world")) / "PHOENIX-2014-T"
    frame = next((home / data.features / "test").rglob("images0003.png"))
    frame.write_bytes(frame.read_bytes()[:60])
    options = ["--data", "phoenix2014t", "--data.root", home, "--data.questions", tmp_path / "world" / "questions"]
    complains(slt_eval("--checkpoint", trained_run, *options), str(frame), "60 bytes", "cannot be decoded")
    (folder,) = (tmp_path / "out" / "slt").iterdir()
    assert manifest(folder)["status"] == "failed"
    shutil.rmtree(frame.parent)
    complains(slt_eval("--checkpoint", trained_run, *options), str(frame.parent), "missing", "corpus.csv, line")


# ------------------------------------------------------------------ as a command


def test_help_starts_with_an_example_and_fits_on_two_screens(slt_eval) -> None:
    result = slt_eval("--help")
    lines = result.out.splitlines()
    assert lines[:4] == ["usage: slt-eval [options]", "", "Example:", lines[3]]
    assert "slt-eval --checkpoint runs/slt/RUN" in lines[3]
    assert len(lines) <= 60
    assert "…" not in result.out
    for option in ("--checkpoint", "--pred", "--reference", "--split", "--question_only", "--data.lowercase"):
        assert f"  {option} " in result.out


def test_as_a_console_script(trained_run, tmp_path) -> None:
    pred = trained_run / "predictions" / "ssaw.jsonl"
    (tmp_path / "ref.jsonl").write_text(
        "\n".join(
            json.dumps({"video_id": item.id, "sentence": item.sentence, "question": item.question})
            for item in read_run_config(trained_run).data.items("test")
        )
    )
    done = subprocess.run(
        [COMMAND, "--pred", pred, "--reference", "ref.jsonl", "--log.wandb", "off"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "copy_question" in done.stdout
    bleu4 = manifest(next((tmp_path / "runs" / "slt").iterdir()))["metrics"]["test/bleu4"]
    assert bleu4 == pytest.approx(manifest(trained_run)["metrics"]["test/bleu4"])
    failed = subprocess.run([COMMAND, "--checkpoint", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip() == (
        "slt-eval: error: nowhere does not exist; give a run folder of slt-train or a checkpoint in one"
    )
