"""All methods on adapters in float64 NumPy: dense matrices everywhere, nothing of the code under test, no torch.

The model is ``tanh(tanh(x W_0^T + b_0) W_1^T + b_1) W^T + b`` with adapters on W_0 and W_1 and a head (W, b) trained
whole. Vectors are dicts: ``A0, B0, A1, B1, W, b``.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

LAYERS = (0, 1)
INPUTS, HIDDEN, CLASSES = 7, (6, 5), 3
SIZES = (9, 14, 6, 11)
BATCH, EPOCHS = 4, 2


@dataclass
class Problem:
    """Frozen weights ``weight[l]`` and biases ``bias[l]``, head ``W, b``, and the clients' samples."""

    weight: list
    bias: list
    head: dict
    inputs: list
    targets: list


def make(seed=0):
    rng = np.random.default_rng(seed)
    widths = (INPUTS, *HIDDEN)
    weight = [rng.normal(size=(widths[i + 1], widths[i])) / np.sqrt(widths[i]) for i in LAYERS]
    bias = [0.1 * rng.normal(size=HIDDEN[i]) for i in LAYERS]
    head = {"W": 0.5 * rng.normal(size=(CLASSES, HIDDEN[-1])), "b": 0.1 * rng.normal(size=CLASSES)}
    centres = rng.normal(size=(CLASSES, INPUTS))
    inputs, targets = [], []
    for size in SIZES:
        y = rng.choice(CLASSES, size=size, p=rng.dirichlet([0.6] * CLASSES))
        inputs.append(centres[y] + 0.5 * rng.normal(size=INPUTS) + 0.6 * rng.normal(size=(size, INPUTS)))
        targets.append(y.astype(np.int64))
    return Problem(weight, bias, head, inputs, targets)


# ------------------------------------------------------------------ starts


def canonical_qr(matrix):
    """Reduced QR with diag(R) >= 0."""
    q, r = np.linalg.qr(matrix)
    sign = np.where(np.diag(r) < 0, -1.0, 1.0)
    return q * sign, r * sign[:, None]


def start(problem, rank, scaling, init, seed=3, rms=1e-2):
    """Frozen weights and the vector of a model of one rank."""
    vector, base = {name: value.copy() for name, value in problem.head.items()}, []
    for layer in LAYERS:
        weight = problem.weight[layer]
        if init == "kaiming":
            rng = np.random.default_rng((seed, layer))
            a = rng.uniform(-1, 1, size=(5, weight.shape[1]))[:rank] / np.sqrt(weight.shape[1])
            b = np.zeros((weight.shape[0], rank))
        else:
            q, r = canonical_qr(weight)
            a, b = r[:rank], q[:, :rank]
            if init == "qr_scaled":
                f = np.sqrt(rms * np.sqrt(weight.size) / np.linalg.norm(b @ a))
                a, b = f * a, f * b
        vector[f"A{layer}"], vector[f"B{layer}"] = a.copy(), b.copy()
        base.append(weight - scaling * b @ a)
    return base, vector


# ------------------------------------------------------------------ model


