"""Exported files: what they hold, exactness of baking, bit-equal reloading, refusals (DCP 8, 9)."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from missing_modal.backbones.base import Tower, TowerSpec, state_hash
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.calibration import Temperatures
from missing_modal.classifier import Classifier
from missing_modal.export import export, largest_difference, load, read, write_exports
from missing_modal.methods import METHODS
from missing_modal.prompts import BakedPrompts
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

MASKS = [3, 1, 2, 3, 2, 1]
DCP = {"length": 6, "depth": 2, "reduction": 3}
SMALL = "small_patches(width=8, depth=2, heads=2, features=4), small_text(26, 5, width=6, depth=2, heads=2, features=4)"


def small_towers(seed=0):
    return (
        small_patches(width=8, depth=2, heads=2, features=4, seed=seed),
        small_text(26, 5, width=6, depth=2, heads=2, features=4, seed=seed),
    )


def small_batch():
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 24, (6, 5), generator=draw)
    texts[:, -1] = 25
    batch = toy.make_batch([3] * 6, inputs=toy.draw_inputs(6))
    batch.inputs = {"image": torch.randn(6, 8, 4, generator=draw), "text": texts}
    return batch.restrict(MASKS, ("image", "text"))


def moved(model, noise=0.2):
    """The model with its trained values off their initial ones."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += noise * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype)
    return model.eval()


def about(model, method="dcp", options=None, classes=3):
    return {
        "method": method,
        "method_options": DCP if options is None else options,
        "modalities": [tower.spec.name for tower in model.towers],
        "task": "multiclass",
        "class_names": [f"c{i}" for i in range(classes)],
        "backbone": {t.spec.name: {"identity": t.identity, "sha256": state_hash(t)} for t in model.towers},
    }


def dcp(towers, **options):
    given = {**DCP, **options}
    model = Classifier(towers, METHODS.create("dcp", **given), 3)
    return model, about(model, options=given)


@pytest.fixture
def doubled():
    model, told = dcp(toy.two_towers())
    return moved(model.double()), told


def test_baked_equals_trainable_in_float64(doubled, tmp_path):
    model, told = doubled
    batch = toy.make_batch(MASKS)
    shown = export(tmp_path / "b.safetensors", model, told, kind="baked", dtype="float64")
    assert isinstance(shown.prompter.prompts, BakedPrompts)
    assert largest_difference(model, shown, [batch]) < 1e-12
    again = load(tmp_path / "b.safetensors", toy.two_towers())
    assert torch.equal(again.model(batch), shown(batch))
    assert again.about["kind"] == "baked"
    assert not any(p.requires_grad for p in again.model.parameters())


def test_baked_equals_trainable_in_float32(tmp_path):
    towers = small_towers()
    model, told = dcp(towers)
    moved(model)
    shown = export(tmp_path / "b.safetensors", model, told, kind="baked", dtype="float32")
    assert 0 < largest_difference(model, shown, [small_batch()]) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"correlated": False},
        {"common": False},
        {"dynamic": False},
        {"dynamic_queries": "frozen"},
        {"train_out": False},
        {"blind": True},
        {"length": 0},
        {"pattern_params": "additive"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["trainable", "baked"])
def test_every_option_survives(options, kind, tmp_path):
    model, told = dcp(toy.two_towers(), **options)
    moved(model.double())
    batch = toy.make_batch(MASKS)
    shown = export(tmp_path / "m.safetensors", model, told, kind=kind, dtype="float64")
    assert largest_difference(model, shown, [batch]) < 1e-12
    assert torch.equal(load(tmp_path / "m.safetensors", toy.two_towers()).model(batch), shown(batch))


@pytest.mark.parametrize("method", sorted(info.name for info in METHODS if "fused" not in info.tags))
def test_every_method_survives_in_both_files(method, tmp_path):
    options = DCP if method == "dcp" else {}
    if method in ("deep_prompts", "vpt", "maple", "msp", "mmp_input", "mmp_attention"):
        options = {"depth": 2}
    model = Classifier(toy.two_towers(), METHODS.create(method, **options), 3).double()
    model.prepare([toy.make_batch(MASKS)])
    moved(model)
    batch = toy.make_batch(MASKS, seed=3)
    for kind in ("trainable", "baked"):
        shown = export(tmp_path / "m.safetensors", model, about(model, method, options), kind=kind, dtype="float64")
        assert largest_difference(model, shown, [batch]) < 1e-12
        again = load(tmp_path / "m.safetensors", toy.two_towers()).model
        assert torch.equal(again(batch), shown(batch))
        trained = [p.requires_grad for p in again.parameters()]
        assert any(trained) == (kind == "trainable")


