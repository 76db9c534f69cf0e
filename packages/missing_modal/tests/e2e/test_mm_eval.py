"""mm-eval and mm-predict as their users call them, on a run of the built-in world."""

import json
import shutil

import numpy as np
import pytest
from missing_modal.checkpoint import load_trained
from missing_modal.eval_settings import BackboneChoice, gather
from missing_modal.export import read
from missing_modal.job import Job
from missing_modal.metrics import probabilities
from missing_modal.report import read_report
from polymodal.errors import UserError
from polymodal.testing import folder_of, manifest

# ------------------------------------------------------------------ mm-eval


def test_the_test_split_is_scored_as_after_training(call, mm_run, tmp_path):
    result = call("mm-eval", mm_run)
    assert result.code == 0, result.err
    folder = folder_of(tmp_path)
    before, after = manifest(mm_run)["metrics"], manifest(folder)["metrics"]
    shared = {name for name in before if name.startswith("test/")}
    assert {"test/accuracy", "test/nll/complete"} <= shared <= set(after)
    for name in shared:
        assert after[name] == pytest.approx(before[name], abs=1e-6), name
    assert read_report(folder).rows == read_report(mm_run).rows
    assert (folder / "figures" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "| complete |" in result.out
    assert "best.ckpt" in result.out
    facts = manifest(folder)
    assert (facts["job_type"], facts["method"], facts["status"]) == ("eval", "dcp", "finished")


def test_every_prediction_is_written_with_its_truth(call, mm_run, tmp_path):
    assert call("mm-eval", mm_run).code == 0
    rows = [json.loads(line) for line in (folder_of(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 128
    right = np.mean([row["predicted"] == [row["label"]] for row in rows])
    assert right == pytest.approx(manifest(folder_of(tmp_path))["metrics"]["test/accuracy"], abs=1e-9)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)


def test_another_split_under_another_table(call, mm_run, tmp_path):
    result = call("mm-eval", mm_run, "--split", "val", "--missing.kind", "text", "--missing.ratio", "1.0")
    assert result.code == 0, result.err
    report = read_report(folder_of(tmp_path))
    assert [(row.pattern, row.samples) for row in report.rows] == [("all", 96), ("image", 96)]
    assert report.missing == "text, 100 % of the rows"
    assert "val/accuracy" in manifest(folder_of(tmp_path))["metrics"]


def test_an_exported_file_scores_as_its_run(call, mm_run, tmp_path):
    assert call("mm-eval", mm_run / "export" / "trainable.safetensors").code == 0
    after, before = manifest(folder_of(tmp_path))["metrics"], manifest(mm_run)["metrics"]
    for name in ("test/accuracy", "test/nll", "test/auroc"):
        assert after[name] == pytest.approx(before[name], abs=1e-6)
    assert "fitted on 96 validation samples" in call("mm-eval", mm_run / "export" / "baked.safetensors").out


def test_export_from_a_checkpoint(call, mm_run, tmp_path):
    result = call("mm-eval", mm_run, "--export", tmp_path / "small", "--export_dtype", "float32")
    assert result.code == 0, result.err
    about, tensors = read(tmp_path / "small" / "baked.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {"torch.float32"}
    assert about["temperatures"] == json.loads((mm_run / "calibration.json").read_text())["temperatures"]
    assert "logits differ by at most" in result.out
    first, second = (read(f / "trainable.safetensors")[1] for f in (mm_run / "export", tmp_path / "small"))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["NOWHERE"], "no such file or folder"),
        ([], "no checkpoint given"),
        (["RUN", "--split", "dev"], "split"),
        (["RUN", "--missing.kind", "audio"], "expected one of none, both, any, image, text"),
        (["RUN", "--missing.ratio", "1.5"], "expected a share from 0 to 1"),
        (["RUN", "--data", "mmimdb", "--data.root", "NOWHERE"], "other classes"),
        (["RUN", "--backbone", "open_clip:ViT-B-32"], "needs weights"),
    ],
    ids=str,
)
def test_bad_input_of_mm_eval_is_one_line(arguments, part, call, mm_run, complains):
    complains(call("mm-eval", *[str(mm_run) if word == "RUN" else word for word in arguments]), part)


def test_a_run_without_its_encoders_says_what_to_give(call, mm_run, tmp_path, complains):
    lone = tmp_path / "lone"
    shutil.copytree(mm_run, lone)
    (lone / "towers.safetensors").unlink()
    complains(call("mm-eval", lone), "--backbone.weights", "towers.safetensors")
    result = call("mm-eval", lone, "--backbone.weights", mm_run / "towers.safetensors")
    assert result.code == 0, result.err


def test_other_encoders_are_refused(mm_run, tmp_path):
    from missing_modal.backbones.weights import read_towers, save_towers

    towers, _ = read_towers(mm_run / "towers.safetensors")
    changed = [tower.replaced({name: value + 1 for name, value in tower.state().items()}) for tower in towers]
    save_towers(tmp_path / "other.safetensors", changed)
    with pytest.raises(UserError, match="belongs to other image weights"):
        load_trained(mm_run, BackboneChoice(weights=tmp_path / "other.safetensors"))


def test_damaged_and_foreign_files(mm_run, tmp_path, call, complains):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((mm_run / "checkpoints" / "best.ckpt").read_bytes()[:3000])
    complains(call("mm-eval", broken), "damaged")
    (tmp_path / "empty").mkdir()
    complains(call("mm-eval", tmp_path / "empty"), "no checkpoint there")


# ------------------------------------------------------------------ mm-predict


def test_samples_of_the_run_with_and_without_a_modality(call, mm_run):
    result = call("mm-predict", mm_run, "--sample", "world-test-00000", "world-test-00001", "--without", "text")
    assert result.code == 0, result.err
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert [line[:2] for line in lines] == [["world-test-00000", "image"], ["world-test-00001", "image"]]
    both = call("mm-predict", mm_run, "--sample", "world-test-00000")
    assert both.out.split("\t")[1] == "image+text"
    assert both.out.split("\t")[2] != lines[0][2]


def _rows(run, count=6):
    """Samples of the test split as rows of a file, every third without an image, with the logits of direct use."""
    import torch
    from missing_modal.datamodule import Row, collate
    from missing_modal.eval_settings import run_config_of

    config = run_config_of(run)
    trained = load_trained(run)
    samples = Job(config).reader.samples("test")[:count]
    lines, rows = [], []
    for number, sample in enumerate(samples):
        held = {k: v for k, v in sample.inputs.items() if k == "text" or number % 3}
        lines.append(json.dumps({"id": sample.id, **{name: value.tolist() for name, value in held.items()}}))
        mask = 3 if number % 3 else 2
        rows.append(Row(sample.id, mask, {name: torch.as_tensor(value) for name, value in held.items()}, None))
    with torch.inference_mode():
        logits = trained.model(collate(rows, ("image", "text"), "binary")).numpy()
    return lines, logits, [row.mask for row in rows], trained


def test_rows_of_a_file_get_calibrated_probabilities(call, mm_run, tmp_path):
    lines, logits, masks, trained = _rows(mm_run)
    source, out = tmp_path / "rows.jsonl", tmp_path / "found.jsonl"
    source.write_text("\n".join(lines) + "\n")
    result = call("mm-predict", mm_run, "--jsonl", source, "--out", out, "--batch_size", "4")
    assert result.code == 0, result.err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = probabilities(trained.temperatures.scale(logits, masks), "binary")
    got = np.array([[row["probabilities"][name] for name in ("minus", "plus")] for row in found])
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert [row["present"] for row in found][:2] == [["text"], ["image", "text"]]
    assert [row["temperature"] for row in found] == trained.temperatures.of(masks).tolist()
    plain = call("mm-predict", mm_run, "--jsonl", source, "--out", out, "--overwrite", "true", "--calibrated", "false")
    assert plain.code == 0, plain.err
    got = [json.loads(line)["probabilities"]["plus"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(got, probabilities(logits, "binary")[:, 1], atol=1e-5)


def test_a_bad_row_loses_no_other(call, mm_run, tmp_path):
    lines, *_ = _rows(mm_run, 2)
    source = tmp_path / "rows.jsonl"
    bad = ['{"id": "empty"}', '{"id": "words", "text": "hello"}']
    source.write_text("\n".join([lines[0], *bad, lines[1]]) + "\n")
    result = call("mm-predict", mm_run, "--jsonl", source)
    assert result.code == 1
    assert [line.split("\t")[0] for line in result.out.splitlines()] == ["world-test-00000", "world-test-00001"]
    errors = result.err.splitlines()
    assert len(errors) == 2
    assert "empty: no modality is there" in errors[0]
    assert "words, text:" in errors[1]


def test_where_no_sample_can_be_read_nothing_is_written(call, mm_run, tmp_path, complains):
    source, out = tmp_path / "rows.jsonl", tmp_path / "found.jsonl"
    source.write_text('{"id": "void", "image": null, "text": null}\n')
    complains(call("mm-predict", mm_run, "--jsonl", source, "--out", out), "void: no modality is there; give at least")
    source.write_text('{"id": "void", "image": null, "text": null}\n{"id": "words", "text": "hello"}\n')
    result = call("mm-predict", mm_run, "--jsonl", source, "--out", out)
    assert result.code == 2
    assert "none of the 2 samples" in result.err.splitlines()[-1]
    assert not out.exists()


def test_an_exported_file_with_encoders_of_another_width(call, mm_run, tmp_path, complains):
    from missing_modal.backbones.weights import save_towers
    from missing_modal.encoders import small_towers
    from missing_modal.settings import BackboneConfig
    from missing_modal.world import World

    other = small_towers(BackboneConfig(width=16, features=4), World(sizes=(8, 4, 4)), ("image", "text"))
    save_towers(tmp_path / "other.safetensors", other)
    for name in ("export/baked.safetensors", "export/trainable.safetensors", ""):
        result = call(
            "mm-predict",
            mm_run / name,
            "--sample",
            "world-test-00000",
            "--backbone.weights",
            tmp_path / "other.safetensors",
        )
        complains(result, "belongs to other image weights (small:image-8x3", "--backbone.weights")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["RUN"], "nothing to predict"),
        (["RUN", "--sample", "world-test-00000", "--without", "image", "text"], "keep one of them"),
        (["RUN", "--sample", "world-test-00000", "--without", "image,text"], "keep one of them"),
        (["RUN", "--text", "a", "--sample", "b"], "several places"),
        (["RUN", "--image", "NOWHERE.png"], "no such file"),
        (["RUN", "--audio", "NOWHERE.wav"], "the model has image, text"),
        (["RUN", "--jsonl", "NOWHERE.jsonl"], "no such file"),
        (["RUN", "--sample", "world-test-99999"], "no such sample in world"),
        (["RUN", "--sample", "world-test-00000", "--without", "txt"], "did you mean"),
        (["RUN", "--sample", "world-test-00000", "--without", "text", "--top", "0"], "at least 1"),
        (["RUN", "--text", "words"], "takes arrays"),
        (["RUN", "--text"], "text"),
        (["--text", "words"], "no checkpoint given"),
        (["RUN", "--out", "NOWHERE/x.jsonl", "--text", "a"], "its folder does not exist"),
    ],
    ids=str,
)
def test_bad_input_of_mm_predict_is_one_line(arguments, part, call, mm_run, complains):
    complains(call("mm-predict", *[str(mm_run) if word == "RUN" else word for word in arguments]), part)


