"""Further invariants of DCP: gradients of batches, what a generator reaches, initial values, placeholders, files."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from missing_modal.backbones.base import TowerSpec, state_hash
from missing_modal.backbones.small import small_audio, small_image, small_patches, small_tabular, small_text
from missing_modal.calibration import Temperatures
from missing_modal.classifier import Classifier
from missing_modal.export import export, load
from missing_modal.methods import create
from missing_modal.methods.base import Context
from missing_modal.methods.dcp import DCP
from missing_modal.prompts import CorrelatedPrompts
from polymodal.errors import UserError
from torch.nn import functional as F

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

OPTIONS = {
    "dcp": {"length": 6, "depth": 2, "reduction": 3},
    "deep_prompts": {"length": 4, "depth": 2},
    "mmp_input": {"length": 4, "depth": 2},
    "mmp_attention": {"length": 4, "depth": 2},
    "maple": {"length": 4, "depth": 2},
    "msp": {"length": 4, "depth": 2, "orthogonality": 0.0},
    "zero_imputation": {"train_out": True},
}
MASKS = [3, 1, 2, 3, 2, 1, 1]


def model_of(name="dcp", seed=0, **options):
    model = Classifier(toy.two_towers(), create(name, **{**OPTIONS[name], **options}), 3, seed).double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return model


def grads_of(model, batch, weights=None):
    """Gradients of a sum of cross-entropies by name (zeros where there is none)."""
    model.zero_grad()
    losses = F.cross_entropy(model(batch), batch.labels, reduction="none")
    (losses.sum() if weights is None else losses @ weights).backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }


def part_of(inputs, at, masks):
    batch = toy.make_batch([masks[i] for i in at], inputs={key: value[at] for key, value in inputs.items()})
    batch.labels = torch.tensor(at) % 3
    return batch


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("name", list(OPTIONS))
def test_gradients_of_a_batch_are_the_sum_over_its_parts_in_any_order(name):
    model, inputs = model_of(name), toy.draw_inputs(len(MASKS))
    whole = grads_of(model, part_of(inputs, list(range(len(MASKS))), MASKS))
    assert any(value.any() for value in whole.values())
    for parts in ([[i] for i in range(len(MASKS))], [[6, 2, 0], [5, 1], [3, 4]]):
        found = [grads_of(model, part_of(inputs, at, MASKS)) for at in parts]
        for key, value in whole.items():
            torch.testing.assert_close(sum(one[key] for one in found), value, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_gradients_of_complete_rows_do_not_see_what_others_lack(name):
    model, inputs = model_of(name), toy.draw_inputs(len(MASKS))
    complete = torch.tensor([mask == 3 for mask in MASKS]).double()
    first = grads_of(model, part_of(inputs, list(range(7)), MASKS), complete)
    other = grads_of(model, part_of(inputs, list(range(7)), [3, 2, 1, 3, 3, 2, 3]), complete)
    for key, value in first.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=1e-12, msg=key)


# ------------------------------------------------------------------ what reaches what


def test_prompts_of_a_block_know_nothing_of_later_generators():
    """J = 1 is the start of every deeper recursion: V_0 and T_0 come from F_{m,0} alone."""
    deep, one = model_of(depth=3).prompter.prompts, model_of(depth=1).prompter.prompts
    one.load_state_dict({key: value for key, value in deep.state_dict().items() if key in one.state_dict()})
    before, single = deep.tables([3, 1, 2]), one.tables([3, 1, 2])
    with torch.no_grad():
        deep.generators[0][1][3].weight.add_(1.0)
    after = deep.tables([3, 1, 2])
    for m in (0, 1):
        assert torch.equal(before.deep[m][0], single.deep[m][0])
        assert torch.equal(before.deep[m][0], after.deep[m][0])
    assert not torch.equal(before.deep[0][1], after.deep[0][1])
    assert torch.equal(before.deep[1][1], after.deep[1][1]), "the other modality's step j reads step j - 1"
    assert not torch.equal(before.deep[1][2], after.deep[1][2]), "and step j + 1 reads both"


def test_common_and_dynamic_rows_do_not_enter_the_recursion():
    prompts = model_of(depth=3).prompter.prompts
    before = prompts.tables([3, 1, 2])
    with torch.no_grad():
        prompts.common.value.add_(1.0)
        prompts.queries[0].value.add_(1.0)
    after = prompts.tables([3, 1, 2])
    for m in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(before.deep[m], after.deep[m], strict=True))
        assert not torch.equal(before.common[m], after.common[m])
    assert not torch.equal(before.probe[0], after.probe[0])
    assert torch.equal(before.probe[1], after.probe[1])


def test_each_pattern_trains_its_own_common_prompt_and_queries():
    model = model_of()
    for mask, entry in ((3, 0), (1, 1), (2, 2)):
        grads = grads_of(model, toy.make_batch([mask, mask]))
        for name in ("common", "queries.0", "queries.1"):
            used = grads[f"prompter.prompts.{name}.value"].flatten(1).abs().sum(1) > 0
            lacks = name == f"queries.{2 - mask}" if mask != 3 else False  # the tower of a missing one does not run
            assert used.tolist() == [place == entry and not lacks for place in range(3)], (mask, name)


def test_a_text_row_sees_every_prompt_and_a_prompt_only_those_before():
    """The causal mask is over the whole sequence (DCP 3.4)."""
    prompts = model_of(depth=1).prompter.prompts
    tower = toy.two_towers()[1]
    ids = torch.from_numpy(toy.draw_inputs(1)["text"])
    rows = prompts.enter(1, tower.embed(ids), torch.tensor([0]), prompts.tables([3]))
    h = torch.cat([rows, tower.embed(ids)], dim=1).detach().requires_grad_()
    out = tower.block(0, h, tower.mask(h.shape[1], h))
    for row in (0, 3, 5, 6, h.shape[1] - 1):
        (grad,) = torch.autograd.grad(out[0, row].square().sum(), h, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [at <= row for at in range(h.shape[1])]


# ------------------------------------------------------------------ initial values (DCP 3.2)


def test_initial_values():
    model = Classifier(
        [small_patches(width=96, depth=2, heads=2), small_text(30, 5, width=64, depth=2, heads=2)],
        create("dcp", length=36, depth=2, reduction=4),
        23,
    )
    state = model.state_dict()

    def normal(name, std=0.02):
        value = state[name]
        assert value.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel()), name

    def uniform(name, bound):
        value = state[name].abs()
        assert 0.9 * bound < value.max().item() <= bound, name
        assert value.mean().item() == pytest.approx(bound / 2, rel=0.2), name

    here = "prompter.prompts."
    for name in ("static.0", "static.1", "common.value", "queries.0.value", "queries.1.value"):
        normal(here + name)
    normal("head.weight")
    assert not state["head.bias"].any()
    for m, width in enumerate((96, 64)):
        for j in (0, 1):
            part = f"{here}generators.{m}.{j}"
            assert torch.equal(state[f"{part}.0.weight"], torch.ones(160))
            assert not state[f"{part}.0.bias"].any()
            assert model.prompter.prompts.generators[m][j][0].eps == 1e-5
            for kind in ("weight", "bias"):
                uniform(f"{part}.1.{kind}", 160**-0.5)
                uniform(f"{part}.3.{kind}", 40**-0.5)
            assert state[f"{part}.1.weight"].shape == (40, 160)
        uniform(f"{here}common_maps.{m}.0.weight", 64**-0.5)
        uniform(f"{here}common_maps.{m}.2.weight", 16**-0.5)
        uniform(f"{here}attention.{m}.in_proj_weight", math.sqrt(6 / (4 * width)))
        uniform(f"{here}attention.{m}.out_proj.weight", width**-0.5)
        assert not state[f"{here}attention.{m}.in_proj_bias"].any()
        assert not state[f"{here}attention.{m}.out_proj.bias"].any()


@pytest.mark.parametrize(("name", "options"), [("mmp_input", {}), ("mmp_attention", {}), ("msp", {}), ("maple", {})])
def test_initial_values_of_the_rivals(name, options):
    towers = [small_patches(width=32, depth=2, heads=2), small_text(30, 5, width=32, depth=2, heads=2)]
    model = Classifier(towers, create(name, length=36, depth=2, **options), 3)
    free = [value for key, value in model.prompter.named_parameters() if key.startswith("prompts")]
    assert free
    for value in free:
        assert value.std().item() == pytest.approx(0.02, rel=0.1)


def test_official_copies_are_equal_in_everything_and_modalities_are_not():
    prompts = CorrelatedPrompts((8, 8), 6, 3, reduction=3, init="official")
    for steps in prompts.generators:
        first, *others = [step.state_dict() for step in steps]
        assert len(others) == 2
        for other in others:
            assert all(torch.equal(value, other[key]) for key, value in first.items())
    assert not torch.equal(prompts.generators[0][0][1].weight, prompts.generators[1][0][1].weight)
    with torch.no_grad():
        prompts.generators[0][0][1].weight.add_(1.0)
    assert not torch.equal(prompts.generators[0][0][1].weight, prompts.generators[0][1][1].weight), "copies, not one"


# ------------------------------------------------------------------ what is trained (DCP 3.5)


def test_what_is_trained_of_the_last_layers():
    def trained(**options):
        names = {key for key, value in model_of(**options).named_parameters() if value.requires_grad}
        return {key.removeprefix("prompter.outputs.") for key in names if ".outputs." in key}

    norms = {f"{m}.norm_{kind}" for m in (0, 1) for kind in ("weight", "bias")}
    assert trained() == norms | {"0.projection"}, "the text projection stays frozen"
    assert trained(train_out=False) == set()


def test_share_of_the_published_model():
    """5,815,552 of 149.6 M parameters are less than 4 % (DCP 3.5)."""
    specs = tuple(
        TowerSpec(name, width, 12, 512, heads, torch.ones(width), torch.zeros(width), 1e-5, torch.zeros(width, 512), t)
        for name, width, heads, t in (("image", 768, 12, True), ("text", 512, 8, False))
    )
    prompter = DCP(dynamic_queries="frozen").build(Context(specs, (3, 1, 2)))
    count = sum(value.numel() for value in prompter.parameters() if value.requires_grad)
    assert round(100 * count / 149.6e6, 2) == 3.89
    outputs = [sum(v.numel() for v in part.parameters() if v.requires_grad) for part in prompter.outputs]
    assert outputs == [2 * 768 + 393_216, 2 * 512]


# ------------------------------------------------------------------ placeholders (DCP 4.2)


def test_placeholders():
    image, patches = small_image(8, 4, width=4, depth=1), small_patches(3, 2, width=4, depth=1)
    assert torch.equal(image.placeholder(2), torch.ones(2, 3, 8, 8))
    assert torch.equal(patches.placeholder(1), torch.ones(1, 3, 2))
    assert small_text(12, 5, width=4, depth=1).placeholder(2).tolist() == [[10, 11, 0, 0, 0]] * 2
    audio, table = small_audio(8, 12, (4, 4), width=4, depth=1), small_tabular(5, width=4, depth=1)
    assert torch.equal(audio.placeholder(1), torch.zeros(1, 8, 12))
    assert torch.equal(table.placeholder(2), torch.zeros(2, 5))


# ------------------------------------------------------------------ files (DCP 9)

MAKE = "small_patches(width=8, depth=2, heads=2, features=4), small_text(26, 5, width=6, depth=2, heads=2, features=4)"


def small_towers(seed=0):
    return (
        small_patches(width=8, depth=2, heads=2, features=4, seed=seed),
        small_text(26, 5, width=6, depth=2, heads=2, features=4, seed=seed),
    )


def small_model(precise=False):
    towers = small_towers()
    about = {
        "method": "dcp",
        "method_options": OPTIONS["dcp"],
        "modalities": ["image", "text"],
        "task": "multiclass",
        "class_names": ["a", "b", "c"],
        "backbone": {t.spec.name: {"identity": t.identity, "sha256": state_hash(t)} for t in towers},
    }
    if precise:
        towers = tuple(tower.to("cpu", torch.float64) for tower in towers)
    model = Classifier(towers, create("dcp", **OPTIONS["dcp"]), 3)
    model = model.double() if precise else model
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.2 * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype)
    return model.eval(), about


def small_batch():
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 24, (6, 5), generator=draw)
    texts[:, -1] = 25
    batch = toy.make_batch([3] * 6, inputs=toy.draw_inputs(6))
    batch.inputs = {"image": torch.randn(6, 8, 4, generator=draw), "text": texts}
    return batch.restrict([3, 1, 2, 3, 2, 1], ("image", "text"))


def test_baked_maps_and_probes_are_rounded_once(tmp_path):
    """Products of float32 weights are taken in float64: what is stored is the nearest float32 to the exact value."""
    model, about = small_model()
    shown = export(tmp_path / "b.safetensors", model, about, kind="baked")
    held = {name: value.double() for name, value in model.prompter.prompts.state_dict().items()}
    for m, width in enumerate((8, 6)):
        weight, bias = held[f"attention.{m}.in_proj_weight"], held[f"attention.{m}.in_proj_bias"]
        out = held[f"attention.{m}.out_proj.weight"]
        wanted = {
            "matrix": out @ weight[2 * width :],
            "shift": out @ bias[2 * width :] + held[f"attention.{m}.out_proj.bias"],
            "probe": (held[f"queries.{m}.value"] @ weight[:width].T + bias[:width])
            @ weight[width : 2 * width]
            / math.sqrt(width),
        }
        for name, value in wanted.items():
            assert torch.equal(shown.prompter.prompts.get_buffer(f"{name}_{m}"), value.float()), name


def test_a_new_process_gives_the_same_bits_in_every_format_and_knows_the_temperatures(tmp_path):
    batch, given = small_batch(), Temperatures({3: 1.5, 1: 0.75, 2: 2.25}, 1.25)
    torch.save({"batch": vars(batch)}, tmp_path / "batch.pt")
    names = []
    for kind in ("trainable", "baked"):
        for dtype in ("float32", "bfloat16", "float64"):
            names.append(f"{kind}-{dtype}")
            model, about = small_model(precise=dtype == "float64")
            path = tmp_path / f"{names[-1]}.safetensors"
            shown = export(path, model, about, kind=kind, dtype=dtype, temperatures=given)
            torch.save(shown(batch).detach(), tmp_path / f"{names[-1]}.pt")
    code = f"""