def test_any_number_of_modalities(tmp_path):
    towers = [*toy.two_towers(), toy.ToyTower("audio", 6, 1, 4, 2, 3), toy.FeatureTower()]
    model, told = dcp(towers)
    moved(model.double())
    batch = toy.make_batch([15, 1, 10, 8, 7], tuple(told["modalities"]))
    shown = export(tmp_path / "b.safetensors", model, told, kind="baked", dtype="float64")
    assert largest_difference(model, shown, [batch]) < 1e-12
    fresh = [*toy.two_towers(), toy.ToyTower("audio", 6, 1, 4, 2, 3), toy.FeatureTower()]
    assert torch.equal(load(tmp_path / "b.safetensors", fresh).model(batch), shown(batch))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["trainable", "baked"])
def test_rounded_files_come_back_bit_for_bit(kind, dtype, tmp_path):
    model, told = dcp(small_towers())
    moved(model)
    before = copy.deepcopy(model.state_dict())
    shown = export(tmp_path / "m.safetensors", model, told, kind=kind, dtype=dtype)
    again = load(tmp_path / "m.safetensors", small_towers()).model
    batch = small_batch()
    assert torch.equal(again(batch), shown(batch))
    assert again(batch).dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stored = {value.dtype for value in read(tmp_path / "m.safetensors")[1].values()}
    assert stored == {getattr(torch, dtype)}


