"""Slow, independent float64 versions of the specification's formulas: loops over samples, heads, tokens, n-grams.

Nothing here imports the package under test or torch.
"""

import math

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64)))


def ssaw(params, question, question_mask, sign, sign_mask, heads, mode):
    """Tokens, mask, weights of SSAW, one sample and one head at a time over valid tokens and padded queries alike."""
    batch, n_question, dim = question.shape
    length = n_question + sign.shape[1]
    width = dim // heads
    out = np.zeros((batch, length, dim))
    gate_width = params["gate_proj.weight"].shape[0]
    weights = np.zeros((batch, length, gate_width) if mode == "gate" else (batch, heads, length, length))
    mask = np.concatenate([question_mask, sign_mask], axis=1)
    for b in range(batch):
        z = np.zeros((length, dim))
        for i in range(length):
            if mask[b, i]:
                is_sign = int(i >= n_question)
                token = sign[b, i - n_question] if is_sign else question[b, i]
                z[i] = token + params["type_embedding"][is_sign]
        q, k, v = (z @ params[f"{n}_proj.weight"].T + params[f"{n}_proj.bias"] for n in "qkv")
        valid = [j for j in range(length) if mask[b, j]]
        context = np.zeros((length, dim))
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(length):
                scores = np.array([q[i, part] @ k[j, part] / math.sqrt(width) for j in valid])
                if mode == "gate":
                    a = np.exp(scores - scores.max())
                    a = a / a.sum()
                else:
                    a = sigmoid(scores - math.log(len(valid)))
                    weights[b, h, i, valid] = a
                context[i, part] = sum(a[n] * v[j, part] for n, j in enumerate(valid))
        hidden = context @ params["out_proj.weight"].T + params["out_proj.bias"]
        for i in valid:
            if mode == "gate":
                gate = sigmoid(params["gate_proj.weight"] @ hidden[i] + params["gate_proj.bias"])
                weights[b, i] = gate
                out[b, i] = gate * z[i]
            else:
                out[b, i] = z[i] + hidden[i]
    return out, mask, weights


def gated_fusion(params, question, question_mask, sign, sign_mask):
    out, gates = np.zeros_like(sign), np.zeros_like(sign)
    for n in range(len(sign)):
        for i in range(sign.shape[1]):
            if not sign_mask[n, i]:
                continue
            a = sign[n, i]
            if not question_mask[n].any():
                out[n, i] = a
                continue
            b = question[n][question_mask[n]].mean(axis=0)
            f = sigmoid(params["sign_gate.weight"] @ a + params["sign_gate.bias"] + params["question_gate.weight"] @ b)
            mixed = params["sign_proj.weight"] @ a + params["sign_proj.bias"] + params["question_proj.weight"] @ b
            out[n, i], gates[n, i] = f * mixed + (1 - f) * a, f
    return out, gates


def contrastive(a, b, log_scale, variant, ids=None):
    """Row loss and column loss, element by element."""
    n = len(a)
    a = [x / math.sqrt(sum(x * x)) for x in np.asarray(a, dtype=np.float64)]
    b = [x / math.sqrt(sum(x * x)) for x in np.asarray(b, dtype=np.float64)]
    scale = min(math.exp(min(log_scale, 50.0)), 100.0)
    total = 0.0
    for first, second in ((a, b), (b, a)):
        for i in range(n):
            logits = [scale * float(first[i] @ second[j]) for j in range(n)]
            log_sum = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
            for j in range(n):
                log_p = logits[j] - log_sum
                if variant == "infonce":
                    total -= log_p if i == j else 0.0
                elif variant == "gfslt":
                    t = math.exp(10.0 * (i == j)) / (math.exp(10.0) + n - 1)
                    total += t * (math.log(t) - log_p)
                elif ids[i] == ids[j]:
                    total -= log_p / sum(x == ids[i] for x in ids)
    return total / n / 2


def triplet(anchor, positive, negatives):
    def cosine(x, y):
        return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))

    losses = []
    for i in range(len(anchor)):
        c = [cosine(anchor[i], positive[i]), *(cosine(anchor[i], x) for x in negatives[i])]
        losses.append(math.log(sum(math.exp(x) for x in c)) - c[0])
    return sum(losses) / len(losses)


def ngrams(tokens, order):
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def bleu(references, hypotheses, level):
    def tokens(text):
        return text.split() if level == "word" else " ".join(text).split()

    pairs = [(tokens(r), tokens(h)) for r, h in zip(references, hypotheses, strict=True)]
    n_ref, n_hyp = sum(len(r) for r, _ in pairs), sum(len(h) for _, h in pairs)
    result, precisions = [], []
    for order in (1, 2, 3, 4):
        match = total = 0
        for r, h in pairs:
            grams, pool = ngrams(h, order), ngrams(r, order)
            total += len(grams)
            for gram in grams:
                if gram in pool:
                    pool.remove(gram)
                    match += 1
        precisions.append(match / total if total else 0.0)
        if min(precisions) == 0:
            result.append(0.0)
            continue
        penalty = 1.0 if n_hyp >= n_ref else math.exp(1 - n_ref / n_hyp)
        result.append(100 * penalty * math.prod(precisions) ** (1 / order))
    return result


def lcs(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def rouge_l(references, hypotheses, level, variant):
    def tokens(text):
        units = text.split() if level == "word" else list(text)
        return " ".join(units).split(" ")

    values = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        r, h = tokens(reference), tokens(hypothesis)
        common = lcs(r, h)
        p, q = common / len(h), common / len(r)
        b = 1.2 if variant == "coco" else p / (q + 1e-12)
        values.append(0.0 if common == 0 else (1 + b * b) * p * q / (q + b * b * p))
    return 100 * sum(values) / len(values)


def word_accuracy(references, hypotheses):
    right = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        r, h = reference.split(), hypothesis.split()
        for i in range(len(r)):
            total += 1
            right += i < len(h) and h[i] == r[i]
    return right / total if total else 0.0


def convolved(padded):
    """Tokens out of conv5, pool2, conv5, pool2, by counting window positions."""
    for kernel, stride in ((5, 1), (2, 2), (5, 1), (2, 2)):
        padded = len([start for start in range(0, padded, stride) if start + kernel <= padded])
    return padded