def gradient(vector, base, scaling, problem, x, y):
    """Gradient of the mean cross-entropy by all that is trained."""
    weight = [base[i] + scaling * vector[f"B{i}"] @ vector[f"A{i}"] for i in LAYERS]
    hidden = [x]
    for i in LAYERS:
        hidden.append(np.tanh(hidden[-1] @ weight[i].T + problem.bias[i]))
    logits = hidden[-1] @ vector["W"].T + vector["b"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1.0
    p /= len(y)
    found = {"W": p.T @ hidden[-1], "b": p.sum(axis=0)}
    back = p @ vector["W"]
    for i in reversed(LAYERS):
        back = back * (1 - hidden[i + 1] ** 2)
        whole = back.T @ hidden[i]
        found[f"A{i}"] = scaling * vector[f"B{i}"].T @ whole
        found[f"B{i}"] = scaling * whole @ vector[f"A{i}"].T
        back = back @ weight[i]
    return found


def norm(tree):
    return np.sqrt(sum(np.sum(value**2) for value in tree.values()))


@dataclass
class World:
    """A federation: ``ranks`` and ``scaling`` by rank, cohorts, optimizer."""

    problem: Problem
    ranks: tuple
    scaling: dict
    cohorts: list
    init: str = "kaiming"
    lr: float = 0.02
    optimizer: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_grad: float = 0.0
    weighting: str = "samples"
    trajectory: list = field(default_factory=list)
    effective: list = field(default_factory=list)

    def __post_init__(self):
        self.largest = max(self.ranks)
        self.starts = {r: start(self.problem, r, self.scaling[r], self.init) for r in set(self.ranks)}

    def batches(self, client):
        x, y = self.problem.inputs[client], self.problem.targets[client]
        return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(y), BATCH)]

    def shares(self, cohort):
        sizes = [len(self.problem.targets[k]) if self.weighting == "samples" else 1 for k in cohort]
        return [size / sum(sizes) for size in sizes]

    def clipped(self, grads):
        size = norm(grads)
        scale = self.clip_grad / size if self.clip_grad and size > self.clip_grad else 1.0
        return {name: value * scale for name, value in grads.items()}

    def train(self, client, vector, base, still=(), extra=lambda vector: {}):
        """Local steps; ``extra`` is added to the clipped gradient, tensors in ``still`` stay."""
        scaling = self.scaling[self.ranks[client]]
        vector = {name: value.copy() for name, value in vector.items()}
        m = {name: np.zeros_like(value) for name, value in vector.items()}
        v = {name: np.zeros_like(value) for name, value in vector.items()}
        for k, (x, y) in enumerate(self.batches(client) * EPOCHS, start=1):
            grads = gradient(vector, base, scaling, self.problem, x, y)
            grads = self.clipped({name: value for name, value in grads.items() if name not in still})
            more = extra(vector)
            for name, g in grads.items():
                g = g + more.get(name, 0.0)
                if self.optimizer == "sgd":
                    m[name] = self.momentum * m[name] + g + self.weight_decay * vector[name]
                    vector[name] = vector[name] - self.lr * m[name]
                    continue
                m[name] = self.b1 * m[name] + (1 - self.b1) * g
                v[name] = self.b2 * v[name] + (1 - self.b2) * g * g
                step = (m[name] / (1 - self.b1**k)) / (np.sqrt(v[name] / (1 - self.b2**k)) + self.eps)
                vector[name] = vector[name] * (1 - self.lr * self.weight_decay) - self.lr * step
        return vector

    # -------------------------------------------------------------- between ranks

    def cut(self, vector, rank, power=1):
        """First rows and columns; A times (s_server / s_rank)^power."""
        ratio = (self.scaling[self.largest] / self.scaling[rank]) ** power
        found = {name: vector[name].copy() for name in ("W", "b")}
        for i in LAYERS:
            found[f"A{i}"], found[f"B{i}"] = ratio * vector[f"A{i}"][:rank], vector[f"B{i}"][:, :rank].copy()
        return found

    def pad(self, vector, rank, power=1):
        """The other way, with zeros."""
        ratio = (self.scaling[rank] / self.scaling[self.largest]) ** power
        found = {name: vector[name].copy() for name in ("W", "b")}
        for i in LAYERS:
            a, b, gap = vector[f"A{i}"], vector[f"B{i}"], self.largest - rank
            found[f"A{i}"] = np.vstack([ratio * a, np.zeros((gap, a.shape[1]))])
            found[f"B{i}"] = np.hstack([b, np.zeros((b.shape[0], gap))])
        return found


def mean(trees, shares):
    return {name: sum(p * tree[name] for p, tree in zip(shares, trees, strict=True)) for name in trees[0]}


# ------------------------------------------------------------------ one loop for all


def run(world, rule, *, still=lambda t: (), merging=False, sent=None, client=None):
    """Rounds of a method.

    ``rule(server, padded, shares, delta, t, cohort) -> new server vector`` (its head is replaced by the mean);
    ``delta[l]`` is the exact ``sum_k p_k s_k B_k A_k``. ``merging``: frozen weights are such that all start from the
    exact average. ``client(k, t, vector, base) -> trained vector`` replaces plain training.
    """
    server = {name: value.copy() for name, value in world.starts[world.largest][1].items()}
    exact = [weight.copy() for weight in world.problem.weight]
    for t, cohort in enumerate(world.cohorts):
        ends, weights, shares = [], [], world.shares(cohort)
        for k in cohort:
            rank = world.ranks[k]
            base, vector = world.starts[rank]
            s = world.scaling[rank]
            if t:
                vector = sent(server, rank) if sent else world.cut(server, rank)
            if merging:
                base = [exact[i] - s * vector[f"B{i}"] @ vector[f"A{i}"] for i in LAYERS]
            end = client(k, t, vector, base) if client else world.train(k, vector, base, still(t))
            ends.append(end)
            weights.append([base[i] + s * end[f"B{i}"] @ end[f"A{i}"] for i in LAYERS])
        products = [
            [world.scaling[world.ranks[k]] * e[f"B{i}"] @ e[f"A{i}"] for k, e in zip(cohort, ends, strict=True)]
            for i in LAYERS
        ]
        delta = [sum(p * product for p, product in zip(shares, products[i], strict=True)) for i in LAYERS]
        exact = [sum(p * w[i] for p, w in zip(shares, weights, strict=True)) for i in LAYERS]
        padded = [world.pad(e, world.ranks[k]) for k, e in zip(cohort, ends, strict=True)]
        new = rule(server, padded, shares, delta, t, cohort)
        head = mean([{"W": e["W"], "b": e["b"]} for e in ends], shares)
        server = {**new, **head}
        world.trajectory.append(server)
        base, s = world.starts[world.largest][0], world.scaling[world.largest]
        own = [base[i] + s * server[f"B{i}"] @ server[f"A{i}"] for i in LAYERS]
        world.effective.append(exact if merging else own)
    return world