def test_a_new_process_gives_the_same_bits(tmp_path):
    model, told = dcp(small_towers())
    moved(model)
    batch = small_batch()
    torch.save({"batch": vars(batch)}, tmp_path / "batch.pt")
    for kind in ("trainable", "baked"):
        shown = export(tmp_path / f"{kind}.safetensors", model, told, kind=kind, dtype="float16")
        torch.save(shown(batch).detach(), tmp_path / f"{kind}.pt")
    code = f"""
import sys, torch
from pathlib import Path
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.batch import Batch
from missing_modal.export import load
folder = Path(sys.argv[1])
batch = Batch(**torch.load(folder / "batch.pt", weights_only=True)["batch"])
for kind in ("trainable", "baked"):
    found = load(folder / f"{{kind}}.safetensors", ({SMALL})).model(batch).detach()
    print(torch.equal(found, torch.load(folder / f"{{kind}}.pt", weights_only=True)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_frozen_copies_stay_out_and_sizes_are_the_specified_ones(tmp_path):
    n, depth, image, text, e = 2, 2, 8, 6, 4
    model, told = dcp(small_towers())
    moved(model)
    total = image + text
    norms_and_projection = 2 * total + image * e  # the text projection is never trained (DCP 3.5)
    head = 3 * (2 * e) + 3
    export(tmp_path / "b.safetensors", model, told, kind="baked", dtype="float16")
    baked = sum(value.numel() for value in read(tmp_path / "b.safetensors")[1].values())
    maps = sum(d * d + d for d in (image, text))
    # tables of three patterns: J correlated groups, one common, one probe of the dynamic prompts (DCP 9)
    assert baked == 3 * (depth + 2) * n * total + maps + norms_and_projection + head
    export(tmp_path / "t.safetensors", model, told, kind="trainable")
    trainable = sum(value.numel() for value in read(tmp_path / "t.safetensors")[1].values())
    assert trainable == sum(value.numel() for value in model.parameters() if value.requires_grad)


class Hollow(Tower):
    """Sizes of a published tower, without its blocks."""

    def __init__(self, name, width, train_projection, heads):
        self.identity = f"hollow:{name}"
        draw = torch.Generator().manual_seed(width)
        projection = torch.randn(width, 512, generator=draw) * width**-0.5
        one, zero = torch.ones(width), torch.zeros(width)
        self.spec = TowerSpec(name, width, 12, 512, heads, one, zero, 1e-5, projection, train_projection)

    def embed(self, x):
        raise AssertionError("nothing runs here")

    block = pool_rows = placeholder = embed

    def state(self):
        return {"projection": self.spec.projection}

    def to(self, device, dtype=None):
        return self


def test_the_files_of_the_published_size(tmp_path):
    towers = [Hollow("image", 768, True, 12), Hollow("text", 512, False, 8)]
    model = Classifier(towers, METHODS.create("dcp"), 23)
    told = about(model, options={}, classes=23)
    head = 1024 * 23 + 23
    export(tmp_path / "t.safetensors", model, told, kind="trainable", dtype="float16")
    trainable = sum(value.numel() for value in read(tmp_path / "t.safetensors")[1].values())
    assert trainable == 5_861_632 + head  # the table of DCP 3.5, with trained queries
    assert (tmp_path / "t.safetensors").stat().st_size == pytest.approx(11.8e6, rel=0.01)
    export(tmp_path / "b.safetensors", model, told, kind="baked", dtype="float16")
    baked = sum(value.numel() for value in read(tmp_path / "b.safetensors")[1].values())
    assert baked == 1_617_664 + head  # 1.62 M (DCP 9)
    assert (tmp_path / "b.safetensors").stat().st_size == pytest.approx(3.28e6, rel=0.01)


def test_a_loaded_baked_model_can_be_exported_again_but_not_trained(doubled, tmp_path):
    model, told = doubled
    export(tmp_path / "a.safetensors", model, told, kind="baked", dtype="float64")
    loaded = load(tmp_path / "a.safetensors", toy.two_towers())
    export(tmp_path / "b.safetensors", loaded.model, loaded.about, kind="baked", dtype="float64")
    first, second = (read(tmp_path / f"{name}.safetensors")[1] for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="baked prompts cannot be trained"):
        export(tmp_path / "t.safetensors", loaded.model, loaded.about, kind="trainable")


def test_temperatures_travel_with_the_model(doubled, tmp_path):
    model, told = doubled
    given = Temperatures({3: 1.5, 1: 0.5, 2: 2.25}, 1.25)
    export(tmp_path / "m.safetensors", model, told, kind="baked", temperatures=given)
    found = load(tmp_path / "m.safetensors", toy.two_towers()).temperatures
    assert found.of([3, 1, 2]).tolist() == [1.5, 0.5, 2.25]
    assert found.pooled == 1.25
    export(tmp_path / "m.safetensors", model, told, kind="baked")
    assert load(tmp_path / "m.safetensors", toy.two_towers()).temperatures.of([3]).tolist() == [1.0]


def test_other_encoders_are_refused_by_their_hash(doubled, tmp_path):
    model, told = doubled
    export(tmp_path / "m.safetensors", model, told, kind="trainable")
    with pytest.raises(UserError, match=r"other image weights \(toy:image, sha256 .*--backbone\.weights"):
        load(tmp_path / "m.safetensors", toy.two_towers(seed=5))
    with pytest.raises(UserError, match="trained on image, text, the encoders are text, image"):
        load(tmp_path / "m.safetensors", toy.two_towers()[::-1])


def _with_header(path, **changed):
    from safetensors.torch import save

    header, tensors = read(path)
    path.write_bytes(save(tensors, {"missing_modal": json.dumps({**header, **changed})}))


def test_bad_files_are_told_in_a_line(doubled, tmp_path):
    from safetensors.torch import save

    model, told = doubled
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="no such file"):
        read(path)
    path.write_bytes(b"\x10" * 40)
    with pytest.raises(UserError, match=r"cannot be read .*export the model again"):
        read(path)
    path.write_bytes(save({"a": torch.ones(1)}))
    with pytest.raises(UserError, match="no exported model"):
        read(path)
    export(path, model, told, kind="baked")
    _with_header(path, format_version=99)
    with pytest.raises(UserError, match="format version 99 is newer"):
        read(path)
    export(path, model, told, kind="baked")
    _with_header(path, method_options={**DCP, "length": 9})  # tables of a file need no length
    assert load(path, toy.two_towers()).model.num_prefix_tokens == {"image": 6, "text": 6}
    export(path, model, told, kind="trainable")
    _with_header(path, method_options={**DCP, "length": 9})
    with pytest.raises(UserError, match="does not fit the method"):
        load(path, toy.two_towers())
    _with_header(path, method="head_only", method_options={})
    with pytest.raises(UserError, match=r"unknown tensor|lacks"):
        load(path, toy.two_towers())


def test_values_that_a_format_cannot_hold_are_refused(doubled, tmp_path):
    model, told = doubled
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"head\.weight is too large for torch\.float16; export as float32"):
        export(path, model, told, kind="baked", dtype="float16")
    assert not path.exists()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="is not finite"):
        export(path, model, told, kind="baked")
    with pytest.raises(UserError, match="expected one of trainable, baked"):
        export(path, model, told, kind="onnx")


def test_both_files_at_the_end_of_a_training(tmp_path):
    model, told = dcp(small_towers())
    moved(model)
    lines = write_exports(tmp_path / "export", model, told, batches=[small_batch()])
    assert len(lines) == 2
    assert "float32" in lines[0]
    assert "differ by at most 0.0e+00" in lines[0]
    assert "float16" in lines[1]
    assert "differ by at most" in lines[1]
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "baked.safetensors",
        "trainable.safetensors",
    ]
