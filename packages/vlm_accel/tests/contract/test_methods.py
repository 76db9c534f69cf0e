"""Every method of the table on random input, by the abilities that its class has. Nothing here is skipped."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal import checks
from vlm_accel.budget import KVBudget
from vlm_accel.methods import METHODS, create
from vlm_accel.methods.base import CacheMethod, CacheView, FeatureMethod, Features, Method, TokenMethod, Tokens
from vlm_accel.schedule import Step, expand

PROMISED = {
    "rank1", "recycle", "shift", "drop", "lightvlm", "random", "stride", "pool", "text_only", "fastv", "pyramiddrop",
    "sparsevlm", "tome", "visionzip", "evit", "prumerge", "prumerge_plus", "hired", "fastervlm", "vispruner",
    "divprune", "pact", "snapkv", "h2o", "streaming_llm", "tova", "pyramidkv", "adakv", "random_kv", "recent_kv",
    "window_kv",
}  # fmt: skip
#: options away from the defaults, to be created with as well
OPTIONS = {
    "rank1": {"weights": "uniform", "vision_score": "cls"},
    "recycle": {"pc_ratio": 0.1, "neighbours": 3},
    "drop": {"llm_score": "text"},
    "lightvlm": {"target": 0.03, "weights": "score"},
    "text_only": {"layer": 3},
    "tome": {"proportional": False},
    "evit": {"kappa": 0.5},
    "fastv": {"layer": 3},
    "visionzip": {"ratio": 0.5},
}
#: rules whose output rows are no means of input rows: sums with raw attention (EViT)
NO_MEANS = {"evit"}
#: rules that keep no sum of the sizes: what is deleted is not counted
DELETING = {
    "drop", "random", "stride", "text_only", "fastv", "pyramiddrop", "recycle", "sparsevlm", "pact",
}  # fmt: skip


def able(kind):
    """Names of the methods that are of ``kind``, by their tags: loading all of them is what a test does."""
    places = {TokenMethod: {"vision", "llm"}, FeatureMethod: {"features"}, CacheMethod: {"cache"}}[kind]
    return [row.name for row in METHODS if places & set(row.tags)]


def test_table_of_methods():
    checks.check_registry(METHODS, (), OPTIONS, base=Method)
    checks.check_registry(METHODS, (), base=Method)


def test_table_has_the_promised_names():
    assert set(METHODS.names()) == PROMISED


@pytest.mark.parametrize("name", METHODS.names())
def test_tags_say_what_the_class_can(name):
    cls, tags = METHODS.load(name), set(METHODS.info(name).tags)
    assert len(tags & {"tier1", "tier2", "tier3", "control"}) == 1
    places = tags & {"vision", "llm", "features", "cache"}
    assert places == set(cls.stages)
    assert issubclass(cls, TokenMethod) == bool(places & {"vision", "llm"})
    assert issubclass(cls, FeatureMethod) == ("features" in places)
    assert issubclass(cls, CacheMethod) == ("cache" in places)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_is_a_frozen_bag_of_options(name):
    method = create(name)
    assert dataclasses.is_dataclass(method)
    assert method == create(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1
    assert dataclasses.replace(method) == method


@pytest.mark.parametrize("name", METHODS.names())
def test_default_schedules_fit_common_depths(name):
    """The method's own steps and budget for an encoder of 24 blocks and a decoder of 28 or 32 layers."""
    method = create(name)
    for depth in (28, 32):
        vision, llm = expand(method.schedule(), 24, depth)
        assert {step.stage for step in (*vision, *llm)} <= set(method.stages)
    budget = method.kv()
    if isinstance(method, CacheMethod) and not isinstance(method, TokenMethod):
        assert isinstance(method.adapt(budget), KVBudget)
        assert all(0 < entries <= 1000 for entries in method.adapt(budget).entries([1000] * 28))


# ------------------------------------------------------------------ tokens