import sys, torch
from pathlib import Path
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.batch import Batch
from missing_modal.export import load
folder = Path(sys.argv[1])
batch = Batch(**torch.load(folder / "batch.pt", weights_only=True)["batch"])
for name in sys.argv[2:]:
    loaded = load(folder / f"{{name}}.safetensors", ({MAKE}))
    same = torch.equal(loaded.model(batch).detach(), torch.load(folder / f"{{name}}.pt", weights_only=True))
    print(name, same, loaded.temperatures.of([3, 1, 2]).tolist(), loaded.temperatures.pooled)
"""
    command = [sys.executable, "-c", code, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} True [1.5, 0.75, 2.25] 1.25" for name in names]


@pytest.mark.parametrize("kind", ["trainable", "baked"])
def test_another_backbone_is_refused_by_its_hash_whichever_modality_it_is_of(kind, tmp_path):
    model, about = small_model()
    path = tmp_path / "m.safetensors"
    export(path, model, about, kind=kind)
    right, wrong = small_towers(), small_towers(seed=1)
    for towers, name in (((wrong[0], right[1]), "image"), ((right[0], wrong[1]), "text")):
        with pytest.raises(UserError, match=f"belongs to other {name} weights"):
            load(path, towers)
    nearly = right[1].replaced({k: v + 1e-7 * (k == "position") for k, v in right[1].state().items()})
    with pytest.raises(UserError, match="belongs to other text weights"):
        load(path, (right[0], nearly))
    assert torch.equal(load(path, right).model(small_batch()), load(path, small_towers()).model(small_batch()))
