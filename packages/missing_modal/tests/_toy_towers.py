"""Tiny towers in float64 for the tests of methods: pre-norm blocks as CLIP has them, weights drawn with NumPy."""

import copy
import math

import numpy as np
import torch
from missing_modal.backbones.base import Tower, TowerSpec
from missing_modal.batch import Batch
from torch import nn
from torch.nn import functional as F

VOCABULARY, POSITIONS = 11, 9
PATCHES, CHANNELS = 5, 4
#: token ids: the largest is the end of text, as CLIP has it; 0 is padding
END = VOCABULARY - 1


def draw_weights(name, width, depth, features, seed, project=True):
    """NumPy weights by name."""
    rng = np.random.default_rng([seed, width])
    d = width
    w = {}

    def put(key, *shape, scale=0.4, shift=0.0):
        w[key] = shift + scale * rng.normal(size=shape)

    if name == "text":
        put("embedding", VOCABULARY, d, scale=0.8)
        put("positions", POSITIONS, d)
    else:
        put("patch", CHANNELS, d, scale=0.6)
        put("cls", d)
        put("positions", PATCHES + 1, d)
        put("ln_pre.weight", d, scale=0.1, shift=1.0)
        put("ln_pre.bias", d, scale=0.1)
    for i in range(depth):
        for norm in ("ln_1", "ln_2"):
            put(f"{i}.{norm}.weight", d, scale=0.1, shift=1.0)
            put(f"{i}.{norm}.bias", d, scale=0.1)
        put(f"{i}.in.weight", 3 * d, d)
        put(f"{i}.in.bias", 3 * d, scale=0.1)
        put(f"{i}.out.weight", d, d)
        put(f"{i}.out.bias", d, scale=0.1)
        put(f"{i}.fc.weight", 2 * d, d)
        put(f"{i}.fc.bias", 2 * d, scale=0.1)
        put(f"{i}.proj.weight", d, 2 * d)
        put(f"{i}.proj.bias", d, scale=0.1)
    put("norm.weight", d, scale=0.1, shift=1.0)
    put("norm.bias", d, scale=0.1)
    if project:
        put("projection", d, features)
    return w


