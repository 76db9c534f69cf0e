"""Weights, evidence and the picture of them: against hand-made references, and that every case can be drawn."""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from polymodal.errors import UserError
from slt.config import LossConfig
from slt.data.landmarks import COUNT
from slt.explain import Explanation, explain, token_edges, token_spans, unit_spans
from slt.module import SLTModule
from slt.ops.lengths import padded_indices, token_length
from slt.pictures import check_picture, draw_translation, save_picture
from slt.settings import OptimConfig
from slt.tokenizer import Tokenizer

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).with_name("_models_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

QUESTION = "wie wird das wetter"
IDS_OF = "regen heute"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(fusion="ssaw", tokenizer=None, level="word", **options) -> SLTModule:
    config = toy.small_config(fusion=fusion, fusion_options=options, dropout=0.0)
    tokenizer = tokenizer or toy.tokenizer()
    return SLTModule(config, LossConfig(), OptimConfig(), tokenizer, level=level, seed=3).double().eval()


def clip(made: SLTModule, question: str = QUESTION, frames: int = 13):
    """One clip as a batch, its visual tokens, and some translation's ids."""
    collate = toy.Collate(made.tokenizer, made.level)
    batch = collate(toy.samples(lengths=(frames,), questions=(question,)))
    with torch.no_grad():
        video = made.model.encode_batch(batch)
    return batch, video, made.tokenizer.encode(IDS_OF)[:-2]


def log_probability(made: SLTModule, tokens, mask, ids) -> np.ndarray:
    """Of each token of the translation, one decoder pass a token: no teacher forcing over the whole."""
    vocab, found = made.tokenizer.vocab, []
    with torch.no_grad():
        for place, wanted in enumerate(ids):
            given = torch.tensor([[vocab.tag_id, *ids[:place]]])
            logits = made.model.translate_logits(tokens, mask, given)[0, -1].numpy()
            found.append(logits[wanted] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(found)


# ------------------------------------------------------------------ which frames a token stands for


def seen_by_tokens(frames: int, scheme: str) -> list[set[int]]:
    """Padded positions that reach each token, followed through two convolutions and poolings as sets."""
    level = [{i} for i in range(len(padded_indices(frames, scheme)))]
    for _ in range(2):
        level = [set().union(*level[i : i + 5]) for i in range(len(level) - 4)]
        level = [level[i] | level[i + 1] for i in range(0, len(level) - 1, 2)]
    return level


@pytest.mark.parametrize("scheme", ["gfslt", "vac"])
@pytest.mark.parametrize("frames", [1, 4, 5, 16, 33, 116])
def test_edges_are_the_middle_of_what_a_token_sees(scheme: str, frames: int) -> None:
    seen = seen_by_tokens(frames, scheme)
    left = {"gfslt": 8, "vac": 6}[scheme]
    edges = token_edges(frames, len(seen), scheme)
    assert len(seen) == token_length(frames, scheme)
    assert (edges[0], edges[-1]) == (-0.5, frames - 0.5)
    assert (np.diff(edges) >= 0).all()
    for token, positions in enumerate(seen):
        assert len(positions) == 16
        own = sorted(positions)[6:10]
        bounds = np.clip([own[0] - left - 0.5, own[-1] - left + 0.5], -0.5, frames - 0.5)
        inside = slice(1 if token == 0 else 0, 1 if token == len(seen) - 1 else 2)
        assert edges[token : token + 2][inside] == pytest.approx(bounds[inside])


# ------------------------------------------------------------------ words and tokens


def test_spans_of_words_and_characters() -> None:
    assert unit_spans(" wie  wird ?", "word") == [(1, 4), (6, 10), (11, 12)]
    assert unit_spans("下 雪？", "char") == [(0, 1), (2, 3), (3, 4)]
    assert token_spans(Tokenizer.build("char", ["下雪吗"], "zh_CN"), "下 雪") == [(0, 1), (2, 3)]


def pieces() -> Tokenizer:
    """A sentencepiece tokenizer like mBART's in which "wetter" and "regen" have two pieces."""
    import tokenizers

    names = ["<s>", "<pad>", "</s>", "<unk>", "▁wie", "▁wird", "▁wet", "ter", "▁re", "gen", "▁heute", "▁"]
    vocabulary = [(name, -1.0 - i) for i, name in enumerate(names)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "de_DE", "<mask>"])
    return Tokenizer(backend, "pretrained", "de_DE")


def test_pieces_are_grouped_into_words() -> None:
    made = module(tokenizer=pieces())
    batch, video, ids = clip(made, "wie wird wetter")
    assert len(ids) == 3  # re gen heute
    found = explain(made, batch, video, ids)
    assert found.words == ["regen", "heute"]
    assert found.question == ["wie", "wird", "wetter"]
    assert found.question_weights.shape == (3, 3)
    gate = made.model.fuse_batch(batch, video)[2][0].detach().numpy()
    assert found.question_weights[2, 0] == pytest.approx(gate[2:4].mean(), abs=1e-9)  # wet + ter
    tokens, mask, _ = made.model.fuse_batch(batch, video)
    whole = log_probability(made, tokens, mask, ids)
    tokens[:, -1] = tokens[:, -2] = 0
    blank = log_probability(made, tokens, mask, ids)
    assert found.sign_evidence[-1] == pytest.approx([sum((whole - blank)[:2]), (whole - blank)[2]], abs=1e-6)


# ------------------------------------------------------------------ evidence


@pytest.mark.parametrize("fusion", ["ssaw", "concat", "cross_attention", "gbt"])
def test_evidence_is_what_occlusion_by_hand_gives(fusion: str) -> None:
    made = module(fusion)
    batch, video, ids = clip(made)
    found = explain(made, batch, video, ids)
    tokens, mask, _ = made.model.fuse_batch(batch, video)
    whole = log_probability(made, tokens, mask, ids)
    assert found.words == IDS_OF.split()
    assert found.question == QUESTION.split()
    words = QUESTION.split()
    for number in range(len(words)):
        other, *_ = clip(made, " ".join(words[:number] + words[number + 1 :]))
        less = log_probability(made, *made.model.fuse_batch(other, video)[:2], ids)
        assert found.question_evidence[number] == pytest.approx(whole - less, abs=1e-6)
    signs = video[0].shape[1]
    assert found.sign_evidence.shape == (signs, 2)
    for number in range(signs):
        copy = tokens.clone()
        first = tokens.shape[1] - signs
        for near in (number - 1, number, number + 1):
            if 0 <= near < signs:
                copy[:, first + near] = 0
        assert found.sign_evidence[number] == pytest.approx(whole - log_probability(made, copy, mask, ids), abs=1e-6)
    assert np.abs(found.sign_evidence).max() > 1e-3


def test_a_question_of_one_word_is_compared_with_none() -> None:
    made = module()
    batch, video, ids = clip(made, "wetter")
    nothing, *_ = clip(made, "")
    whole = log_probability(made, *made.model.fuse_batch(batch, video)[:2], ids)
    less = log_probability(made, *made.model.fuse_batch(nothing, video)[:2], ids)
    assert explain(made, batch, video, ids).question_evidence == pytest.approx((whole - less)[None], abs=1e-6)


def test_without_video_without_question_without_words() -> None:
    made = module("question_only")
    batch, video, ids = clip(made)
    found = explain(made, batch, video, ids)
    assert found.sign_evidence.shape == (0, 2)
    assert (found.question_weights, found.sign_weights) == (None, None)
    made = module("none")
    batch, video, ids = clip(made)
    found = explain(made, batch, video, ids)
    assert found.question == []
    assert found.question_evidence.shape == (0, 2)
    batch, video, _ = clip(module(), "")
    found = explain(module(), batch, video, [])
    assert found.words == ["(end)"]
    assert found.question_weights is None
    assert found.sign_weights.shape == (len(found.edges) - 1, 3)


def test_words_that_were_cut_off_are_not_shown() -> None:
    made = module()
    collate = toy.Collate(made.tokenizer, "word", max_question_tokens=4)
    batch = collate(toy.samples(lengths=(9,), questions=(QUESTION,)))
    assert explain(made, batch, made.model.encode_batch(batch), [5]).question == ["wie", "wird"]


# ------------------------------------------------------------------ weights


def summary(values: np.ndarray) -> list[float]:
    ordered = np.sort(values.ravel())

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return [float(ordered.mean()), percentile(0.1), percentile(0.9)]


def test_gate_weights_are_means_over_channels() -> None:
    made = module()
    batch, video, ids = clip(made)
    found = explain(made, batch, video, ids)
    gate = made.model.fuse_batch(batch, video)[2][0].detach().numpy()
    asked = batch.question_ids.shape[1]
    for number in range(4):
        assert found.question_weights[number] == pytest.approx(summary(gate[number]))
    for number in range(video[0].shape[1]):
        assert found.sign_weights[number] == pytest.approx(summary(gate[asked + number]))
    assert found.weight_name == "gate"


def test_attention_weights_are_means_over_heads_and_queries() -> None:
    made = module(mode="attention")
    batch, video, ids = clip(made)
    found = explain(made, batch, video, ids)
    table = made.model.fuse_batch(batch, video)[2][0].detach().numpy()  # heads, queries, keys
    asked = batch.question_ids.shape[1]
    for number in range(4):
        assert found.question_weights[number] == pytest.approx(summary(table[:, :, number]))
    for number in range(video[0].shape[1]):
        assert found.sign_weights[number] == pytest.approx(summary(table[:, :, asked + number]))
    assert found.weight_name == "attention"


def test_weights_of_one_side_only() -> None:
    made = module("cross_attention")
    frames = 17  # six visual tokens, as many as the question has: only the shape's meaning tells them apart
    batch, video, ids = clip(made, frames=frames)
    assert batch.question_ids.shape[1] == video[0].shape[1] == 6
    found = explain(made, batch, video, ids)
    table = made.model.fuse_batch(batch, video)[2][0].detach().numpy()
    assert found.sign_weights is None
    assert found.question_weights[1] == pytest.approx(summary(table[:, :, 1]))
    made = module("gbt")
    found = explain(made, *clip(made, frames=frames))
    assert found.question_weights is None
    assert found.sign_weights.shape == (6, 3)
    assert found.weight_name == "share of the question"


# ------------------------------------------------------------------ the picture


def explanation(words: int = 3, asked: int = 4, tokens: int = 9, *, weights: bool = True) -> Explanation:
    draw = np.random.default_rng(0)

    def table(rows: int) -> np.ndarray | None:
        return np.sort(draw.random((rows, 3)), axis=1)[:, [1, 0, 2]] if weights and rows else None

    return Explanation(
        [f"wort{i}" for i in range(words)],
        [f"frage{i}" for i in range(asked)],
        table(asked),
        draw.normal(size=(asked, words)),
        token_edges(32, tokens, "gfslt") if tokens else np.zeros(1),
        table(tokens),
        draw.normal(size=(tokens, words)),
        "gate",
    )


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    "case",
    [
        explanation(),
        explanation(words=12, asked=14),
        explanation(asked=0),
        explanation(tokens=0),
        explanation(weights=False),
        explanation(words=1, asked=1),
        dataclasses.replace(explanation(asked=0), sign_weights=np.zeros((9, 3))),
    ],
    ids=["usual", "many words", "no question", "no video", "no weights", "one word", "gated fusion, no question"],
)
def test_every_case_can_be_drawn(tmp_path: Path, case: Explanation) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (32, 24, 24, 3), dtype=np.uint8)
    question = " ".join(case.question)
    figure = draw_translation(case, frames, range(0, 64, 2), question=question, without_question="anders")
    save_picture(figure, tmp_path / "p.png", dpi=50)
    width, height = png_size(tmp_path / "p.png")
    assert width == 500
    assert 130 < height < 500
    written = " ".join(text.get_text() for text in figure.texts)
    assert all(word in written for word in (*case.words, question))
    assert "without the question  anders" in written
    columns = bool(case.question) + bool(len(case.sign_evidence))
    rows = 3 if case.question_weights is not None or case.sign_weights is not None else 2
    assert len(figure.axes) == columns * rows


