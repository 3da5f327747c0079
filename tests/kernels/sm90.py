"""Compile kernels for Hopper without a GPU and print what came out as JSON: run by test_compile_sm90.py in a process of its own.

python -m tests.kernels.sm90 < CASES          CASES: JSON list of arguments of `compile_kernel`
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(
    module: str, kernel: str, types: dict[str, str], constants: dict[str, object], warps: int, stages: int
) -> dict:
    """Registers, stack bytes and matrix instructions of a kernel.

    Args:
        types: Triton type of every run-time argument by name; a trailing ":16" promises a value divisible by 16.
        constants: the others.
    """
    kernel = getattr(importlib.import_module(module), kernel)
    signature, attrs = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind = types.get(argument, "constexpr")
        if kind.startswith("*") or kind.endswith(":16"):
            attrs[(position,)] = [["tt.divisibility", 16]]
        signature[argument] = kind.removesuffix(":16")
    constants = {a: constants.get(a) for a in kernel.arg_names if a not in types}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    ptx = built.asm["ptx"]
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "shared": built.metadata.shared,
        **usage(built.asm["cubin"]),
    }


def usage(cubin: bytes) -> dict:
    """Registers and stack bytes that the assembler reports, and matrix instructions in its output."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "cuobjdump", "--dump-sass", path], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(re.search(rf"{key}:(\d+)", report).group(1)) for key in ("REG", "STACK", "LOCAL")}
    found = {key: len(re.findall(rf"\b{key}\b", code)) for key in ("IGMMA", "HGMMA", "IMMA", "HMMA", "LDL", "STL", "LDGSTS")}
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "local": numbers["LOCAL"], **found}


if __name__ == "__main__":
    sys.stdout.write(json.dumps([compile_kernel(**case) for case in json.load(sys.stdin)]))
