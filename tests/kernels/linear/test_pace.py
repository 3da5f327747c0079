"""Measuring from how many columns per cluster integer products pay."""

from __future__ import annotations

import pytest

from kernels.linear.pace import COLUMNS, NEVER, int8_is_faster, measure_least_columns


@pytest.mark.parametrize("limit, least", [(1, 48), (100, 128), (192, 192), (500, 512), (513, NEVER)])
def test_the_fewest_columns_that_pay(limit, least):
    assert measure_least_columns(lambda columns: columns >= limit) == least


def test_a_slow_width_ends_the_search():
    asked = []
    assert measure_least_columns(lambda columns: asked.append(columns) or columns != 256) == 384
    assert asked == [512, 384, 256], "narrower clusters that look faster by chance do not count"


def test_both_backends_are_timed(monkeypatch):
    clock, seconds = [0.0], {"int8": 1.0, "reference": 2.0}

    def spend(who):
        def product(self, x):
            clock[0] += seconds[who]

        return product

    monkeypatch.setattr("kernels.linear.pace.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("kernels.linear.pace.Int8Operands.product", spend("int8"))
    monkeypatch.setattr("kernels.linear.pace.ReferenceOperands.product", spend("reference"))
    assert int8_is_faster(64)
    seconds["int8"] = 3.0
    assert not int8_is_faster(64)


def test_a_real_measurement_gives_a_width_of_the_list():
    assert measure_least_columns() in {*COLUMNS, NEVER}