def averaged(world):
    """Mean of the padded factors; what no client of the cohort has stays."""

    def rule(server, padded, shares, delta, t, cohort):
        new, most = mean(padded, shares), max(world.ranks[k] for k in cohort)
        for i in LAYERS:
            new[f"A{i}"][most:] = server[f"A{i}"][most:]
            new[f"B{i}"][:, most:] = server[f"B{i}"][:, most:]
        return new

    return rule


def fedit(world):
    return run(world, averaged(world))


def lora_head(world):
    """Factors stay those that each model came with, whose function is the base's."""

    def sent(server, rank):
        return {**world.starts[rank][1], "W": server["W"], "b": server["b"]}

    return run(world, lambda server, *_: dict(server), still=lambda t: ("A0", "B0", "A1", "B1"), sent=sent)


def ffa_lora(world):
    plain = averaged(world)

    def rule(server, *rest):
        return plain(server, *rest) | {f"A{i}": server[f"A{i}"] for i in LAYERS}

    return run(world, rule, still=lambda t: ("A0", "A1"))


def rolora(world):
    return run(world, averaged(world), still=lambda t: ("B0", "B1") if t % 2 else ("A0", "A1"))


def fedex_lora(world):
    return run(world, averaged(world), merging=True)


def flora(world):
    """Restart from the start's factors."""

    def sent(server, rank):
        return {**world.starts[rank][1], "W": server["W"], "b": server["b"]}

    return run(world, lambda *_: dict(world.starts[world.largest][1]), merging=True, sent=sent)


def split(matrix, rank, decomposition):
    """(A, B) of a rank."""
    if decomposition == "svd":
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
        u, v = u * sign, v * sign[:, None]
        return np.sqrt(s[:rank, None]) * v[:rank], u[:, :rank] * np.sqrt(s[:rank])
    if decomposition == "qr_pivoted":
        order, left = [], matrix.copy()
        for _ in range(rank):
            sizes = (left**2).sum(axis=0)
            sizes[order] = -1.0
            order.append(int(sizes.argmax()))
            q, _ = np.linalg.qr(matrix[:, order])
            left = matrix - q @ (q.T @ matrix)
        q, _ = canonical_qr(matrix[:, order])
        return q.T @ matrix, q
    q, r = canonical_qr(matrix)
    return r[:rank], q[:, :rank]


def refactored(world, decomposition):
    def rule(server, padded, shares, delta, t, cohort):
        new = {}
        for i in LAYERS:
            new[f"A{i}"], new[f"B{i}"] = split(delta[i] / world.scaling[world.largest], world.largest, decomposition)
        return new

    return rule


def flexlora(world):
    return run(world, refactored(world, "svd"))


def lora_fair(world, lam=0.01):
    plain = averaged(world)

    def rule(server, padded, shares, delta, t, cohort):
        new, most = plain(server, padded, shares, delta, t, cohort), max(world.ranks[k] for k in cohort)
        for i in LAYERS:
            a, b = new[f"A{i}"], new[f"B{i}"]
            target = delta[i] / world.scaling[world.largest] + server[f"B{i}"][:, most:] @ server[f"A{i}"][most:]
            new[f"B{i}"] = b + (target - b @ a) @ a.T @ np.linalg.inv(a @ a.T + lam * np.eye(len(a)))
        return new

    return run(world, rule)


