"""The closed form of learning rate and weight decay against the published numbers."""

from __future__ import annotations

import pytest

from training.schedule import Schedule

PUBLISHED = Schedule(100_000, 375, (1.5e-3, 1e-3))
"""The 700M model of the FAQ."""


@pytest.mark.parametrize(("step", "rate"), [
    (1, 4e-6), (375, 1.5e-3), (49_999, 7.68e-4), (50_000, 5.17e-4), (75_000, 2.734e-4), (100_000, 3e-5),
])
def test_the_published_rates(step, rate):
    assert PUBLISHED.lr(step) == pytest.approx(rate, rel=1e-3)


def test_warm_up_is_linear_and_meets_the_decay():
    assert [PUBLISHED.lr(t) / 1.5e-3 * 375 for t in (1, 100, 374)] == pytest.approx([1, 100, 374])
    steps = [PUBLISHED.lr(t) for t in range(375, 50_000, 625)]
    assert steps == sorted(steps, reverse=True)
    falls = [a - b for a, b in zip(steps, steps[1:], strict=False)]
    assert max(falls) == pytest.approx(min(falls))


def test_weight_decay_ends_at_half():
    assert [PUBLISHED.weight_decay(t) for t in (1, 49_999, 50_000, 100_000)] == [0.1, 0.1, 0.0, 0.0]


def test_without_a_switch_there_is_one_stage():
    assert PUBLISHED.switch_step == 100_000 and {PUBLISHED.stage(t) for t in (1, 50_000, 100_000)} == {1}


def test_the_switch_changes_the_stage_and_not_the_rate():
    switched = Schedule(100_000, 375, (1.5e-3, 1e-3), switch=0.95)
    assert (switched.stage(95_000), switched.stage(95_001)) == (1, 2)
    assert all(switched.lr(t) == PUBLISHED.lr(t) for t in (1, 94_999, 95_001, 100_000))


def test_a_restart_falls_from_its_rate_to_zero_in_stage_two():
    restarted = Schedule(1000, 50, (2e-3, 1e-3), switch=0.8, restart=4e-4)
    assert restarted.lr(800) == Schedule(1000, 50, (2e-3, 1e-3)).lr(800)
    assert restarted.lr(801) == pytest.approx(4e-4 * 199 / 200)
    assert restarted.lr(900) == pytest.approx(2e-4) and restarted.lr(1000) == 0
