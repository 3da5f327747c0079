"""The package as others see it: names, inert import, and the version that transformers reads."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import Backend, Choice


def test_backends_are_their_names():
    assert [str(b) for b in Backend] == ["auto", "reference", "int8", "int4", "triton"] and Backend("int8") is Backend.INT8
    with pytest.raises(ValueError):
        Backend("cuda")


def test_a_choice_crosses_processes():
    choice = Choice(Backend.INT8, "because")
    assert pickle.loads(pickle.dumps(choice)) == choice
    with pytest.raises(AttributeError):
        choice.reason = "other"


def test_everything_exported_exists():
    assert all(hasattr(kernels, name) for name in kernels.__all__) and kernels.__version__ == "0.0.0"


def test_ops_with_kernels_are_loaded_on_demand_under_names_no_module_takes():
    from kernels.linear import weight_only

    assert kernels.weight_only_linear is weight_only.weight_only_linear
    modules = {path.stem for path in Path(kernels.__file__).parent.iterdir()}
    for op in kernels.__all__:
        assert callable(getattr(kernels, op)) and op not in modules
    with pytest.raises(AttributeError, match="no attribute 'fast'"):
        _ = kernels.fast


def test_importing_starts_no_device_and_loads_no_triton():
    code = (
        "import sys, kernels, torch; assert not torch.cuda.is_initialized(); "
        "assert not {'triton', 'transformers', 'sklearn'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
