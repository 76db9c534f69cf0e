"""Search: greedy, cached, batched and exhaustive must agree."""

import importlib.util
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from slt.config import VocabInfo
from slt.models.generate import generate, generation_config
from slt.models.translator import SLTModel
from transformers.modeling_outputs import BaseModelOutput

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).with_name("_models_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

LENGTHS = (9, 4, 13, 6, 10, 20, 5, 8)
END_BIAS = 2.0


@pytest.fixture(scope="module")
def net() -> SLTModel:
    # A random model, but sharp enough (init_std) that outputs differ between samples, with ends at several lengths.
    torch.manual_seed(3)
    config = toy.synthetic_model_config(width=32, ffn=64, init_std=0.3)
    built = SLTModel(config, toy.tokenizer().vocab).eval().double()
    built.translator.final_logits_bias[0, built.vocab.eos_id] = END_BIAS
    return built


@pytest.fixture(scope="module")
def encoded(net):
    batch = toy.batch(toy.samples(LENGTHS))
    with torch.no_grad():
        tokens, mask, _ = net.fuse_batch(batch)
        return net.encode_fused(tokens, mask)


def search(net, encoded, rows=slice(None), **options):
    states, mask = encoded
    output = BaseModelOutput(last_hidden_state=states[rows])
    return generate(net.translator, output, mask[rows], net.vocab, **options)


def step_scores(net, states, mask, prefix):
    """Log-probabilities of the next token by a full forward pass, without cache."""
    ids = torch.tensor([[net.vocab.tag_id, *prefix]])
    with torch.no_grad():
        scores = net.decode_logits(states[None], mask[None], ids)[0, -1].log_softmax(-1)
    banned = sorted({net.vocab.tag_id, *net.vocab.special_ids} - {net.vocab.eos_id})
    scores[banned] = float("-inf")
    return scores


def test_one_beam_is_greedy_by_hand(net, encoded):
    found = search(net, encoded, num_beams=1, max_new_tokens=6)
    for row, (states, mask) in enumerate(zip(*encoded, strict=True)):
        expected = []
        while len(expected) < 6:
            token = int(step_scores(net, states, mask, expected).argmax())
            if token == net.vocab.eos_id:
                break
            expected.append(token)
        assert found[row] == expected
    assert len({tuple(row) for row in found}) > 1
    assert len({len(row) for row in found}) > 1


@pytest.mark.parametrize("beams", [1, 4])
def test_cached_equals_uncached(net, encoded, beams):
    cached = search(net, encoded, num_beams=beams, max_new_tokens=8)
    assert cached == search(net, encoded, num_beams=beams, max_new_tokens=8, use_cache=False)


@pytest.mark.parametrize("beams", [1, 4])
def test_batch_of_one_equals_batch_of_eight(net, beams):
    rows = toy.samples(LENGTHS)
    together = net.generate(toy.batch(rows), beams, 8)
    assert together == [net.generate(toy.batch([row]), beams, 8)[0] for row in rows]
    assert together == net.generate(toy.batch(rows), beams, 8)


def test_enough_beams_find_the_best_sequence(net, encoded):
    """With as many beams as prefixes, the result is the argmax over all sequences of the normalised score."""
    states, mask = encoded[0][2], encoded[1][2]
    words = [i for i in range(net.vocab.size) if i not in net.vocab.special_ids]
    eos, steps = net.vocab.eos_id, 2
    best, best_score = None, -float("inf")
    first = step_scores(net, states, mask, [])
    second = {word: step_scores(net, states, mask, [word]) for word in words}
    candidates = [((), first[eos])]
    candidates += [((a,), first[a] + second[a][eos]) for a in words]
    candidates += [((a, b), first[a] + second[a][b]) for a, b in itertools.product(words, words)]
    for sequence, score in candidates:
        normalised = float(score) / min(len(sequence) + 1, steps)
        if normalised > best_score:
            best, best_score = list(sequence), normalised
    assert search(net, encoded, slice(2, 3), num_beams=len(words) + 1, max_new_tokens=steps) == [best]


def test_only_words_come_out(net, encoded):
    for beams in (1, 4):
        for row in search(net, encoded, num_beams=beams, max_new_tokens=10):
            assert len(row) <= 10
            assert not set(row) & set(net.vocab.special_ids)


def test_special_tokens_stay_out_even_where_they_score_best(net, encoded):
    banned = sorted(set(net.vocab.special_ids) - {net.vocab.eos_id})
    bias = net.translator.final_logits_bias
    bias[0, banned] += 1e4
    try:
        rows = search(net, encoded, num_beams=4, max_new_tokens=5)
    finally:
        bias[0, banned] -= 1e4
    assert not {token for row in rows for token in row} & set(net.vocab.special_ids)


def test_stops_at_the_end_token(net, encoded):
    bias = net.translator.final_logits_bias
    bias[0, net.vocab.eos_id] = 1e4
    try:
        assert search(net, encoded, num_beams=4, max_new_tokens=5) == [[]] * len(LENGTHS)
    finally:
        bias[0, net.vocab.eos_id] = END_BIAS


def test_longer_outputs_with_a_larger_length_penalty(net, encoded):
    short = search(net, encoded, num_beams=4, max_new_tokens=8, length_penalty=-4.0)
    long = search(net, encoded, num_beams=4, max_new_tokens=8, length_penalty=4.0)
    assert sum(map(len, short)) < sum(map(len, long))


def test_training_mode_is_refused(net):
    net.train()
    try:
        with pytest.raises(RuntimeError, match="eval"):
            net.generate(toy.batch(), max_new_tokens=8)
    finally:
        net.eval()


def test_no_warning_and_no_log_line(net, encoded, caplog, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beams in (1, 4):
            search(net, encoded, num_beams=beams, max_new_tokens=3)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    assert caplog.records == []


def test_configuration_is_deterministic_and_complete():
    config = generation_config(VocabInfo(9, 1, 2, 7, (0, 1, 2, 3, 7, 8)), 4, 20)
    assert (config.num_beams, config.do_sample, config.max_new_tokens, config.use_cache) == (4, False, 20, True)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (1, 2, 7)
    assert config.suppress_tokens == [0, 1, 3, 7, 8]