def test_bars_and_curves_have_the_values(tmp_path: Path) -> None:
    case = explanation(words=2, asked=3)
    frames = np.zeros((32, 24, 24, 3), dtype=np.uint8)
    figure = draw_translation(case, frames, range(32), question="frage0 frage1 frage2")
    _, question, _, _, signs, gates = figure.axes
    heights = np.array([bar.get_height() for bar in question.patches]).reshape(2, 3)
    assert heights == pytest.approx(np.maximum(0, case.question_evidence).T)
    for line, values in zip(signs.lines, case.sign_evidence.T, strict=True):
        assert line.get_ydata()[1:-1] == pytest.approx(np.maximum(0, values))
        assert line.get_xdata()[1:-1] == pytest.approx((case.edges[1:] + case.edges[:-1]) / 2)
    assert question.get_ylim() == signs.get_ylim()
    assert gates.get_ylim() == (0, 1)
    assert any(np.array_equal(p.get_data().values, case.sign_weights[:, 0]) for p in gates.patches)


def test_landmarks_are_drawn_as_a_signer() -> None:
    points = np.zeros((32, COUNT, 4))
    points[:, :, :2] = np.random.default_rng(0).normal(size=(32, COUNT, 2)) / 3
    points[:, :7, 3] = 1
    figure = draw_translation(explanation(asked=0), points, range(32), local_hands=True)
    assert {len(line.get_xdata()) for line in figure.axes[0].lines} == {0, 2}  # arms; no finger of an unseen hand
    points[..., 3] = 1
    figure = draw_translation(explanation(asked=0), points[:, :49], range(32))
    assert {len(line.get_xdata()) for line in figure.axes[0].lines} == {2, 5}


@pytest.mark.filterwarnings("error")
def test_chinese_without_a_font_is_told_once(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("slt.pictures._CJK_FONTS", ("No Such Font",))
    case = explanation()
    case.words[0] = "雪"
    figure = draw_translation(case, np.zeros((32, 24, 24, 3), np.uint8), range(32), question="天气怎么样？")
    save_picture(figure, tmp_path / "p.png", dpi=40)
    assert [record.message for record in caplog.records if "font" in record.message] == [
        "no font with Chinese characters is installed (e.g. Noto Sans CJK); they are drawn as boxes"
    ]


def test_other_formats_and_refusals(tmp_path: Path) -> None:
    figure = draw_translation(explanation(), np.zeros((32, 24, 24, 3), np.uint8), range(32))
    save_picture(figure, tmp_path / "p.svg", dpi=40)
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["p.svg"]
    check_picture(tmp_path / "x.PNG")
    with pytest.raises(UserError, match=r"x\.tiff: expected a name that ends in \.png"):
        check_picture(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="does not exist; make it first"):
        check_picture(tmp_path / "no" / "x.png")
