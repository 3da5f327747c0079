"""Only data crosses the pipe."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from app.worker import wire
from core.errors import ModelError
from core.recipe import Bits, Calibration, QuantRecipe
from tests.app.conftest import ROOT


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, "x", b"y", True], "b": (1, {2})},
        QuantRecipe("m", bits=Bits(weights=4), scheme="custom", calibration=Calibration("sotu", 1024)),
    ],
)
def test_plain_values_and_core_dataclasses_pass(value):
    assert wire.loads(pickle.dumps(value, protocol=5)) == value


def test_arrays_and_reports_pass(ranges):
    back = wire.loads(pickle.dumps(("result", "id", 0, ranges), protocol=5))[3]
    name = "layers.2.down_in"
    np.testing.assert_array_equal(back.sites[name].high, ranges.sites[name].high)


def test_a_worker_loads_reports_without_the_libraries_that_compute_them():
    code = "import sys, app.worker.server, tests.app.fake_workbench; print(*{'torch', 'transformers'} & {*sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not loaded.stdout.split()


def test_errors_pass_with_their_code():
    error = wire.loads(pickle.dumps(ModelError("Not found.", code="E-MODEL-NAME")))
    assert (str(error), error.code) == ("Not found.", "E-MODEL-NAME")


class _Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [_Call(os.system, "true"), _Call(eval, "1"), _Call(getattr, "", "upper"), _Call(print, "x")])
def test_calls_do_not(call):
    with pytest.raises(pickle.UnpicklingError):
        wire.loads(pickle.dumps(("result", "id", 0, call), protocol=5))


def test_functions_of_core_do_not_either():
    from core.models.io.catalog import catalogue

    with pytest.raises(pickle.UnpicklingError):
        wire.loads(pickle.dumps(catalogue))
