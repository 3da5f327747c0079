"""The allocation is the best that exists: against trying every choice, and against bounds where there are too many."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from core.probe.knapsack import choose

NUMBER = st.one_of(st.integers(0, 12).map(float), st.just(0.0), st.floats(1e-9, 10))
GROUPS = st.lists(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5), min_size=1, max_size=5)


def totals(groups, picks) -> tuple[float, float]:
    """Sums of size and cost, in the order of the groups."""
    return tuple(sum(group[at][axis] for group, at in zip(groups, picks, strict=True)) for axis in (0, 1))


def by_hand(groups, limit) -> float | None:
    """The least cost of all choices that fit; None if none does."""
    every = (totals(groups, picks) for picks in itertools.product(*(range(len(g)) for g in groups)))
    return min((cost for size, cost in every if size <= limit), default=None)


@settings(max_examples=400, deadline=None)
@given(groups=GROUPS, share=st.floats(0, 1.1))
def test_no_choice_is_better(groups, share):
    smallest, largest = (sum(pick(size for size, _ in group) for group in groups) for pick in (min, max))
    limit = smallest + share * (largest - smallest)
    best = by_hand(groups, limit)
    picks = choose([[s for s, _ in g] for g in groups], [[c for _, c in g] for g in groups], limit)
    size, cost = totals(groups, picks)
    assert size <= limit * (1 + 1e-9) + 1e-12
    assert best is None or cost <= best * (1 + 1e-9) + 1e-12


def test_the_limit_itself_fits_and_less_does_not():
    sizes, costs = [[1, 2, 4], [3, 5]], [[9, 5, 0], [4, 0]]
    assert choose(sizes, costs, 9) == [2, 1] and choose(sizes, costs, 4) == [0, 0] and choose(sizes, costs, 7) == [2, 0]
    with pytest.raises(InputError, match="allow more") as caught:
        choose(sizes, costs, 3.99)
    assert caught.value.code == "E-PARAM-BUDGET"


def test_a_model_sized_problem_is_solved_and_undercuts_every_uniform_choice():
    """150 groups of 7 options whose costs fall fourfold for a bit, as those of layers do."""
    draw = random.Random(0)
    widths = [draw.choice((552_960, 331_776, 1_769_472, 884_736)) for _ in range(150)]
    scales = [10 ** draw.uniform(-4, 0) for _ in widths]
    sizes = [[w * bits / 8 for bits in range(2, 9)] for w in widths]
    costs = [[s / 4**bits * draw.uniform(0.8, 1.2) for bits in range(2, 9)] for s in scales]
    for at in range(7):
        limit, uniform = sum(s[at] for s in sizes), sum(c[at] for c in costs)
        picks = choose(sizes, costs, limit)
        assert sum(s[p] for s, p in zip(sizes, picks, strict=True)) <= limit
        cost = sum(c[p] for c, p in zip(costs, picks, strict=True))
        assert cost <= uniform and (at in (0, 6) or cost < 0.7 * uniform)
        swapped = choose(costs, sizes, cost)  # least bytes within a bound on the cost: the same problem the other way round
        assert sum(s[p] for s, p in zip(sizes, swapped, strict=True)) <= limit
