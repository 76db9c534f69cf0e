"""EIR: what it is without its parts, which instance goes where, and what each switch changes."""

from __future__ import annotations

import pytest
import torch
from css.data.batch import Batch
from css.data.shapes import Shapes
from css.memory import make_memory
from css.memory.bank import InstanceBank
from css.methods import METHODS
from css.methods.base import StepContext
from css.methods.eir import EIR, PastePlan
from css.models.build import build_network
from css.ops.labels import one_hot
from css.ops.paste import cell_side
from css.settings import NetworkConfig
from css.task import Task
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

TASK = Task("3-1", 4)
SIZE = 48


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Four instances of each of three classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        reader = Shapes(images=(60, 2, 2), classes=4)
        common = {"reader": reader, "task": TASK, "fingerprint": reader.fingerprint(), "step": 1}
        common |= {"setting": "overlap", "previous": None, "seed": 1, "split_seed": 0}
        folder = tmp_path_factory.mktemp("memory")
        full = make_memory("instances", folder / "full", budget=12, **common)
        empty = make_memory("instances", folder / "empty", budget=0, **common)
    assert {slot: len(found) for slot, found in full.slots.items()} == {1: 4, 2: 4, 3: 4}
    assert empty.entries == []
    return full, empty


@pytest.fixture
def bank(memory):
    return InstanceBank(memory[0])


def context(bank=None, start=3.0):
    """Step 1 of task 3-1; the old network sees something of each class somewhere."""
    torch.manual_seed(0)
    net = build_network(NetworkConfig(name="tiny", width=4), [3], method=METHODS.create("eir"))
    with torch.no_grad():
        for head in net.heads:
            head.weight.normal_(0, start)
    old = net.frozen_copy()
    net.add_head(1)
    ctx = StepContext(1, net, 3, 1, old, bank)
    METHODS.create("eir").init_new_head(ctx)
    net.freeze_norm()
    net.train()
    return ctx