def hetlora(world, prune=0.0, gamma=0.99):
    kept = {k: dict.fromkeys(LAYERS, r) for k, r in enumerate(world.ranks)}
    world.kept = kept

    def inner(rank):
        return max(1, int(np.floor(gamma * rank)))

    def last(vector, k, i):
        rows = slice(inner(kept[k][i]), kept[k][i])
        return vector[f"A{i}"][rows], vector[f"B{i}"][:, rows], rows

    def zeroed(vector, k):
        vector = {name: value.copy() for name, value in vector.items()}
        for i in LAYERS:
            vector[f"A{i}"][kept[k][i] :], vector[f"B{i}"][:, kept[k][i] :] = 0.0, 0.0
        return vector

    def client(k, t, vector, base):
        def penalty(now):
            found = {name: np.zeros_like(value) for name, value in now.items()}
            for i in LAYERS:
                a, b, rows = last(now, k, i)
                size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
                if size_a > 0:
                    found[f"A{i}"][rows] = prune * size_b * a / size_a
                if size_b > 0:
                    found[f"B{i}"][:, rows] = prune * size_a * b / size_b
            return found

        vector = zeroed(vector, k)
        end = world.train(k, vector, base, (), penalty)
        for i in LAYERS:
            before, after = (np.linalg.norm(last(v, k, i)[0]) * np.linalg.norm(last(v, k, i)[1]) for v in (vector, end))
            if after < before:
                kept[k][i] = inner(kept[k][i])
        return zeroed(end, k)

    plain = averaged(world)

    def rule(server, padded, shares, delta, t, cohort):
        new = {}
        for i in LAYERS:
            sizes = [np.linalg.norm(tree[f"B{i}"] @ tree[f"A{i}"]) for tree in padded]
            weights = [size / sum(sizes) for size in sizes] if sum(sizes) > 0 else shares
            new |= {
                n: v for n, v in plain(server, padded, weights, delta, t, cohort).items() if n in (f"A{i}", f"B{i}")
            }
        return new

    return run(world, rule, client=client if prune else None)


def ilora(
    world,
    decomposition="qr",
    residual="drop",
    cv=True,
    cv_rows="covering",
    cv_transport=False,
    control_batches=0,
    control_scale=1.0,
):
    number = len(world.ranks)
    zero: Any = lambda rank: {n: np.zeros_like(v) for n, v in world.starts[rank][1].items()}  # noqa: E731
    c, own = zero(world.largest), {k: zero(r) for k, r in enumerate(world.ranks)}
    old, changes, seen = {}, {}, set()
    world.c, world.own = c, own

    def directions(vector):
        sizes = [np.linalg.norm(vector[f"B{i}"], axis=0) for i in LAYERS]
        return [vector[f"B{i}"] / np.where(sizes[i] > 0, sizes[i], 1.0) for i in LAYERS]

    def turned(tree, before, after):
        found = dict(tree)
        for i in LAYERS:
            turn = after[i].T @ before[i]
            found[f"A{i}"], found[f"B{i}"] = turn @ tree[f"A{i}"], tree[f"B{i}"] @ turn.T
        return found

    def client(k, t, vector, base):
        rank = world.ranks[k]
        batches = world.batches(k)[:control_batches] if control_batches else world.batches(k)
        x, y = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])
        fresh = world.clipped(gradient(vector, base, world.scaling[rank], world.problem, x, y))
        fresh = {name: control_scale * value for name, value in fresh.items()}
        mine = turned(own[k], old[k], directions(vector)) if cv_transport and k in seen else own[k]
        cut = world.cut(world.c, rank, -1)
        correction = {name: cut[name] - mine[name] for name in mine}
        changes[k] = {name: fresh[name] - mine[name] for name in mine}
        own[k], old[k] = fresh, directions(vector)
        seen.add(k)
        return world.train(k, vector, base, (), lambda now: correction)

    plain = refactored(world, decomposition)

    def rule(server, padded, shares, delta, t, cohort):
        new = plain(server, padded, shares, delta, t, cohort)
        if cv:
            change = [world.pad(changes[k], world.ranks[k], -1) for k in cohort]
            total = {name: sum(tree[name] for tree in change) for name in world.c}
            has = np.array([sum(r > row for r in world.ranks) for row in range(world.largest)], dtype=float)
            per = has if cv_rows == "covering" else np.full(world.largest, float(number))
            moved = {n: world.c[n] + total[n] / number for n in ("W", "b")}
            for i in LAYERS:
                moved[f"A{i}"] = world.c[f"A{i}"] + total[f"A{i}"] / per[:, None]
                moved[f"B{i}"] = world.c[f"B{i}"] + total[f"B{i}"] / per
            world.c = turned(moved, directions(server), directions(new)) if cv_transport else moved
        return new

    return run(world, rule, merging=residual == "fold", client=client if cv else None)


METHODS = {
    "ilora": ilora,
    "fedit": fedit,
    "ffa_lora": ffa_lora,
    "rolora": rolora,
    "flora": flora,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "fedex_lora": fedex_lora,
    "lora_fair": lora_fair,
    "lora_head": lora_head,
}