def spans(method, seed, n=24, s=3, d=6, dtype=torch.float32, stage=None, **options):
    """Random tokens with all that ``method`` asks for."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    stage = stage or method.stages[0]
    keys = normal(s, n, 2, 4).to(dtype) if method.needs_keys else None
    needs_scores = method.own_llm_scores or method.score(stage) != "none"
    return Tokens(
        x=normal(s, n, d).to(dtype),
        stage=stage,
        layer=3,
        scores=torch.rand(s, n, generator=draw) / n if needs_scores else None,
        sizes=torch.ones(s, n),
        index=torch.arange(n).expand(s, n),
        grid=(4, n // 4) if n % 4 == 0 else None,
        keys=keys,
        queries=keys,
        span=torch.arange(s) + 5,
        **{"trace": True, **options},
    )


def part(tokens, s):
    """One sample of ``tokens``."""
    tensors = {
        f.name: value[s : s + 1]
        for f in dataclasses.fields(tokens)
        if isinstance(value := getattr(tokens, f.name), torch.Tensor)
    }
    return dataclasses.replace(tokens, **tensors)


def same(found, other):
    for one, again in zip(found, other, strict=True):
        assert (one is None) == (again is None)
        if one is not None:
            torch.testing.assert_close(one, again, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", able(TokenMethod))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 40), data=st.data())
def test_what_a_step_returns(name, seed, n, data):
    """The counts that were promised, ascending rows, valid owners, weights that give the tokens."""
    method = create(name)
    keep = data.draw(st.integers(1, n - 1))
    for stage in set(method.stages) & {"vision", "llm"}:
        tokens = spans(method, seed, n, stage=stage)
        before = dataclasses.replace(tokens, x=tokens.x.clone(), sizes=tokens.sizes.clone())
        left = method.left(Step(stage, 3, keep=keep), n)
        found = method.reduce(tokens, left)
        assert left == (0 if method.may_empty else keep)
        assert torch.equal(tokens.x, before.x)
        assert torch.equal(tokens.sizes, before.sizes)
        assert found.x.shape == (3, left, 6)
        assert found.kept.shape == (3, left)
        assert found.kept.dtype == torch.int64
        assert (found.kept.diff(dim=1) > 0).all()
        assert ((found.kept >= 0) & (found.kept < n)).all()
        assert found.assign is not None
        assert found.assign.shape == (3, n)
        assert ((found.assign >= -1) & (found.assign < max(left, 1))).all()
        own = found.assign.gather(1, found.kept)
        assert torch.equal(own, torch.arange(left).expand(3, left))
        assert torch.isfinite(found.x).all()
        check_weights(name, tokens, found, left)


def check_weights(name, tokens, found, left):
    n = tokens.x.shape[1]
    weight = found.weight
    if weight is None:
        weight = torch.nn.functional.one_hot(found.kept, n).float()
    assert weight.shape == (3, left, n)
    torch.testing.assert_close(weight.float() @ tokens.x, found.x, rtol=0, atol=1e-5)
    if name not in NO_MEANS:
        torch.testing.assert_close(weight.sum(-1).float(), torch.ones(3, left), rtol=0, atol=1e-5)
    if found.sizes is not None:
        assert found.sizes.shape == (3, left)
        assert (found.sizes >= 1).all()
        if name not in DELETING:
            torch.testing.assert_close(found.sizes.sum(1), torch.full((3,), float(n)), rtol=0, atol=1e-4)
        assert (found.sizes.sum(1) <= n + 1e-4).all()
    if found.key_bias is not None:
        assert found.key_bias.shape == (3, left)
        assert METHODS.load(name).biases_keys


@pytest.mark.parametrize("name", able(TokenMethod))
def test_tracing_and_batches_change_no_token(name):
    """Trace on or off, a batch or its samples, once or twice: the same tokens."""
    method = create(name)
    tokens = spans(method, 1)
    left = method.left(Step(tokens.stage, 3, keep=10), 24)
    found = method.reduce(tokens, left)
    untraced = method.reduce(dataclasses.replace(tokens, trace=False), left)
    assert torch.equal(untraced.x, found.x)
    assert torch.equal(untraced.kept, found.kept)
    same(method.reduce(tokens, left), found)
    owners_only = method.reduce(dataclasses.replace(tokens, trace="assign"), left)
    assert torch.equal(owners_only.x, found.x)
    assert torch.equal(owners_only.assign, found.assign)
    for s in range(3):
        alone = method.reduce(part(tokens, s), left)
        same(alone, [None if value is None else value[s : s + 1] for value in found])


@pytest.mark.parametrize("name", able(TokenMethod))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(name, dtype):
    method = create(name)
    tokens = spans(method, 2, dtype=dtype)
    found = method.reduce(tokens, method.left(Step(tokens.stage, 3, keep=7), 24))
    assert found.x.dtype == dtype
    assert torch.isfinite(found.x).all()


@pytest.mark.parametrize("name", [name for name in able(TokenMethod) if name not in NO_MEANS])
def test_constant_tokens_stay_constant(name):
    method = create(name)
    constant = torch.tensor([0.3, -2.0, 7.0, 0.0, 1.0, 5.0]).expand(3, 24, 6)
    tokens = dataclasses.replace(spans(method, 3), x=constant)
    left = method.left(Step(tokens.stage, 3, keep=9), 24)
    torch.testing.assert_close(method.reduce(tokens, left).x, constant[:, :left], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", able(TokenMethod))
def test_steps_follow_each_other(name):
    """Sizes, places and keys of one step go into the next, as engines carry them."""
    method = create(name)
    tokens = spans(method, 4)
    for keep in (17, 9, 4, 1):
        left = method.left(Step(tokens.stage, 3, keep=keep), tokens.x.shape[1])
        found = method.reduce(tokens, left)
        assert found.x.shape[1] == left
        if left == 0:
            break
        rows = found.kept
        tokens = dataclasses.replace(
            tokens,
            x=found.x,
            scores=None if tokens.scores is None else tokens.scores.gather(1, rows),
            sizes=tokens.sizes.gather(1, rows) if found.sizes is None else found.sizes,
            index=tokens.index.gather(1, rows),
            keys=None if tokens.keys is None else tokens.keys.gather(1, rows[..., None, None].expand(-1, -1, 2, 4)),
            queries=None,
        )
        assert (tokens.index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", able(TokenMethod))
def test_no_value_is_read_on_the_host(name):
    """Meta tensors hold none: a look at one (a host synchronisation on a GPU) raises."""
    method = create(name)
    tokens = spans(method, 5)
    tensors = {
        f.name: value.to("meta")
        for f in dataclasses.fields(tokens)
        if isinstance(value := getattr(tokens, f.name), torch.Tensor)
    }
    tokens = dataclasses.replace(tokens, trace=False, **tensors)
    left = method.left(Step(tokens.stage, 3, keep=10), 24)
    assert method.reduce(tokens, left).x.shape == (3, left, 6)


@pytest.mark.parametrize("name", ["random"])
def test_draws_are_named(name):
    """Other seeds, stages, layers and images draw otherwise; the same ones the same, whatever came before."""
    tokens = spans(create(name), 6, stage="vision")
    first = create(name).reduce(tokens, 8).kept
    assert not torch.equal(first[0], first[1])
    for change in ({"seed": 1}, {"stage": "llm"}, {"layer": 4}, {"span": tokens.span + 10}):
        assert not torch.equal(create(name).reduce(dataclasses.replace(tokens, **change), 8).kept, first)
    assert torch.equal(create(name).reduce(tokens, 8).kept, first)


# ------------------------------------------------------------------ features


def features(method, seed, images=3, n=36, dtype=torch.float32, has_cls=True, **options):
    """Random features of an encoder of 6 blocks whose block 5 is read."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    blocks = method.blocks(7, 5)
    return Features(
        x=normal(images, n, 8),
        cls_attention={b: torch.softmax(3 * normal(images, 2, n).float(), -1) for b in blocks},
        keys={b: normal(images, n, 2, 4) for b in blocks},
        queries={b: normal(images, n, 2, 4) for b in blocks},
        cls_query={b: normal(images, 2, 4) for b in blocks},
        cls_key={b: normal(images, 2, 4) for b in blocks} if has_cls else {},
        grid=(6, 6) if n == 36 else None,
        has_cls=has_cls,
        **{"trace": True, **options},
    )