def test_bad_files_of_rows(call, mm_run, tmp_path, complains):
    source = tmp_path / "rows.jsonl"
    for text, part in (
        ("", "no rows"),
        ('{"id": 1, "txt": [1]}\n', "unknown key 'txt'"),
        ('{"id": 1, "text": [1]}\n{"id": 1, "text": [1]}\n', "also that of line 1"),
        ('{"id": 1, "text": 5}\n', "expected a text or null"),
        ("not json\n", "not JSON"),
    ):
        source.write_text(text)
        complains(call("mm-predict", mm_run, "--jsonl", source), part)


def test_many_rows_that_cannot_be_read_are_counted_not_listed(call, mm_run, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f'{{"id": {n}, "text": "words"}}\n' for n in range(30)))
    result = call("mm-predict", mm_run, "--jsonl", source)
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 22
    assert lines[0] == (
        "mm-predict: error: 0, text: a text where this encoder takes arrays of numbers; give such as it was trained on"
    )
    assert lines[20] == "mm-predict: error: 10 more samples cannot be predicted"
    assert lines[21].startswith("mm-predict: error: none of the 30 samples can be predicted; ")


def test_results_are_not_replaced_by_chance(call, mm_run, tmp_path, complains):
    out = tmp_path / "found.jsonl"
    out.write_text("mine\n")
    complains(call("mm-predict", mm_run, "--sample", "world-test-00000", "--out", out), "is there already")
    assert out.read_text() == "mine\n"


def test_arguments_keep_texts_that_look_like_yaml():
    found = gather(
        ["RUN", "--text", "no", "--image=a b.png", "--inputs.front", "x", "--without", "a", "b", "--top", "2"]
    )
    assert found == [
        "--checkpoint=RUN",
        "--top",
        "2",
        '--without=["a", "b"]',
        '--inputs={"text": "no", "image": "a b.png", "front": "x"}',
    ]


def test_help_begins_with_an_example(call):
    for name in ("mm-eval", "mm-predict"):
        result = call(name, "--help")
        assert result.code == 0
        assert result.out.splitlines()[2] == "Example:"
        assert len(result.out.splitlines()) <= 100
