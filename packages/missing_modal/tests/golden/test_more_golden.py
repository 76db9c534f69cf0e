"""The package's own towers, six modalities, deep stacks, ViLT with prompts and the optimizer against NumPy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from missing_modal.backbones.base import TowerSpec
from missing_modal.backbones.small import small_audio, small_image, small_patches, small_tabular, small_text
from missing_modal.backbones.tabular import VectorTower
from missing_modal.backbones.vilt import ViltImage, ViltText
from missing_modal.batch import Batch
from missing_modal.classifier import Classifier
from missing_modal.fused import FusedClassifier
from missing_modal.methods import create
from missing_modal.module import MMModule
from missing_modal.settings import OptimConfig
from torch.nn import functional as F


def _load(name):
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"mm_more_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ref, slow = _load("_dcp_reference.py"), _load("_towers_reference.py")
SIX = ("image", "text", "audio", "table", "patches", "vector")
KINDS = ("image", "text", "audio", "tabular", "patches", "vector")


def arrays(state):
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def jitter(tower, seed):
    """The tower in float64, without the zeros and ones that hide a mistake."""
    rng = np.random.default_rng(seed)
    tower.to("cpu", torch.float64)
    state = tower.state().items()
    return tower.replaced({key: value + 0.1 * torch.from_numpy(rng.normal(size=value.shape)) for key, value in state})


def six_towers():
    """Of all kinds, widths, depths and lengths of features."""
    return [
        jitter(small_image(8, 4, width=8, depth=3, heads=2, features=5), 0),
        jitter(small_text(12, 7, width=6, depth=3, heads=3, features=5), 1),
        jitter(small_audio(8, 12, (4, 4), width=4, depth=1, heads=1, features=3), 2),
        jitter(small_tabular(7, 3, width=6, depth=2, heads=2, features=None, name="table"), 3),
        jitter(small_patches(3, 2, width=10, depth=3, heads=5, features=4, name="patches"), 4),
        VectorTower("vector", 3),
    ]


def six_inputs(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = np.zeros((count, 7), dtype=np.int64)
    for row in texts:
        end = rng.integers(1, 6)
        row[0], row[1:end], row[end] = 10, rng.integers(1, 10, end - 1), 11
    shapes = {"image": (3, 8, 8), "audio": (8, 12), "table": (7,), "patches": (3, 2), "vector": (3,)}
    return {"text": texts} | {name: rng.normal(size=(count, *shape)) for name, shape in shapes.items()}


def batch_of(masks, names, inputs, classes=3):
    rows = {name: [i for i, mask in enumerate(masks) if mask >> bit & 1] for bit, name in enumerate(names)}
    kept = {name: torch.from_numpy(inputs[name][at]) for name, at in rows.items() if at}
    places = {name: torch.tensor(at) for name, at in rows.items() if at}
    return Batch([str(i) for i in range(len(masks))], list(masks), kept, places, torch.arange(len(masks)) % classes)


def moved(model, scale=0.3, seed=5):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.from_numpy(scale * rng.normal(size=tuple(value.shape))))
    return model


def expected(model, kinds, names, masks, inputs, order, depth):
    towers = [(kind, arrays(tower.state()), tower.spec.heads) for kind, tower in zip(kinds, model.towers, strict=True)]
    outputs = [arrays(output.state_dict()) for output in model.prompter.outputs]
    samples = [
        (tuple(mask >> bit & 1 for bit in range(len(names))), [inputs[name][i] for name in names])
        for i, mask in enumerate(masks)
    ]
    p, head = arrays(model.prompter.prompts.state_dict()), arrays(model.head.state_dict())
    return slow.dcp_logits(ref, towers, p, outputs, head, samples, order, depth)


@pytest.mark.parametrize("kind", ["table", "additive"])
def test_six_modalities_in_all_their_patterns(kind):
    """63 patterns of six towers, one of them too short for J, one without blocks."""
    model = Classifier(six_towers(), create("dcp", length=6, depth=3, reduction=4, pattern_params=kind), 3).double()
    entries = model.prompter.prompts.common.value.shape[0]
    assert entries == {"table": 63, "additive": 6}[kind]
    moved(model)
    # Entries of a table: the complete pattern first, then by falling number of modalities, then by value of the bits.
    masks = sorted(range(1, 64), key=lambda mask: (-bin(mask).count("1"), mask))
    order = [tuple(mask >> bit & 1 for bit in range(6)) for mask in masks] if kind == "table" else None
    inputs = six_inputs(63)
    found = model(batch_of(masks, SIX, inputs)).detach()
    np.testing.assert_allclose(found, expected(model, KINDS, SIX, masks, inputs, order, 3), rtol=0, atol=1e-10)
    shuffled = np.random.default_rng(1).permutation(63)
    again = model(batch_of([masks[i] for i in shuffled], SIX, {k: v[shuffled] for k, v in inputs.items()}))
    torch.testing.assert_close(again.detach(), found[shuffled], rtol=0, atol=1e-12)
    model.prompter = model.prompter.bake()
    torch.testing.assert_close(model(batch_of(masks, SIX, inputs)), found, rtol=0, atol=1e-11)


def test_gradients_of_six_modalities_by_central_differences():
    """Along a random direction of each group of parameters, so that every element counts."""
    model = moved(Classifier(six_towers(), create("dcp", length=6, depth=3, reduction=4), 3).double())
    masks = [63, 1, 2, 36, 18, 27]
    inputs = six_inputs(len(masks), 3)
    batch = batch_of(masks, SIX, inputs)
    F.cross_entropy(model(batch), batch.labels).backward()
    groups = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            part = name.split(".")[2] if name.startswith("prompter.prompts") else name.split(".")[-2]
            groups.setdefault(part, []).append(value)
    assert {"static", "generators", "common", "common_maps", "queries", "attention", "head"} <= set(groups)
    rng = np.random.default_rng(2)
    for part, values in groups.items():
        ways = [torch.from_numpy(rng.normal(size=tuple(value.shape))) for value in values]
        slope = sum(float((value.grad * way).sum()) for value, way in zip(values, ways, strict=True))
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for value, way in zip(values, ways, strict=True):
                    value.add_(way, alpha=step)
            logits = expected(model, KINDS, SIX, masks, inputs, None, 3)  # auto: entries by modality beyond four
            ends.append(ref.cross_entropy(logits, batch.labels.tolist()))
        with torch.no_grad():
            for value, way in zip(values, ways, strict=True):
                value.add_(way, alpha=1e-5)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8), part


@pytest.mark.parametrize(("length", "depth"), [(36, 6), (6, 1), (6, 12)], ids=["as published", "J=1", "all blocks"])
def test_twelve_blocks(length, depth):
    """The published L and J on twelve blocks, prompts at the first block only, prompts at every block."""
    sizes = {"depth": 12, "features": 4}
    towers = [
        jitter(small_image(8, 4, width=8, heads=2, **sizes), 0),
        jitter(small_text(12, 7, width=6, heads=3, **sizes), 1),
    ]
    options = {"length": length, "depth": depth, "reduction": 4}
    model = moved(Classifier(towers, create("dcp", **options), 3).double(), scale=0.2)
    inputs, masks, order = six_inputs(3, 4), [3, 1, 2], [(1, 1), (1, 0), (0, 1)]
    found = model(batch_of(masks, SIX[:2], inputs)).detach()
    want = expected(model, KINDS[:2], SIX[:2], masks, inputs, order, depth)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    assert model.num_prefix_tokens == {"image": length, "text": length}


# ------------------------------------------------------------------ ViLT


def vilt_towers(width=8, depth=3, heads=2):
    rng = np.random.default_rng(8)

    def put(*shape, scale=0.4, shift=0.0):
        return torch.from_numpy(shift + scale * rng.normal(size=shape))

    shapes = {"attention_in": (3 * width, width), "attention_out": (width, width)}
    shapes |= {"mlp_in": (2 * width, width), "mlp_out": (width, 2 * width)}
    weights = {"out.norm.weight": put(width, scale=0.1, shift=1.0), "out.norm.bias": put(width)}
    for index in range(depth):
        for name, shape in shapes.items():
            weights[f"block.{index}.{name}.weight"], weights[f"block.{index}.{name}.bias"] = put(*shape), put(shape[0])
        for name in ("norm_1", "norm_2"):
            weights[f"block.{index}.{name}.weight"] = put(width, scale=0.1, shift=1.0)
            weights[f"block.{index}.{name}.bias"] = put(width)
    weights |= {"patch.weight": put(width, 3, 4, 4), "patch.bias": put(width), "class_embedding": put(width)}
    weights |= {"position": put(5, width), "type": put(width), "pooler.weight": put(width, width)}
    weights["pooler.bias"] = put(width)
    image = ViltImage("image", weights, heads=heads, identity="vilt:toy", size=(8, 8))
    spec = image.spec
    own = TowerSpec("text", width, depth, width, heads, spec.norm_weight, spec.norm_bias, spec.norm_eps, None, False)
    held = {"token.weight": put(20, width), "position": put(6, width), "type": put(width)}
    held |= {"norm.weight": put(width, scale=0.1, shift=1.0), "norm.bias": put(width)}
    return image, ViltText(held, own, "vilt:toy", start=18, end=19)


@pytest.mark.parametrize("level", ["input", "attention"])
def test_missing_aware_prompts_on_vilt(level):
    image, text = vilt_towers()
    model = moved(FusedClassifier((image, text), create("mmp_vilt", length=6, depth=2, level=level), 3).double())
    masks = [3, 1, 2, 2]
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(4, 3, 8, 8))
    ids = np.array([[18, 3, 4, 19, 0, 0], [18, 5, 19, 0, 0, 0], [18, 19, 0, 0, 0, 0], [18, 7, 8, 9, 19, 0]])
    batch = batch_of(masks, ("image", "text"), {"image": pictures, "text": ids})
    empty, ones, place = np.array([18, 19, 0, 0, 0, 0]), np.ones((3, 8, 8)), {3: 0, 1: 1, 2: 2}
    samples = [
        (place[mask], ids[i] if mask & 2 else empty, pictures[i] if mask & 1 else ones) for i, mask in enumerate(masks)
    ]

    def logits():
        table = model.prompter.value.detach().numpy()
        output = {"norm_weight": model.prompter.outputs[0].norm_weight.detach().numpy()}
        output["norm_bias"] = model.prompter.outputs[0].norm_bias.detach().numpy()
        pooler, head = arrays(model.pooler.state_dict()), arrays(model.head.state_dict())
        shown = arrays(image.state()), arrays(text.state())
        return slow.vilt_logits(ref, *shown, 2, table, output, pooler, head, samples, level == "attention")

    np.testing.assert_allclose(model(batch).detach(), logits(), rtol=0, atol=1e-11)
    F.cross_entropy(model(batch), batch.labels).backward()
    value = model.prompter.value
    way = torch.from_numpy(rng.normal(size=tuple(value.shape)))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            value.add_(way, alpha=step)
        ends.append(ref.cross_entropy(logits(), batch.labels.tolist()))
    assert float((value.grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


# ------------------------------------------------------------------ optimizer


@pytest.mark.parametrize("method", ["dcp", "modality_dropout"])
def test_optimizer_is_the_specified_adamw(method):
    """DCP 3.6, for 13 steps: rates, their schedule, decay by name, moments; the encoders' own rates apart."""
    towers = [jitter(small_patches(3, 2, width=4, depth=1, heads=1, features=2, name="image"), 0)]
    towers.append(jitter(small_text(12, 7, width=4, depth=1, heads=1, features=2), 1))
    options = {"length": 3, "depth": 1, "reduction": 2} if method == "dcp" else {"rate": 0.0}
    model = Classifier(towers, create(method, **options), 3).double()
    config = OptimConfig(lr_out=3e-3, lr_towers=5e-4)
    total = 13
    module = MMModule(model, config, task="multiclass", total_steps=total)
    made = module.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    start = {name: value.detach().numpy().copy() for name, value in model.named_parameters() if value.requires_grad}
    grads, seen = {name: [] for name in start}, {name: [] for name in start}
    inputs = six_inputs(4)
    inputs["image"] = inputs["patches"]
    for step in range(total):
        batch = batch_of([3, 1, 2, 3], ("image", "text"), {k: np.roll(v, step, 0) for k, v in inputs.items()})
        optimizer.zero_grad()
        module.loss(batch, torch.Generator().manual_seed(step))[0].backward()
        for name, value in model.named_parameters():
            if value.requires_grad:
                grads[name].append(value.grad.numpy().copy())
        optimizer.step()
        schedule.step()
        for name, value in model.named_parameters():
            if value.requires_grad:
                seen[name].append(value.detach().numpy().copy())
    peaks = {"prompter.outputs": 3e-3, "tuned": 5e-4}
    shares = [slow.rate(step, total) for step in range(total)]
    assert shares[:2] == [0.0, 1.0]
    for name, value in start.items():
        peak = next((rate for part, rate in peaks.items() if name.startswith(part)), 1e-2)
        decay = 0.0 if "bias" in name else 2e-2
        want = slow.adamw(value, grads[name], [peak * share for share in shares], decay)
        for got, one in zip(seen[name], want, strict=True):
            np.testing.assert_allclose(got, one, rtol=1e-9, atol=1e-12, err_msg=name)
    assert any("norm_weight" in name for name in start), "weights of norms decay as in the official code"