def batch_of(count=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    labels[0, 5:30, 8:25] = 4
    labels[1, 20:40, 20:44] = 4
    labels[:, :2] = 255
    images = torch.randn(count, 3, SIZE, SIZE, generator=draw)
    return Batch([str(i) for i in range(count)], images, labels, None, torch.zeros(count, dtype=torch.bool))


def outcome(method, ctx, batch, seed=3):
    """Loss, its terms, and all gradients."""
    loss, terms = method.loss(ctx, batch, torch.Generator().manual_seed(seed))
    ctx.net.zero_grad()
    loss.backward()
    return loss.detach(), terms, [p.grad.clone() for p in ctx.net.parameters() if p.grad is not None]


def same(left, right):
    assert torch.equal(left[0], right[0])
    assert len(left[2]) == len(right[2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(left[2], right[2], strict=True))


# ------------------------------------------------------------------ without its parts

NO_DISTILLATION = [{"w_kd": 0.0}, {"distillation": "none"}]
NO_PASTING = [{"paste": False}, {"paste": False, "instance_images": False}, {}]


@pytest.mark.parametrize("distillation", NO_DISTILLATION, ids=str)
@pytest.mark.parametrize("pasting", NO_PASTING, ids=str)
@pytest.mark.parametrize(("threshold", "rival"), [(1.01, "ft"), (0.7, "pl"), (0.3, "pl")])
def test_without_memory_and_distillation_it_is_its_rival_to_the_bit(memory, distillation, pasting, threshold, rival):
    """Nothing to paste: pasting is off, or the memory is empty."""
    batch = batch_of()
    options = {} if rival == "ft" else {"threshold": threshold}
    expected = outcome(METHODS.create(rival, **options), context(), batch)
    bank = None if pasting else InstanceBank(memory[1])
    found = outcome(EIR(threshold=threshold, **distillation, **pasting), context(bank), batch)
    same(expected, found)
    assert found[1]["pasted"] == 0
    assert "kd" not in found[1]


def test_each_part_changes_the_loss(bank):
    batch = batch_of()
    plain = {"threshold": 1.01, "w_kd": 0.0, "paste": False}
    losses = {
        name: outcome(EIR(**{**plain, **part}), context(bank), batch)[0].item()
        for name, part in {
            "nothing": {},
            "pseudo-labels": {"threshold": 0.7},
            "pasting": {"paste": True},
            "two_region": {"w_kd": 5.0},
            "new_only": {"w_kd": 5.0, "distillation": "new_only"},
            "mib": {"w_kd": 5.0, "distillation": "mib"},
        }.items()
    }
    assert len({round(value, 6) for value in losses.values()}) == len(losses), losses


def test_the_loss_is_the_weighted_sum_of_its_terms(bank):
    loss, terms, _ = outcome(EIR(w_bce=0.5, w_kd=3.0), context(bank), batch_of())
    torch.testing.assert_close(loss, 0.5 * terms["bce"] + 3.0 * terms["kd"])
    assert 2 <= terms["pasted"] <= 3, "pastes a picture"


def test_step_0_is_plain_training(bank):
    ctx = context(bank)
    ctx = StepContext(0, ctx.net, 0, 4)
    same(outcome(METHODS.create("ft"), ctx, batch_of()), outcome(EIR(), ctx, batch_of()))


def test_what_a_configuration_needs():
    assert (EIR().uses_memory(), EIR().uses_bank(), EIR().replays()) == (True, True, True)
    alone = EIR(paste=False)
    assert (alone.uses_memory(), alone.uses_bank(), alone.replays()) == (True, False, True)
    alone = EIR(instance_images=False)
    assert (alone.uses_memory(), alone.uses_bank(), alone.replays()) == (True, True, False)
    none = EIR(paste=False, instance_images=False)
    assert (none.uses_memory(), none.uses_bank(), none.replays()) == (False, False, False)


@pytest.mark.parametrize(
    "options",
    [
        {"distillation": "old"}, {"fill_position": "last"}, {"cell_share": 0.0}, {"cell_share": 1.1}, {"lam": -0.1},
        {"lam": 1.1}, {"max_pastes": 0}, {"init": "ones"},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        EIR(**options)


def test_published_cells():
    share = EIR().cell_share
    assert [int(side * share) for side in (512, 256, 64)] == [250, 125, 31]
    assert all(int(side * share) == cell_side(side) for side in range(8, 1025))


# ------------------------------------------------------------------ the plan

SEEN = st.lists(st.lists(st.integers(1, 6), unique=True, max_size=6).map(sorted), max_size=5)
SLOTS = st.sets(st.integers(1, 6)).map(lambda known: {c: torch.tensor([c]) for c in known})


def columns(plan, picture):
    places = [i for i, number in enumerate(plan.pictures) if number == picture]
    return [[column[i] for i in places] for column in (plan.classes, plan.cells, plan.rounds)]


@settings(max_examples=200, deadline=None)
@given(SEEN, SLOTS, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["next", "first"]), st.integers(0, 99))
def test_plan(seen, slots, most, cells, fill, seed):
    method = EIR(max_pastes=most, fill_position=fill)
    plan = method.plan(seen, slots, cells, torch.Generator().manual_seed(seed))
    assert len({len(column) for column in vars(plan).values()}) == 1
    assert plan == method.plan(seen, slots, cells, torch.Generator().manual_seed(seed))
    assert plan.pictures == sorted(plan.pictures)
    limit = min(most, cells)
    for picture, there in enumerate(seen):
        classes, where, rounds = columns(plan, picture)
        known = [c for c in there if c in slots]
        first = known[:limit]
        assert classes[: len(first)] == first, "what is seen comes first, in order"
        assert where[: len(first)] == list(range(len(first))), "each in a cell of its own, the best first"
        assert set(classes) <= set(slots)
        assert len(classes) <= limit
        fills = classes[len(first) :]
        if len(first) >= 2 or not slots:
            assert fills == []
        else:
            assert len(classes) == limit, "filled up to the most"
        if fill == "next":
            assert where == list(range(len(classes)))
            assert set(rounds) <= {0}, "no two pastes meet: all are done at once"
        else:
            assert where[len(first) :] == [0] * len(fills)
            assert rounds == list(range(len(classes))), "pastes into one cell follow each other"


def test_every_old_class_is_drawn_to_fill_up_equally_often():
    slots = {c: torch.tensor([c]) for c in (1, 2, 5)}
    plan = EIR().plan([[]] * 400, slots, 4, torch.Generator().manual_seed(0))
    counts = [plan.classes.count(c) for c in slots]
    assert sum(counts) == 1200
    assert all(abs(count - 400) < 60 for count in counts), counts  # six deviations are 98


def test_one_seen_class_is_followed_by_two_others_two_are_enough():
    slots = {c: torch.tensor([c]) for c in (1, 2, 3)}
    plan = EIR().plan([[2], [1, 3], [1, 2, 3], []], slots, 4, torch.Generator().manual_seed(1))
    assert [plan.pictures.count(picture) for picture in range(4)] == [3, 2, 3, 3]
    assert plan.classes[0] == 2
    assert plan.classes[3:8] == [1, 3, 1, 2, 3]


def test_seen_are_classes_that_the_truth_does_not_have():
    labels = torch.zeros(3, 4, 4, dtype=torch.long)
    truth = labels.clone()
    labels[0, 0], labels[0, 1], labels[0, 2], labels[0, 3] = 1, 3, 255, 4
    labels[1, 0, 0], truth[1, 0, 0] = 2, 2  # a replayed picture: annotated, so not seen by the old network
    labels[2, 0, 0], labels[2, 0, 1], truth[2, 3, 3] = 2, 1, 1
    truth[0, 3] = 4
    assert EIR().seen(labels, truth, 3) == [[1, 3], [], [2]]
    assert EIR(class_combination=False).seen(labels, truth, 3) == [[], [], []]


# ------------------------------------------------------------------ mixing


def mixed(bank, seed=5, **options):
    """Mixed pictures and targets, the number of pastes, and what went in."""
    method, batch = EIR(**options), batch_of()
    labels = batch.labels.clone()
    labels[2, 30:40, 3:20] = 2  # seen by the old network
    target = one_hot(labels, 5)
    ctx = context(bank)
    images, soft, count = method.mixed(ctx, batch, labels, target.clone(), torch.Generator().manual_seed(seed))
    return images, soft, count, batch, target


def test_pixels_off_the_instances_stay_and_rows_sum_to_one(bank):
    images, soft, count, batch, target = mixed(bank)
    assert torch.equal(batch.images, batch_of().images), "the batch is left alone"
    moved = (images != batch.images).any(1)
    assert 0 < moved.float().mean() < 0.6
    assert torch.equal(soft.permute(0, 2, 3, 1)[~moved], target.permute(0, 2, 3, 1)[~moved])
    rows = soft.sum(1)
    valid = batch.labels != 255
    torch.testing.assert_close(rows[valid], torch.ones_like(rows[valid]))
    assert soft.min() >= 0
    assert count == 9


def test_opacity_0_changes_nothing_and_1_replaces(bank):
    images, soft, _, batch, target = mixed(bank, lam=0.0)
    assert torch.equal(images, batch.images)
    assert torch.equal(soft, target)
    images, soft, _, batch, target = mixed(bank, lam=1.0)
    assert set(soft.unique().tolist()) == {0.0, 1.0}
    moved = (images != batch.images).any(1)
    assert set(soft.argmax(1)[moved].tolist()) <= {1, 2, 3}, "old classes stand where something was pasted"


def test_the_seen_class_is_pasted_where_most_is_background(bank):
    """Picture 2 shows class 2 in its lower left; its copy goes to the first of the free cells, the upper left."""
    _, soft, _, _, target = mixed(bank, max_pastes=1, lam=1.0, augment=False)
    where = (soft[2, 2] > target[2, 2]).nonzero()
    assert len(where) > 30
    cell = cell_side(SIZE)
    assert where.max() < cell


def test_small_cells_and_no_enlargement_cover_less(bank):
    area = {}
    for name, options in {"all": {}, "small": {"cell_share": 0.25}, "true size": {"enlarge": False}}.items():
        images, _, _, batch, _ = mixed(bank, augment=False, **options)
        area[name] = (images != batch.images).any(1).float().mean().item()
    assert 0 < area["small"] < 0.6 * area["all"]
    assert 0 < area["true size"] <= area["all"]


def test_draws_are_a_function_of_the_generator(bank):
    one, again, other = mixed(bank, seed=1), mixed(bank, seed=1), mixed(bank, seed=2)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def differ(bank, **options):
    """Whether seeds give other pictures, where everything but one switch is fixed: one seen class, one paste."""
    fixed = {"lam": 0.5, "augment": False, "max_pastes": 1, "instance_selection": False}
    results = [mixed(bank, seed=seed, **{**fixed, **options})[0][2] for seed in range(6)]
    return any(not torch.equal(results[0], other) for other in results[1:])


def test_switches_decide_what_is_drawn(bank):
    assert not differ(bank)
    assert differ(bank, lam=None)
    assert differ(bank, augment=True)
    assert differ(bank, instance_selection=True)
    assert differ(bank, position_selection=False)
    assert differ(bank, class_combination=False)


def test_without_selection_it_is_always_the_first_entry(bank):
    method = EIR(instance_selection=False)
    assert method.entries(bank, [1, 3, 3], torch.Generator()).tolist() == [
        int(bank.slots[c][0]) for c in (1, 3, 3)
    ]  # fmt: skip
    drawn = EIR().entries(bank, [2] * 200, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(bank.slots[2].tolist())


def test_without_augmentation_it_is_the_whole_picture(bank):
    boxes, flips = EIR(augment=False).crops(bank, torch.tensor([0, 5]), torch.Generator())
    assert boxes.tolist() == [[0, 0, 64, 64], [0, 0, 64, 64]]
    assert not flips.any()
    boxes, flips = EIR().crops(bank, torch.arange(12).repeat(10), torch.Generator().manual_seed(0))
    assert len(set(map(tuple, boxes.tolist()))) > 50
    assert 0.3 < flips.float().mean() < 0.7


def test_fills_of_the_released_code_lie_over_each_other(bank):
    """``first`` pastes all fills into the best cell; ``next`` spreads them."""
    spread = mixed(bank, lam=1.0, augment=False)
    piled = mixed(bank, lam=1.0, augment=False, fill_position="first")
    covered = [(m[0] != m[3].images).any(1)[1] for m in (spread, piled)]  # picture 1 sees nothing
    assert covered[1].sum() < covered[0].sum()
    cell = cell_side(SIZE)
    assert covered[1].nonzero().max() < cell, "all in the upper left"


def test_an_empty_plan_is_an_empty_plan():
    assert EIR().plan([[1], []], {}, 4, torch.Generator()) == PastePlan()
    assert EIR().plan([], {1: torch.tensor([0])}, 4, torch.Generator()) == PastePlan()


def test_distillation_looks_at_the_truth_before_pasting(bank):
    """Pasted pixels are no region of new classes: the ground truth decides, not the mixed target."""
    ctx, batch = context(bank), batch_of()
    batch.labels[:] = 0
    none = outcome(EIR(distillation="new_only", w_kd=5.0), ctx, batch)
    assert none[1]["kd"] == 0, "there is no annotated new class"
    assert none[1]["pasted"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite(bank, dtype):
    ctx = context(bank, start=30.0)
    with torch.autocast("cpu", dtype=dtype):
        loss, terms = EIR().loss(ctx, batch_of(), torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in ctx.net.parameters() if p.grad is not None)
