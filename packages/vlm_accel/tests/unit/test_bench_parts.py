"""Parts of vlm-bench: the built-in world and model, rows, schedules as text, fidelity, the front, the JSONL reader."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.cli import parse_config, preset_names
from polymodal.config import to_yaml
from polymodal.errors import UserError
from vlm_accel.bench import fidelity, measure, world
from vlm_accel.bench.cases import Case, all_cases, parse_schedule
from vlm_accel.bench.model import build_vlm, inputs_of, make_processor
from vlm_accel.bench.module import CanvasData, DigitReader
from vlm_accel.bench.pareto import front
from vlm_accel.bench.settings import BenchConfig, BuiltInConfig
from vlm_accel.bench.subjects import collate
from vlm_accel.data.jsonl import read_jsonl, read_tasks
from vlm_accel.methods import METHODS
from vlm_accel.schedule import Step, Taper, pyramid

# ---- the world and its model


def test_canvases_are_a_function_of_their_number_and_show_their_digits() -> None:
    options = world.WorldOptions(noise=0.05)
    some = world.draw_samples(options, "test", np.arange(8))
    again = world.draw_samples(options, "test", np.array([5, 2]))
    assert np.array_equal(again.canvas, some.canvas[[5, 2]])
    assert (some.kind == np.arange(8) % 4).all()
    assert some.prompt.shape == (8, world.TOKENS + 3)
    for canvas in some.canvas:
        bright = (canvas > 64).reshape(2, 8, 2, 8).any(axis=(1, 3))  # quadrants
        assert bright.sum() == 2, "one digit in each half"
        assert (bright.sum(0) == 1).all()
    assert world.fingerprint(options) != world.fingerprint(world.WorldOptions())


def test_digits_of_one_split_are_in_no_other() -> None:
    ranges = [set(range(*span)) for span in world.SPLITS.values()]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == 1797


def test_answers() -> None:
    words = [[world.VOCABULARY[i] for i in world.answer_of(kind, 3, 7)] for kind in world.KINDS]
    assert [" ".join(w) for w in words] == ["3 <eos>", "7 <eos>", "3 7 <eos>", "left 3 right 7 <eos>"]
    assert max(map(len, words)) == world.ANSWER


@cache
def reader() -> DigitReader:
    return DigitReader(BuiltInConfig(), seed=3).eval()


def test_a_packed_question_is_answered_as_if_it_stood_alone() -> None:
    module = reader()
    data = CanvasData(BuiltInConfig(batch_size=4, world=world.WorldOptions(train=4, val=4)))
    data.setup()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        packed, _ = module.logits(batch["pixels"], batch["ids"])
        for number, span in enumerate(module.spans):
            alone = world.draw_samples(world.WorldOptions(train=4, val=4), "val", np.arange(4), np.full(4, number))
            inputs = inputs_of(alone)
            ids = torch.cat([inputs["input_ids"], torch.from_numpy(alone.answer)], dim=1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            length = span.stop - span.start
            first = alone.prompt.shape[1] - 1
            logits = module.vlm(**inputs).logits[:, first : first + length]
            torch.testing.assert_close(packed[:, span], logits, atol=2e-5, rtol=1e-5)


def test_teacher_forced_accuracy_is_that_of_greedy_decoding() -> None:
    module = reader()
    data = CanvasData(BuiltInConfig(batch_size=4, world=world.WorldOptions(train=4, val=8)))
    data.setup()
    found = {name: row for batch in data.val_dataloader() for name, row in module.evaluate(batch).items()}
    for number in range(len(world.KINDS)):
        alone = world.draw_samples(world.WorldOptions(train=4, val=8), "val", np.arange(8), np.full(8, number))
        with torch.inference_mode():
            ids = fidelity.generate(module.vlm, inputs_of(alone), world.ANSWER).ids
        for row, (said, wanted) in enumerate(zip(ids.tolist(), alone.answer.tolist(), strict=False)):
            length = wanted.index(world.EOS) + 1
            assert found[str(row)][number] == (said[:length] == wanted[:length])


def test_loss_reaches_every_part_and_the_cls_row() -> None:
    module = DigitReader(BuiltInConfig(), seed=1)
    data = CanvasData(BuiltInConfig(batch_size=2, world=world.WorldOptions(train=2, val=2)))
    data.setup()
    loss, terms = module.loss(next(iter(data.train_dataloader())), torch.Generator())
    loss.backward()
    assert set(terms) == {"answer", "cls"}
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not [name for name in without if not name.endswith("k_proj.bias")], without  # softmax ignores a key's bias


def test_the_processor_makes_what_the_bench_feeds() -> None:
    from PIL import Image

    samples = world.draw_samples(world.WorldOptions(), "test", np.arange(3))
    ours = inputs_of(samples)
    processor = make_processor()
    for number in range(3):
        picture = Image.fromarray(np.repeat(samples.canvas[number][..., None], 3, axis=2))
        chat = [{"type": "image"}, {"type": "text", "text": f"{world.KINDS[samples.kind[number]]} ?"}]
        text = processor.apply_chat_template([{"role": "user", "content": chat}], tokenize=False)
        made = processor(text=[text], images=[picture], return_tensors="pt")
        assert made["input_ids"][0].tolist() == ours["input_ids"][number].tolist()
        torch.testing.assert_close(made["pixel_values"][0], ours["pixel_values"][number], atol=1e-6, rtol=0)


# ---- fidelity


def test_kl_is_that_of_numpy() -> None:
    draw = np.random.default_rng(0)
    full, ours = draw.normal(size=(3, 4, 6)), draw.normal(size=(3, 4, 6))
    ours[2] = full[2]
    lengths = np.array([4, 2, 3])
    answers = fidelity.Answers(torch.zeros(3, 4, dtype=torch.long), torch.tensor(lengths), torch.tensor(full))
    found = fidelity.compare(answers, torch.tensor(ours))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (full, ours))
    for row, length in enumerate(lengths):
        kl = (p * np.log(p / q)).sum(-1)[row, :length].mean()
        same = (full.argmax(-1) == ours.argmax(-1))[row, :length]
        assert found.kl[row].item() == pytest.approx(kl, abs=1e-12)
        assert found.agree[row].item() == pytest.approx(same.mean())
        assert found.diverged[row].item() == (-1 if same.all() else int(np.argmin(same)))


def test_forcing_a_models_own_answer_gives_its_own_logits() -> None:
    model = reader().vlm
    inputs = inputs_of(world.draw_samples(world.WorldOptions(), "test", np.arange(4)))
    with torch.inference_mode():
        answers = fidelity.generate(model, inputs, 5, record=True)
        logits = fidelity.force(model, inputs, answers)
    found = fidelity.compare(answers, logits)
    assert found.kl.max() < 1e-9
    assert (found.diverged == -1).all()
    steps = logits.shape[1]
    torch.testing.assert_close(logits, answers.logits[:, :steps], atol=1e-5, rtol=0)


def test_costs_of_a_row_fall_back_to_those_of_the_whole_model() -> None:
    plain = {"macs/vision": 10.0, "macs/prefill": 30.0, "kv/bytes": 100.0, "kv/weight_bytes": 50.0}
    found = measure.combined({"macs/prefill": 10.0, "kv/bytes": 25.0}, plain)
    assert (found["macs/total"], found["macs/total_plain"]) == (20, 40)
    assert (found["ideal/prefill_speedup"], found["ideal/total_speedup"], found["ideal/vision_speedup"]) == (3, 2, 1)
    assert found["ideal/token_speedup"] == pytest.approx(150 / 75)
    times = {"speedup/prefill": 2.4, "speedup/vision": 1.0}
    assert measure.efficiency(times, found) == {"efficiency/prefill": pytest.approx(0.8)}


def test_the_unmodified_models_costs_are_those_of_keeping_everything() -> None:
    inputs = inputs_of(world.draw_samples(world.WorldOptions(), "test", np.arange(2)))
    found = measure.plain_costs(build_vlm(), inputs, 3)
    assert found["macs/prefill"] == found["macs/prefill_plain"]
    assert found["macs/vision"] == found["macs/vision_plain"]
    assert found["tokens/image"] == found["tokens/llm_05"] == world.TOKENS


# ---- rows


def config(**more: object) -> BenchConfig:
    return BenchConfig(**more)


def test_all_methods_are_rows_at_every_ratio() -> None:
    rows = {case.label: case for case in all_cases(config(kv_options="recent=1,window=2"))}
    for info in METHODS:
        assert info.name in rows or f"{info.name}-0.5" in rows, info.name
    assert rows["drop@vision-0.25"].arguments(0)["schedule"] == [Taper(0.25)]
    assert rows["drop-0.25"].arguments(0)["ratio"] == 0.25
    assert rows["snapkv-0.5"].kv == "ratio:0.5,recent=1,window=2"
    assert {case.group for case in rows.values()} == {"vision", "features", "llm", "cache"}


def test_a_schedule_or_budget_stands_in_place_of_ratios() -> None:
    rows = all_cases(config(methods=["drop", "recycle+lightvlm"], schedule="vision:1=drop4,llm:2=0.5", kv="uniform:64"))
    assert [(case.label, case.ratio, case.kv) for case in rows] == [
        ("drop", None, "uniform:64"), ("recycle+lightvlm", None, "uniform:64"),
    ]  # fmt: skip
    assert [case.label for case in all_cases(config(methods=["snapkv"], kv="ratio:0.5"))] == ["snapkv"]
    windows = all_cases(config(methods=["snapkv"], ratios=[0.5], method_options={"snapkv": {"window": 4}}))
    assert [(case.options, case.arguments(0)["method"][0].window) for case in windows] == [({"window": 4}, 4)]
    assert Case("x", "drop", schedule="keep3").arguments(0)["schedule"] == "keep3", "with the preset's cache budget"


def test_schedules_as_text() -> None:
    assert parse_schedule("vision:5-6=drop92, llm:8=0.7") == [
        Step("vision", 5, drop=92), Step("vision", 6, drop=92), Step("llm", 8, ratio=0.7),
    ]  # fmt: skip
    assert parse_schedule("llm:2+4=keep16") == [Step("llm", 2, keep=16), Step("llm", 4, keep=16)]
    assert parse_schedule("vision:3=drop0.16") == [Step("vision", 3, drop_ratio=0.16)]
    assert parse_schedule("taper=0.5,pyramid=0.35@2+9") == [Taper(0.5), *pyramid(0.35, [2, 9])]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": ["dropp"]}, "did you mean drop"),
        ({"methods": ["fastv@vision"]}, "works in llm"),
        ({"methods": [], "cases": {"x": {"ratio": 0.5}}}, "expected method"),
        ({"methods": [], "cases": {"a/b": {"method": "drop"}}}, "file's name"),
        ({"methods": ["drop"], "cases": {"drop-0.5": {"method": "drop"}}}, "twice"),
        ({"methods": ["drop"], "schedule": "llm:8"}, "schedule"),
        ({"methods": ["drop"], "method_options": {"drop": {"windw": 4}}}, "no option"),
        ({"methods": ["drop"], "method_options": {"drop": 4}}, "expected options by name"),
        ({"methods": ["drop"], "kv": "half"}, "KV budget"),
        ({"methods": ["drop"], "schedule": "llm:x=0.5"}, "schedule"),
        ({"methods": ["drop"], "schedule": "llm:0=0.5"}, "no score"),
    ],
)
def test_bad_rows_are_refused(more: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        all_cases(config(**more))


@pytest.mark.parametrize("preset", preset_names("vlm_accel"))
def test_presets_parse_and_have_rows(preset: str, tmp_path: Path) -> None:
    import importlib.resources

    text = (importlib.resources.files("vlm_accel") / "configs" / f"{preset}.yaml").read_text()
    assert text.startswith("# vlm-bench")
    assert "# Data" in text
    found = parse_config(BenchConfig, ["--config", preset], presets="vlm_accel")
    for case in all_cases(found):
        case.arguments(0)
    (tmp_path / "config.yaml").write_text(to_yaml(found))
    assert parse_config(BenchConfig, ["--config", str(tmp_path)], presets="vlm_accel") == found


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.booleans())
def test_the_front_has_what_nothing_beats(points: list, higher: bool) -> None:
    sign = 1 if higher else -1
    kept = {points[i] for i in front(points, higher)}
    for cost, quality in points:
        beaten = any(c <= cost and sign * q >= sign * quality and (c, q) != (cost, quality) for c, q in points)
        assert ((cost, quality) in kept) == (not beaten)


# ---- inputs


def test_prompts_are_padded_on_the_left() -> None:
    one = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2), "pixel_values": torch.zeros(1, 3)}
    two = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1), "pixel_values": torch.ones(1, 3)}
    found = collate([one, two], pad=9)
    assert found["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert found["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert found["pixel_values"].shape == (2, 3)
    with pytest.raises(UserError, match="--batch 1"):
        collate([one, {**two, "pixel_values": torch.ones(1, 4)}], pad=9)


def write(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_tasks_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "ai2d" / "media" / "sub").mkdir(parents=True)
    (tmp_path / "ai2d" / "media" / "sub" / "a.png").touch()
    row = {
        "id": 7,
        "question": "q",
        "options": ["x", "y"],
        "answer": "B",
        "images": ["sub/a.png"],
        "category": "c",
        "z": 1,
    }
    write(tmp_path / "ai2d" / "test.jsonl", row, {**row, "id": 8})
    write(tmp_path / "textvqa" / "val.jsonl", {"question": "q", "answers": ["a", 2]})
    samples, first = read_tasks(tmp_path)
    assert [sample.task for sample in samples] == ["ai2d", "ai2d", "textvqa"]
    assert samples[0].images == (tmp_path / "ai2d" / "media" / "sub" / "a.png",)
    assert (samples[0].id, samples[0].extra, samples[0].answers) == ("7", {"z": 1}, ("B",))
    assert samples[2].answers == ("a", "2")
    limited, second = read_tasks(tmp_path, ["ai2d"], limit=1)
    assert len(limited) == 1
    assert first != second


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 1: not valid JSON"),
        ({"answer": "x"}, "line 1: expected an object"),
        ({"question": "q", "images": ["../x.png"]}, "media are paths below"),
        ({"question": "q", "images": ["/x.png"]}, "media are paths below"),
        ({"question": "q", "images": ["x.png"]}, "is missing"),
        ({"question": "q", "answers": [{"a": 1}]}, "answers: expected"),
        ("", "no samples"),
    ],
)
def test_broken_lines_are_named(row: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_jsonl(write(tmp_path / "task" / "test.jsonl", row))


def test_ids_stand_once_and_splits_are_chosen(tmp_path: Path) -> None:
    row = {"id": "a", "question": "q"}
    with pytest.raises(UserError, match="stands there twice"):
        read_jsonl(write(tmp_path / "one" / "test.jsonl", row, row))
    write(tmp_path / "two" / "val.jsonl", row)
    write(tmp_path / "two" / "test.jsonl", row)
    with pytest.raises(UserError, match="choose one with --split; there are: test, val"):
        read_tasks(tmp_path, ["two"])
    with pytest.raises(UserError, match="--tasks thre: not in"):
        read_tasks(tmp_path, ["thre"])
    with pytest.raises(UserError, match="no task there"):
        read_tasks(write(tmp_path / "empty" / "x" / "y.txt", "").parent)
