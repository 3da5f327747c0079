"""The door to Triton: on which devices kernels run, on which one they are launched, and what they may raise."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import Backend
from kernels.backend import triton_runs_on, triton_unsupported_reason, use_triton
from tests.kernels.fake_cuda import SECOND, on_second_gpu

FOLDER = Path(kernels.__file__).parent


@pytest.mark.parametrize(
    ("number", "words"), [((7, 5), "compute capability 7.5, kernels need 8.0"), ((8, 0), None), ((12, 0), None)]
)
def test_kernels_need_ampere(number, words, capability):
    capability(*number)
    assert triton_unsupported_reason(SECOND) == words and triton_runs_on(SECOND) == (words is None)
    x = on_second_gpu(torch.empty(1))
    assert use_triton(Backend.AUTO, x) == (words is None) and not use_triton(Backend.REFERENCE, x)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            use_triton(Backend.TRITON, x)
    assert triton_unsupported_reason(torch.device("cpu")) == "kernels run on cuda, not on cpu"


def test_a_launch_makes_the_device_of_its_tensors_the_current_one(monkeypatch):
    pytest.importorskip("triton")
    from kernels._triton import on_its_device

    current = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    launch = on_its_device(lambda x, *, more: (list(current), more))
    assert launch(on_second_gpu(torch.empty(2)), more=1) == ([SECOND], 1)
    assert launch(torch.empty(2), more=2) == ([], 2) and not current


def launchers() -> list[tuple[str, ast.FunctionDef]]:
    """(file, function) of every function that launches a kernel: `kernel[grid](…)`."""
    found = []
    for path in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Subscript)
                and ast.unparse(call.func.value).endswith("_kernel")
                for call in ast.walk(node)
            ):
                found.append((path.relative_to(FOLDER).as_posix(), node))
    return found


def test_every_launch_is_on_its_device():
    found = launchers()
    assert len({module for module, _ in found}) == 10, "every module with kernels"
    missing = [f"{module}.{node.name}" for module, node in found
               if "on_its_device" not in [ast.unparse(d) for d in node.decorator_list]]  # fmt: skip
    assert not missing


def test_triton_s_own_errors_are_among_those_of_a_launch():
    errors = pytest.importorskip("triton.runtime.errors")
    from kernels._triton import ERRORS

    assert not issubclass(errors.OutOfResources, RuntimeError)
    assert issubclass(errors.OutOfResources, ERRORS) and issubclass(torch.OutOfMemoryError, ERRORS)


def test_without_triton_everything_imports_and_the_references_run():
    paths = [path.relative_to(FOLDER.parent).with_suffix("") for path in FOLDER.rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.parts) for path in paths]
    code = (
        "import sys; sys.modules['triton'] = None; import importlib, torch; "
        f"[importlib.import_module(m) for m in {modules}]; "
        "import kernels; from kernels._triton import available; assert not available(); "
        "assert kernels.topk_quant(torch.ones(1, 2)).codes.tolist() == [[127, 0]]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
