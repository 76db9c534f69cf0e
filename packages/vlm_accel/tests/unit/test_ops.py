"""What the merge rules promise beyond their formulas: identity, means, mass, dtypes, batches, gradients, no sync."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel import ops

FEW = settings(max_examples=20, deadline=None)


def _scored(rule, **options):
    return lambda x, scores, keep, **more: rule(x, scores, keep, **options, **more)


def _plain(rule, **options):
    return lambda x, scores, keep, **more: rule(x, keep, **options, **more)


RULES = {
    "rank1": _scored(ops.rank1),
    "rank1 uniform": _scored(ops.rank1, weights="uniform"),
    "recycle": _scored(ops.recycle),
    "recycle all": _scored(ops.recycle, pc_ratio=1.0),
    "assign": _scored(ops.assign),
    "drop": _scored(ops.drop),
    "shift": _plain(ops.shift),
    "stride": _plain(ops.stride),
    "pool": _plain(ops.pool),
    "tome": lambda x, scores, keep, **more: ops.tome(x, x[:, :, None], keep, **more),
}
#: rules whose sizes count every source token
COUNTING = ("rank1", "rank1 uniform", "assign", "shift", "pool", "tome")
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def world(seed, n=17, s=3, d=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(s, n, d, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.rand(s, n, generator=draw, dtype=torch.float64)


@each_rule
def test_keeping_all_is_the_same_tensor(rule):
    x, scores = world(0)
    found = rule(x, scores, 17)
    assert found.x is x
    assert found.kept[1].tolist() == found.assign[1].tolist() == list(range(17))


@each_rule
@FEW
@given(seed=st.integers(0, 10_000), n=st.integers(2, 30), data=st.data())
def test_means_of_sources(rule, seed, n, data):
    """Counts, ascending rows, valid owners, weights of sum 1 that give the tokens; within the range of the inputs."""
    keep = data.draw(st.integers(1, n - 1))
    x, scores = world(seed, n)
    before = x.clone()
    found = rule(x, scores, keep)
    assert torch.equal(x, before)
    assert found.x.shape == (3, keep, 4)
    assert found.x.dtype == x.dtype
    assert (found.kept.diff(dim=1) > 0).all()
    assert found.kept.min() >= 0
    assert found.kept.max() < n
    assert found.assign.shape == (3, n)
    assert found.assign.min() >= -1
    assert found.assign.max() < keep
    own = found.assign.gather(1, found.kept)
    assert torch.equal(own, torch.arange(keep).expand(3, keep))
    if found.weight is not None:
        torch.testing.assert_close(found.weight.sum(-1), torch.ones(3, keep, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.weight @ x, found.x, rtol=0, atol=1e-12)
        assert (found.weight >= 0).all()
    else:
        assert torch.equal(found.x, x.gather(1, found.kept[..., None].expand(-1, -1, 4)))
    assert (found.x >= x.amin(1, keepdim=True) - 1e-12).all()
    assert (found.x <= x.amax(1, keepdim=True) + 1e-12).all()
    untraced = rule(x, scores, keep, trace=False)
    assert torch.equal(untraced.x, found.x)
    assert torch.equal(untraced.kept, found.kept)
    assert untraced.weight is None
    owners_only = rule(x, scores, keep, trace="assign")
    assert torch.equal(owners_only.x, found.x)
    assert torch.equal(owners_only.assign, found.assign)
    assert owners_only.weight is None


@each_rule
def test_constant_tokens_stay_constant(rule):
    x = torch.tensor([0.3, -2.0, 7.0], dtype=torch.float64).expand(2, 15, 3)
    found = rule(x, torch.rand(2, 15, dtype=torch.float64), 6)
    torch.testing.assert_close(found.x, x[:, :6], rtol=0, atol=1e-12)


@each_rule
def test_a_batch_is_its_samples(rule):
    x, scores = world(3, s=4)
    whole = rule(x, scores, 7)
    for s in range(4):
        alone = rule(x[s : s + 1], scores[s : s + 1], 7)
        torch.testing.assert_close(whole.x[s : s + 1], alone.x, rtol=0, atol=1e-12)
        assert torch.equal(whole.kept[s], alone.kept[0])
        assert torch.equal(whole.assign[s], alone.assign[0])


@each_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_summed_in_float32(rule, dtype):
    x, scores = world(4, dtype=dtype)
    found = rule(x, scores.float(), 5)
    assert found.x.dtype == dtype
    exact = rule(x.float(), scores.float(), 5)
    assert torch.equal(found.kept, exact.kept)
    torch.testing.assert_close(found.x, exact.x.to(dtype), rtol=0, atol=0)


@each_rule
def test_large_bfloat16_activations_do_not_overflow(rule):
    x = torch.full((1, 12, 4), 1e9, dtype=torch.bfloat16)  # float16 ends at 65504
    assert torch.isfinite(rule(x, torch.rand(1, 12), 5).x.float()).all()


@each_rule
def test_values_are_never_looked_at(rule):
    """Meta tensors hold no values: any look at one (a host synchronisation on a GPU) raises."""
    x = torch.empty(2, 20, 4, device="meta")
    found = rule(x, torch.empty(2, 20, device="meta"), 7)
    assert found.x.shape == (2, 7, 4)
    assert found.x.is_meta


@each_rule
def test_values_are_differentiable(rule):
    x, scores = world(5)
    x.requires_grad_()
    found = rule(x, scores, 6)
    (gradient,) = torch.autograd.grad(found.x.sum(), x)
    matrix = found.weight if found.weight is not None else torch.nn.functional.one_hot(found.kept, 17).double()
    if rule is RULES["recycle"] or rule is RULES["recycle all"]:
        assert torch.isfinite(gradient).all()  # its weights depend on x as well
    else:
        torch.testing.assert_close(gradient, matrix.sum(1)[..., None].expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", COUNTING)
@FEW
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 16))
def test_sizes_are_conserved(name, seed, keep):
    x, scores = world(seed)
    sizes = torch.randint(1, 6, (3, 17), generator=torch.Generator().manual_seed(seed)).double()
    found = RULES[name](x, scores, keep, sizes=sizes)
    torch.testing.assert_close(found.sizes.sum(1), sizes.sum(1), rtol=0, atol=1e-12)
    assert (found.sizes >= 1).all()
    owned = torch.zeros(3, keep, dtype=torch.float64).scatter_add_(1, found.assign, sizes)
    torch.testing.assert_close(found.sizes, owned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["assign", "pool", "tome"])
def test_mass_is_conserved(name):
    """Sum of size * x and of size, over two steps."""
    x, scores = world(6)
    first = RULES[name](x, scores, 11)
    second = RULES[name](first.x, scores[:, :11], 4, sizes=first.sizes)
    for found in (first, second):
        torch.testing.assert_close((found.sizes[..., None] * found.x).sum(1), x.sum(1), rtol=0, atol=1e-12)
        assert found.sizes.sum(1).tolist() == [17.0] * 3


@FEW
@given(st.integers(0, 10_000), st.integers(2, 40), st.data())
def test_structure_of_recycle(seed, n, data):
    """Exactly m - c rows are one-hot, the others have one half on themselves and min(5, r) sources."""
    keep = data.draw(st.integers(1, n - 1))
    x, scores = world(seed, n, s=1)
    weight = ops.recycle(x, scores, keep).weight[0]
    takers = max(1, round(0.05 * keep))
    own = weight.gather(1, ops.recycle(x, scores, keep).kept[0][:, None])[:, 0]
    assert int((own == 1).sum()) == keep - takers
    assert int((own == 0.5).sum()) == takers
    assert set((weight[own == 0.5] > 0).sum(1).tolist()) <= set(range(2, 2 + min(5, n - keep)))


def test_an_underflowed_share_still_has_an_owner():
    x = torch.tensor([[[100.0], [100.0], [1.0]]])
    found = ops.recycle(x, torch.tensor([[0.9, 0.1, 0.0]]), 1)
    assert found.weight[0, 0, 2] == 0
    assert found.assign.tolist() == [[0, 0, 0]]


@FEW
@given(st.integers(0, 10_000))
def test_order_of_tokens_is_only_their_position(seed):
    """Permuting tokens with their scores permutes the survivors (rules that rank)."""
    x, scores = world(seed)
    shuffle = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    for rule in (ops.rank1, ops.recycle, ops.assign, ops.drop):
        found, moved = rule(x, scores, 6), rule(x[:, shuffle], scores[:, shuffle], 6)
        places = shuffle[moved.kept]
        order = places.argsort(1)
        assert torch.equal(places.gather(1, order), found.kept)
        restored = moved.x.gather(1, order[..., None].expand(-1, -1, 4))
        torch.testing.assert_close(restored, found.x, rtol=0, atol=1e-12)


def test_one_survivor_of_assign_is_the_mean_by_size():
    x, scores = world(7)
    sizes = torch.arange(1.0, 18.0, dtype=torch.float64).expand(3, 17)
    mean = (sizes[..., None] * x).sum(1, keepdim=True) / sizes.sum()  # 3 equal rows
    torch.testing.assert_close(ops.assign(x, scores, 1, sizes).x, mean * 3, rtol=0, atol=1e-12)


def test_pairs_of_equal_tokens_merge_into_themselves():
    half = torch.randn(2, 8, 5, dtype=torch.float64)
    x = torch.cat([half, half], 1)
    scores = torch.cat([torch.ones(2, 8), torch.zeros(2, 8)], 1)
    found = ops.assign(x, scores, 8)
    torch.testing.assert_close(found.x, half, rtol=0, atol=1e-12)
    assert found.assign[0].tolist() == [*range(8), *range(8)]
    assert found.sizes.tolist() == [[2.0] * 8] * 2


def test_the_nearest_of_equals_is_the_lowest():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]])
    found = ops.assign(x, torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.0]]), 3)
    assert found.assign.tolist() == [[0, 1, 2, 0, 0]]


def test_zero_scores_are_no_division_by_zero():
    x, _ = world(8)
    none = torch.zeros(3, 17, dtype=torch.float64)
    for rule in (ops.rank1, ops.assign):
        found = rule(x, none, 5, weights="score")
        assert torch.isfinite(found.x).all()
        torch.testing.assert_close(found.weight @ x, found.x, rtol=0, atol=1e-12)


def test_a_matching_merges_at_most_half_and_is_repeated():
    x, _ = world(9, n=16)
    assert ops.tome(x, x[:, :, None], 8).sizes.max() <= 16
    deep = ops.tome(x, x[:, :, None], 2)
    assert deep.x.shape[1] == 2
    assert deep.sizes.sum(1).tolist() == [16.0] * 3


def test_the_first_patch_is_odd_behind_a_class_row():
    x = torch.eye(3, dtype=torch.float64)[None]
    x[0, 1] = x[0, 0] * 2  # rows 0 and 1 are alike
    assert ops.tome(x, x[:, :, None], 2, prefix=0).kept.tolist() == [[1, 2]]  # 0 goes into 1
    assert ops.tome(x, x[:, :, None], 2, prefix=1).kept.tolist() == [[0, 2]]  # 1 goes into 0


def test_draws_look_uniform_and_depend_on_the_sample_only():
    draws = ops.uniform(0, "vision", 3, None, 50, 400)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert np.abs(np.corrcoef(draws.numpy())[np.triu_indices(50, 1)]).mean() < 0.1
    assert torch.equal(ops.uniform(0, "vision", 3, torch.tensor([7]), 1, 400)[0], draws[7])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: ops.drop(x, s, 0), "keep=0"),
        (lambda x, s: ops.assign(x, s, 18), "from 1 to 17"),
        (lambda x, s: ops.recycle(x, s, 2.0), "keep=2.0"),
        (lambda x, s: ops.pool(x, True), "keep=True"),
        (lambda x, s: ops.rank1(x, s[:, :4], 2), "scores of shape"),
        (lambda x, s: ops.shift(x[0], 2), "tokens of shape"),
        (lambda x, s: ops.rank1(x, s, 2, "best"), "rank_desc"),
        (lambda x, s: ops.assign(x, s, 2, weights="best"), "size, score"),
        (lambda x, s: ops.recycle(x, s, 2, pc_ratio=1.5), "pc_ratio=1.5"),
        (lambda x, s: ops.recycle(x, s, 2, neighbours=0), "neighbours=0"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(*world(0))
    assert "\n" not in str(caught.value)