class ToyTower(Tower):
    """A tower of ``draw_weights``; ``text`` is causal and reads the largest id, others read a CLS at row 0."""

    def __init__(self, name, width=8, depth=3, features=5, heads=2, seed=0, project=True):
        self.name = name
        self.causal = name == "text"
        self.identity = f"toy:{name}"
        drawn = draw_weights(name, width, depth, features, seed, project)
        self.net = nn.ParameterDict(
            {
                key.replace(".", "_"): nn.Parameter(torch.from_numpy(value), requires_grad=False)
                for key, value in drawn.items()
            }
        )
        self.weights = drawn
        self.spec = TowerSpec(
            name,
            width,
            depth,
            features if project else width,
            heads,
            self.net["norm_weight"].detach(),
            self.net["norm_bias"].detach(),
            1e-5,
            self.net["projection"].detach() if project else None,
            name != "text",
        )

    def _norm(self, x, key):
        return F.layer_norm(x, x.shape[-1:], self.net[f"{key}_weight"], self.net[f"{key}_bias"], 1e-5)

    def embed(self, x):
        if self.name == "text":
            return self.net["embedding"][x] + self.net["positions"][: x.shape[1]]
        tokens = x.to(self.net["patch"].dtype) @ self.net["patch"]
        first = self.net["cls"].expand(len(x), 1, -1)
        return self._norm(torch.cat([first, tokens], dim=1) + self.net["positions"], "ln_pre")

    def block(self, index, h, mask, extra=None):
        d, heads = self.spec.width, self.spec.heads
        x = self._norm(h, f"{index}_ln_1")
        q, k, v = F.linear(x, self.net[f"{index}_in_weight"], self.net[f"{index}_in_bias"]).chunk(3, dim=-1)
        if extra is not None:
            k, v = torch.cat([k, extra[0]], dim=1), torch.cat([v, extra[1]], dim=1)
        q, k, v = (t.unflatten(-1, (heads, d // heads)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
        if mask is not None:
            scores[..., : mask.shape[-1]] += mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + F.linear(mixed, self.net[f"{index}_out_weight"], self.net[f"{index}_out_bias"])
        x = F.linear(self._norm(h, f"{index}_ln_2"), self.net[f"{index}_fc_weight"], self.net[f"{index}_fc_bias"])
        x = x * torch.sigmoid(1.702 * x)
        return h + F.linear(x, self.net[f"{index}_proj_weight"], self.net[f"{index}_proj_bias"])

    def pool_rows(self, x):
        return x.argmax(-1) if self.causal else torch.zeros(len(x), dtype=torch.long)

    def placeholder(self, count):
        if self.causal:
            held = torch.zeros(count, POSITIONS, dtype=torch.long)
            held[:, 0], held[:, 1] = 1, END
            return held
        return torch.ones(count, PATCHES, CHANNELS, dtype=torch.float64)

    def length(self, x):
        return int(x.argmax(-1).max()) + 1 if self.causal else None

    def state(self):
        return self.net.state_dict()

    def to(self, device, dtype=None):
        self.net.to(device, dtype)
        return self

    def tuned(self):
        twin = copy.copy(self)
        twin.net = copy.deepcopy(self.net).requires_grad_(True)
        for key in ("norm_weight", "norm_bias", "projection"):
            if key in twin.net:
                twin.net[key].requires_grad_(False)
        return twin, twin.net


class FeatureTower(Tower):
    """No blocks: features only."""

    causal = False
    identity = "toy:features"

    def __init__(self, name="table", width=3, seed=0):
        self.net = nn.Linear(2, width, dtype=torch.float64)
        rng = np.random.default_rng(seed)
        for value in self.net.parameters():
            value.requires_grad_(False).copy_(torch.from_numpy(rng.normal(size=value.shape)))
        one = torch.ones(width, dtype=torch.float64)
        self.spec = TowerSpec(name, width, 0, width, 1, one, torch.zeros_like(one), 1e-5, None, False)

    def embed(self, x):
        return self.net(x)

    def block(self, index, h, mask, extra=None):
        raise AssertionError("a tower without blocks has none to run")

    def pool_rows(self, x):
        return torch.zeros(len(x), dtype=torch.long)

    def placeholder(self, count):
        return torch.zeros(count, 2, dtype=torch.float64)

    def state(self):
        return self.net.state_dict()

    def to(self, device, dtype=None):
        self.net.to(device, dtype)
        return self


def two_towers(depth=3, seed=0):
    return [ToyTower("image", 8, depth, 5, 2, seed), ToyTower("text", 6, depth, 5, 3, seed + 1)]


def draw_inputs(count, seed=0):
    """(count, PATCHES, CHANNELS) images and (count, POSITIONS) texts that end at different places."""
    rng = np.random.default_rng([seed, 7])
    images = rng.normal(size=(count, PATCHES, CHANNELS))
    texts = np.zeros((count, POSITIONS), dtype=np.int64)
    for row in texts:
        end = rng.integers(2, POSITIONS - 2)
        row[1:end] = rng.integers(2, END, size=end - 1)
        row[0], row[end] = 1, END
    return {
        "image": images,
        "text": texts,
        "audio": rng.normal(size=(count, PATCHES, CHANNELS)),
        "table": rng.normal(size=(count, 2)),
    }


def make_batch(masks, modalities=("image", "text"), seed=0, inputs=None, classes=3):
    """A batch of samples with these patterns."""
    full = inputs or draw_inputs(len(masks), seed)
    kept, rows = {}, {}
    for bit, name in enumerate(modalities):
        have = [sample for sample, mask in enumerate(masks) if mask >> bit & 1]
        if have:
            kept[name], rows[name] = torch.from_numpy(full[name])[have], torch.tensor(have)
    labels = torch.arange(len(masks)) % classes
    return Batch([f"s{i}" for i in range(len(masks))], list(masks), kept, rows, labels)