def check_image(reduced, x, empty=False):
    """One image's answer against its (N, D) features."""
    n, m = len(x), reduced.x.shape[1]
    assert reduced.x.shape == (1, m, 8)
    assert reduced.x.dtype == x.dtype
    assert m <= n
    assert m >= (0 if empty else 1)
    assert torch.isfinite(reduced.x).all()
    assert reduced.kept.shape == (1, m)
    assert (reduced.kept.diff(dim=1) > 0).all()
    assert ((reduced.kept >= 0) & (reduced.kept < n)).all()
    assert reduced.assign.shape == (1, n)
    assert ((reduced.assign >= -1) & (reduced.assign < max(m, 1))).all()
    weight = reduced.weight
    if weight is None:
        weight = torch.nn.functional.one_hot(reduced.kept, n)
    torch.testing.assert_close(weight.float() @ x.float(), reduced.x.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", able(FeatureMethod))
@pytest.mark.parametrize("has_cls", [True, False])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_is_left_of_features(name, has_cls, seed):
    method = create(name)
    given_features = features(method, seed, has_cls=has_cls)
    before = given_features.x.clone()
    found = method.select(given_features)
    assert torch.equal(given_features.x, before)
    assert len(found) == 3
    promised = method.count(36)
    for image, reduced in enumerate(found):
        check_image(reduced, given_features.x[image])
        assert promised is None or reduced.x.shape[1] == promised


@pytest.mark.parametrize("name", able(FeatureMethod))
def test_features_of_a_batch_are_those_of_its_images(name):
    method = create(name)
    whole = features(method, 7)
    found = method.select(whole)
    untraced = method.select(dataclasses.replace(whole, trace=False))
    for image in range(3):
        assert torch.equal(untraced[image].x, found[image].x)
        one = dataclasses.replace(
            whole,
            x=whole.x[image : image + 1],
            **{
                field: {b: value[image : image + 1] for b, value in getattr(whole, field).items()}
                for field in ("cls_attention", "keys", "queries", "cls_query", "cls_key")
            },
        )
        (alone,) = method.select(one)
        assert torch.equal(alone.kept, found[image].kept)
        torch.testing.assert_close(alone.x, found[image].x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", able(FeatureMethod))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_features_is_kept(name, dtype):
    found = create(name).select(features(create(name), 8, dtype=dtype))
    assert {reduced.x.dtype for reduced in found} == {dtype}


@pytest.mark.parametrize("name", able(FeatureMethod))
def test_tiles_of_a_picture(name):
    """A base row and four tiles, and a picture of one row: an answer for each row."""
    method = create(name)
    given_features = features(method, 9, images=6, groups=[(0, [1, 2, 3, 4], (2, 2)), (5, [], (1, 1))])
    found = method.select(given_features)
    assert len(found) == 6
    for image, reduced in enumerate(found):
        check_image(reduced, given_features.x[image], empty=image in (1, 2, 3, 4))


@pytest.mark.parametrize(
    "name", [name for name in able(FeatureMethod) if name not in ("prumerge", "prumerge_plus")]
)  # PruMerge's made token is a sum even at ratio 1 - 1/N; its identity is tested with it
def test_ratio_one_keeps_the_very_features(name):
    method = create(name)
    method = dataclasses.replace(method, ratio=1.0)
    given_features = features(method, 10)
    for image, reduced in enumerate(method.select(given_features)):
        assert torch.equal(reduced.x[0], given_features.x[image])
        assert reduced.kept[0].tolist() == list(range(36))


# ------------------------------------------------------------------ caches


def view(seed, budget=None, b=2, k=2, n=40, w=8, pad=3, d=4, **options):
    """A cache of n entries, the first ``pad`` of sample 1 padding; two query heads a key/value head."""
    draw = torch.Generator().manual_seed(seed)
    valid = torch.ones(b, k, n, dtype=torch.bool)
    valid[1, :, :pad] = False
    index = torch.arange(n).expand(b, k, n).clone()
    index[~valid] = -1
    image = torch.zeros(b, k, n, dtype=torch.bool)
    image[:, :, 6:20] = True
    budget = budget or KVBudget.uniform(20, sink=2, recent=4, window=w)
    return CacheView(
        layer=1,
        depth=4,
        keys=torch.randn(b, k, n, d, generator=draw),
        values=torch.randn(b, k, n, d, generator=draw),
        queries=torch.randn(b, 2 * k, w, d, generator=draw),
        query_index=torch.arange(n - w, n).expand(b, w),
        valid=valid,
        index=index,
        image=image,
        scaling=d**-0.5,
        budget=budget,
        entries=20,
        prefill=True,
        **options,
    )


def scores_of(method, given_view):
    if method.observes:
        method.observe(given_view)
    return method.entry_scores(given_view)


@pytest.mark.parametrize("name", able(CacheMethod))
def test_scores_of_cache_entries(name):
    """Finite where an entry is, of the right shape, a function of the view; nothing in the view is changed."""
    method = create(name)
    first, second = view(1), view(1)
    scores = scores_of(method, first)
    assert scores.shape == (2, 2, 40)
    assert torch.isfinite(scores[first.valid]).all()
    assert scores.std() > 0
    torch.testing.assert_close(scores_of(method, second), scores, rtol=0, atol=0)
    for name_of in ("keys", "values", "queries", "valid", "index", "image"):
        assert torch.equal(getattr(first, name_of), getattr(view(1), name_of))


@pytest.mark.parametrize("name", able(CacheMethod))
def test_padding_does_not_matter(name):
    """The scores of a padded sample's entries are those of the sample without padding, in order."""
    method = create(name)
    padded = view(2)
    keep = slice(3, None)
    bare = dataclasses.replace(
        padded,
        state={},
        **{field: getattr(padded, field)[1:2] for field in ("queries", "query_index")},
        **{field: getattr(padded, field)[1:2, :, keep] for field in ("keys", "values", "valid", "index", "image")},
    )
    with_padding = scores_of(method, padded)[1:2, :, keep]
    alone = scores_of(method, bare)
    first, second = (part.sort(dim=-1, stable=True).indices for part in (with_padding, alone))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", able(CacheMethod))
def test_a_batch_of_caches_is_its_samples(name):
    method = create(name)
    whole = view(3)
    scores = scores_of(method, whole)
    for s in range(2):
        one = dataclasses.replace(
            whole,
            state={},
            **{
                field: getattr(whole, field)[s : s + 1]
                for field in ("keys", "values", "queries", "query_index", "valid", "index", "image")
            },
        )
        torch.testing.assert_close(scores_of(method, one), scores[s : s + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [row.name for row in METHODS if "cache" in row.tags])
def test_heads_alike_where_the_class_says_so(name):
    method = create(name)
    scores = scores_of(method, view(4))
    alike = bool((scores[:, :1] == scores).all())
    assert alike or not method.same_for_heads


@pytest.mark.parametrize("name", able(CacheMethod))
def test_low_precision_is_scored_in_float32(name):
    method = create(name)
    exact = view(5)
    low = dataclasses.replace(
        exact,
        state={},
        **{field: getattr(exact, field).bfloat16() for field in ("keys", "values", "queries")},
    )
    scores = scores_of(method, low)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores[low.valid]).all()
