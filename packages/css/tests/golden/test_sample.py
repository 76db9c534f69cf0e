"""The balanced sampler against the rule written out naively, and its invariants."""

import pytest
from css.ops.sample import balanced_sample
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(candidates, budget, class_order):
    """Round-robin: each class takes the first remaining candidate that contains it and removes it."""
    remaining, taken = list(candidates), []
    while len(taken) < budget:
        before = len(taken)
        for label in class_order:
            if len(taken) == budget:
                break
            for candidate in remaining:
                if label in candidate[1]:
                    remaining.remove(candidate)
                    taken.append((candidate[0], label))
                    break
        if len(taken) == before:
            break
    return taken


class_sets = st.lists(st.sets(st.integers(1, 6), max_size=3), max_size=40)
orders = st.permutations(range(1, 6))


@settings(max_examples=150, deadline=None)
@given(sets=class_sets, order=orders, budget=st.integers(0, 45))
def test_golden_choice(sets, order, budget):
    candidates = [(f"p{number}", classes) for number, classes in enumerate(sets)]
    found = balanced_sample(candidates, budget, order)
    assert found == reference(candidates, budget, order)
    assert len(found) <= budget
    assert len({name for name, _ in found}) == len(found)
    known = dict(candidates)
    assert all(label in known[name] for name, label in found)


@settings(max_examples=60, deadline=None)
@given(order=orders, budget=st.integers(0, 40))
def test_shares_differ_by_at_most_one_while_candidates_last(order, budget):
    candidates = [((label, number), {label}) for number in range(8) for label in order]
    found = [label for _, label in balanced_sample(candidates, budget, order)]
    shares = [found.count(label) for label in order]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == budget
    assert shares == sorted(shares, reverse=True)  # what is left over goes to those whose turn is first


def test_a_class_without_candidates_leaves_its_share_to_the_others():
    candidates = [("a", {1}), ("b", {1}), ("c", {1}), ("d", {2})]
    assert balanced_sample(candidates, 10, [2, 3, 1]) == [("d", 2), ("a", 1), ("b", 1), ("c", 1)]


def test_it_ends_where_nothing_is_left():
    assert balanced_sample([("a", {7})], 5, [1, 2]) == []
    assert balanced_sample([("a", set())], 5, [1]) == []
    assert balanced_sample([], 5, [1]) == []
    assert balanced_sample([("a", {1})], 5, []) == []
    assert balanced_sample([("a", {1})], 0, [1]) == []


@settings(max_examples=60, deadline=None)
@given(sets=class_sets, order=orders, budget=st.integers(0, 45), refused=st.sets(st.integers(0, 39)))
def test_refusing_late_equals_filtering_before(sets, order, budget, refused):
    candidates = list(enumerate(sets))
    asked = []
    found = balanced_sample(candidates, budget, order, accept=lambda key: asked.append(key) or key not in refused)
    assert found == balanced_sample([c for c in candidates if c[0] not in refused], budget, order)
    assert len(asked) == len(set(asked))
    assert {name for name, _ in found} == set(asked) - refused


def test_no_candidate_is_looked_at_that_is_not_needed():
    candidates = [(number, {1, 2}) for number in range(1000)]
    asked = []
    balanced_sample(candidates, 4, [1, 2], accept=lambda key: asked.append(key) is None)
    assert asked == [0, 1, 2, 3]


def test_bad_arguments():
    with pytest.raises(ValueError, match="budget=-1; expected 0 or more"):
        balanced_sample([], -1, [1])
    with pytest.raises(ValueError, match="2 candidates; expected identifiers that occur once"):
        balanced_sample([("a", {1}), ("a", {2})], 3, [1, 2])
