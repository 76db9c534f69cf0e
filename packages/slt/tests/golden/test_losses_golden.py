"""Both stages' losses against sums written out in float64 NumPy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from slt.config import LossConfig
from slt.losses import stage1_loss, stage2_loss, token_cross_entropy
from slt.models.translator import SLTModel

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).parents[1] / "unit" / "_models_toy.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def smoothed(logits, labels, smoothing):
    """Mean over (logits, label) pairs of the cross-entropy with a smoothed target."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        logs = log_softmax(row)
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        total -= (target * logs).sum()
    return total / len(labels)


def infonce(a, b, scale):
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    logits = scale * a @ b.T
    return -0.5 * (np.diag(log_softmax(logits)).mean() + np.diag(log_softmax(logits.T)).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_over_valid_tokens(smoothing):
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(3, 4, 6)), random.integers(0, 6, (3, 4))
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    expected = smoothed(logits[mask], labels[mask], smoothing)
    found = token_cross_entropy(*map(torch.from_numpy, (logits, labels, mask)), smoothing)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def net() -> SLTModel:
    torch.manual_seed(0)
    return SLTModel(toy.small_config(), toy.tokenizer().vocab).eval().double()


def text_features(net, tok, text):
    ids = torch.tensor([tok.encode(text)])
    return net.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1].numpy()


def decoder_terms(net, states, text, tok):
    """Teacher-forced logits and labels of one text from single-sample states (1, L, d)."""
    ids = tok.encode(text)
    logits = net.decode_logits(
        states, torch.ones(states.shape[:2], dtype=torch.bool), torch.tensor([[ids[-1], *ids[:-2]]])
    )
    return logits[0].numpy(), ids[:-1]


def restoration(net, tok, pairs):
    """Restoring one text after another."""
    logits, labels = [], []
    for masked, text in pairs:
        ids = torch.tensor([tok.encode_words(list(masked), "word")])
        states = net.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
        rows, wanted = decoder_terms(net, states, text, tok)
        logits += list(rows)
        labels += wanted
    return smoothed(logits, labels, 0.2)


@torch.no_grad()
def test_stage_1_is_the_weighted_sum(net):
    tok, rows = toy.tokenizer(), toy.samples()
    config = LossConfig(w_vs=1.0, w_vq=0.5, w_qs=0.25, lambda_ssl=0.7)
    loss, logs = stage1_loss(net, toy.batch(rows, tok), config, 0)

    video, sentence, question = [], [], []
    for row in rows:
        one = toy.batch([row], tok)
        video.append(net.pool_video(*net.encode_video(one.frames, one.lengths))[0].numpy())
        sentence.append(text_features(net, tok, row.sentence))
        question.append(text_features(net, tok, row.question))
    asked = [i for i, row in enumerate(rows) if row.question]
    v, s, q = (np.array(x) for x in (video, sentence, question))
    scale = 1 / 0.07
    expected = {
        "contrastive_vs": infonce(v, s, scale),
        "contrastive_vq": infonce(v[asked], q[asked], scale),
        "contrastive_qs": infonce(q[asked], s[asked], scale),
        "restore_question": restoration(net, tok, [(r.masked_question, r.question) for r in rows if r.question]),
        "restore_sentence": restoration(net, tok, [(r.masked_sentence, r.sentence) for r in rows]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=0, atol=1e-6, err_msg=name)
    weights = {"contrastive_vq": 0.5, "contrastive_qs": 0.25, "restore_question": 0.7, "restore_sentence": 0.7}
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    np.testing.assert_allclose(loss, total, rtol=0, atol=1e-6)
    assert set(logs) == {"loss", *expected}


@torch.no_grad()
def test_stage_2_is_the_weighted_sum(net):
    tok, rows = toy.tokenizer(), toy.samples()
    config = LossConfig(lambda_q=0.3, lambda_c=0.4, w_vq=0.0)
    loss, logs = stage2_loss(net, toy.batch(rows, tok), config, 0)

    logits, labels, video, sentence = [], [], [], []
    for row in rows:
        one = toy.batch([row], tok)
        states, _ = net.encode_fused(*net.fuse_batch(one)[:2])
        found, wanted = decoder_terms(net, states, row.sentence, tok)
        logits += list(found)
        labels += wanted
        video.append(net.pool_video(*net.encode_video(one.frames, one.lengths))[0].numpy())
        sentence.append(text_features(net, tok, row.sentence))
    translation = smoothed(logits, labels, 0.2)
    restore = restoration(net, tok, [(r.masked_question, r.question) for r in rows if r.question])
    contrast = infonce(np.array(video), np.array(sentence), 1 / 0.07)
    np.testing.assert_allclose(logs["translation"], translation, rtol=0, atol=1e-6)
    np.testing.assert_allclose(loss, translation + 0.3 * restore + 0.4 * contrast, rtol=0, atol=1e-6)
    assert set(logs) == {"loss", "translation", "restore_question", "contrastive_vs"}
