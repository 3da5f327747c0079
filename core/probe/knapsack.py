"""Choose one option of each group so that the costs are least and the sizes stay within a limit: exactly.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11). All partial choices over the
first groups are kept that are better than every other in cost or in size; two prices bound how many those are:

    λ        the price of size at which a relaxed problem, min Σ (cost + λ size) - λ limit, is largest: a bound from below
    known    the cost of a choice that fits, found by that price and by filling up what it leaves: a bound from above

A partial choice is dropped when what it has cost, plus the bound from below for all other groups, is above what is known. So
nothing that could be better than the answer is ever dropped. Costs and sizes are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InputError

STEPS = 60
"""Halvings of the interval in which the price of size is searched."""
SLACK = 1e-12
"""Relative rounding error of sums of float64 that must not drop the best choice."""


@dataclass(frozen=True)
class _Group:
    """Options of which no other is better in both, by rising size: sizes and costs [n] float64, and their places in the input."""

    sizes: np.ndarray
    costs: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[float], costs: Sequence[float]) -> _Group:
        """Sort options and remove those that are dominated."""
        size, cost = np.asarray(sizes, np.float64), np.asarray(costs, np.float64)
        kept = _frontier(size, cost)
        return cls(size[kept], cost[kept], kept)


def choose(sizes: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int]:
    """Choose an option of every group with the least sum of costs whose sum of sizes is at most `limit`.

    Args:
        sizes, costs: of each group's options, finite and not negative.
    Returns: the place of the chosen option in each group.
    Raises: InputError E-PARAM-BUDGET if even the smallest options are above the limit.
    """
    groups = [_Group.of(*pair) for pair in zip(sizes, costs, strict=True)]
    smallest = sum(group.sizes[0] for group in groups)
    if smallest > limit:
        rule = f"The budget is {limit:,.6g}, the least that is possible {smallest:,.6g}: allow more."
        raise InputError(rule, code="E-PARAM-BUDGET")
    price, known = _price(groups, limit)
    order = sorted(range(len(groups)), key=lambda g: -np.ptp(groups[g].sizes))
    ordered = [groups[g] for g in order]
    room = limit * (1 + SLACK) - _after(ordered, lambda group: group.sizes[0])
    below = _after(ordered, lambda group: (group.costs + price * group.sizes).min())
    ceiling = known + SLACK * (abs(known) + price * limit) + price * limit
    size, cost, trail = np.zeros(1), np.zeros(1), []
    for step, group in enumerate(ordered, start=1):
        sums, totals = (size[:, None] + group.sizes).ravel(), (cost[:, None] + group.costs).ravel()
        good = np.flatnonzero((sums <= room[step]) & (totals + price * sums + below[step] <= ceiling))
        good = good[_frontier(sums[good], totals[good])]
        trail.append((good // len(group.sizes), good % len(group.sizes)))
        size, cost = sums[good], totals[good]
    state, chosen = int(cost.argmin()), [0] * len(groups)
    for at, (group, (parents, options)) in enumerate(zip(reversed(ordered), reversed(trail), strict=True), start=1):
        chosen[order[-at]] = int(group.places[options[state]])
        state = int(parents[state])
    return chosen


def _frontier(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return the places of pairs that no other pair undercuts in both, by rising size; of equal ones the first."""
    order = np.lexsort((costs, sizes))
    best = np.minimum.accumulate(costs[order])
    return order[np.concatenate([[True], best[1:] < best[:-1]])[: len(order)]]


def _after(groups: Sequence[_Group], value: object) -> np.ndarray:
    """Sum a value of the groups that come after each step: [len(groups) + 1], the last 0."""
    return np.concatenate([np.cumsum([value(group) for group in groups[::-1]])[::-1], [0.0]])


def _price(groups: Sequence[_Group], limit: float) -> tuple[float, float]:
    """Search the price of size. Returns: (price, cost of a choice that fits)."""
    ratios = [(group.costs[:-1] - group.costs[1:]) / np.diff(group.sizes) for group in groups if len(group.sizes) > 1]
    low, high = 0.0, 2 * max((float(r.max()) for r in ratios), default=0.0)
    best, left, found = 0.0, limit - sum(group.sizes[0] for group in groups), [0] * len(groups)
    for step in range(STEPS):
        price = 0.0 if step == 0 else (low + high) / 2
        picks = [int((group.costs + price * group.sizes).argmin()) for group in groups]
        used = sum(group.sizes[at] for group, at in zip(groups, picks, strict=True))
        if used > limit:
            low = price
            continue
        high = best = price
        left, found = limit - used, picks
        if price == 0.0:
            break
    return best, _filled(groups, found, left)


def _filled(groups: Sequence[_Group], picks: list[int], left: float) -> float:
    """Spend what is left on larger options, the best saving for its size first. Returns: the cost then."""
    picks = list(picks)
    while True:
        found = [
            ((group.costs[at] - group.costs[to]) / (group.sizes[to] - group.sizes[at]), index, to)
            for index, (group, at) in enumerate(zip(groups, picks, strict=True))
            for to in range(at + 1, len(group.sizes))
            if group.sizes[to] - group.sizes[at] <= left
        ]
        if not found:
            return sum(float(group.costs[at]) for group, at in zip(groups, picks, strict=True))
        _, index, to = max(found)
        left -= groups[index].sizes[to] - groups[index].sizes[picks[index]]
        picks[index] = to
