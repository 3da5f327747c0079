"""The package as others see it: names, inert import, and the version that transformers reads."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import kernels
from kernels import Backend, Choice


def test_backends_are_their_names():
    assert [str(b) for b in Backend] == ["auto", "reference", "int8", "triton"] and Backend("int8") is Backend.INT8
    with pytest.raises(ValueError):
        Backend("cuda")


def test_a_choice_crosses_processes():
    choice = Choice(Backend.INT8, "because")
    assert pickle.loads(pickle.dumps(choice)) == choice
    with pytest.raises(AttributeError):
        choice.reason = "other"


def test_everything_exported_exists():
    assert all(hasattr(kernels, name) for name in kernels.__all__) and kernels.__version__ == "0.0.0"


def test_importing_starts_no_device_and_loads_no_triton():
    code = (
        "import sys, kernels, torch; assert not torch.cuda.is_initialized(); "
        "assert not {'triton', 'transformers', 'sklearn'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
