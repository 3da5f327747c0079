"""Every main kernel compiles for Hopper (sm_90) without a GPU: matrix instructions where they belong, few registers, no more
shared memory than there is, and no spills but where SPILLS allows some.

The compiler and the disassembler come inside Triton's wheel. The cases are the tiles that `kernels/tiles.py` and the launchers
choose for large layers, in bfloat16 and in float32, which models run in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")), reason="Triton's wheel brings no ptxas and cuobjdump"
)


def ints(names: str, kind: str = "i32:16") -> dict[str, str]:
    """Integer arguments; ":16" promises a multiple of 16, as the launcher finds out at run time."""
    return dict.fromkeys(names.split(), kind)


def weight_only(bits, block, *, clustered=False, rows=64, columns=16, stages=4, x="*bf16"):
    types = {"x_ptr": x, "packed_ptr": "*u8", "scale_ptr": "*fp16", "zero_ptr": "*i16", "out_ptr": "*fp32"}
    types |= ints("N K PART_BYTES ROW_BYTES stride_x") | ints("M CLUSTERS STEPS", "i32")
    types |= {"pieces_ptr": "*i32"} if clustered else {}
    parts = {2: 4, 3: 8, 4: 2}[bits]
    constants = {"BITS": bits, "PARTS": parts, "CLUSTERED": clustered, "BIASED": False, "SPLIT": 4}
    constants |= {"BN": rows, "BM": columns, "BK": block}
    return "linear.weight_only", "_weight_only_kernel", types, constants, 4, stages


def cluster(columns, rows, warps, stages, *, clustered=True):
    types = {"codes_ptr": "*i8", "packed_ptr": "*u8", "out_ptr": "*fp32", "clusters_ptr": "*i32"} | ints("N HALF stride_c")
    types |= dict.fromkeys(("scale_ptr", "zero_ptr", "sums_ptr", "bias_ptr"), "*fp32") | ints("M", "i32")
    constants = {"CLUSTERED": clustered, "ZEROS": True, "BIASED": True, "BN": rows, "BM": columns, "BK": 128}
    constants |= {"SPLIT": 8 if columns == 16 else 1}
    return "linear.cluster", "_cluster_kernel", types, constants, warps, stages


def ternary(columns, rows, block, split, warps, stages):
    types = {"codes_ptr": "*i8", "packed_ptr": "*u8", "sum_ptr": "*i32", "input_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32"}
    types |= ints("N K ROW_BYTES stride_c") | ints("M", "i32") | {"out_ptr": "*i32" if split > 1 else "*fp32"}
    constants = {"SPLIT": split, "BN": rows, "BM": columns, "BK": block}
    return "ternary.linear", "_ternary_kernel", types, constants, warps, stages


def attention(bits, *, dynamic=False, q="*bf16", dim=128):
    from kernels.kv.attention import QUERIES, _tile

    scale = "*fp16" if dynamic else "*fp32"
    types = {"q_ptr": q, "k_ptr": "*u8", "v_ptr": "*u8", "k_scale_ptr": scale, "v_scale_ptr": scale, "scaling": "fp32"}
    types |= dict.fromkeys(("max_ptr", "sum_ptr", "out_ptr"), "*fp32") | ints("kb kh kt vb vh vt")
    types |= {} if dynamic else {"k_zero_ptr": "*fp32", "v_zero_ptr": "*fp32"}
    types |= {"k_first_ptr": q, "v_first_ptr": q}
    types |= ints("SLOTS SPLITS KV_HEADS GROUP ksb ksh kst vsb vsh vst", "i32")
    tokens, warps, stages = _tile(dim, {"*bf16": torch.bfloat16, "*fp32": torch.float32}[q], (bits, bits))
    constants = {"E": dim, "KEY_BITS": bits, "VALUE_BITS": bits, "DYNAMIC": dynamic, "FIRST": 1, "ON_DEVICE": False}
    return "kv.attention", "_attend_kernel", types, constants | {"BG": QUERIES, "BE": dim, "BL": tokens}, warps, stages


def norm(kind, x="*bf16", block=4096):
    from kernels.tiles import row_warps

    types = dict.fromkeys(("x_ptr", "residual_ptr", "hidden_ptr", "weight_ptr"), x) | {"order_ptr": "*i32", "codes_ptr": "*i8"}
    types |= ints("D stride_x stride_r") | dict.fromkeys(("eps", "TOP", "FACTOR"), "fp32")
    static = kind == "static"
    types |= {"scale_ptr": "*fp32", "zero_ptr": "*fp32"} if static else {"row_scale_ptr": "*fp32", "sum_ptr": "*i32"}
    constants = {"LAYER": False, "ADD": True, "WEIGHTED": True, "BIASED": False, "ORDERED": True, "KIND": kind}
    return "norm_quant", "_norm_quant_kernel", types, constants | {"BITS": 4, "BLOCK": block}, row_warps(block), 3


def topk(x="*bf16", block=4096):
    from kernels.tiles import row_warps

    types = {"x_ptr": x, "codes_ptr": "*i8", "scale_ptr": "*fp32", "sum_ptr": "*i32"} | ints("D COUNT stride_x")
    return "topk", "_topk_kernel", types, {"ZERO_BITS": 16 if x == "*bf16" else 0, "BLOCK": block}, row_warps(block), 3


def store(bits, x="*bf16", *, dynamic=True):
    types = {"x_ptr": x, "out_ptr": "*u8", "slot_ptr": "*i32"} | ints("K xa xb xt oa ob ot")
    types |= {"row_scale_ptr": "*fp16"} if dynamic else {"scale_ptr": "*fp32", "zero_ptr": "*fp32"}
    types |= ints("ROWS B T sa sb st scale_b", "i32")
    block = {3: 32, 4: 64, 7: 64, 8: 128}[bits]
    constants = {"MODE": 2 if dynamic else 1, "BITS": bits, "AT_SLOT": True, "BR": 16, "BJ": block, "BK": 128}
    return "packing.kernel", "_pack_kernel", types, constants, 4, 3


def rope(x="*bf16"):
    types = {"x_ptr": x, "order_ptr": "*i32", "out_ptr": x, "scaling": "fp32"} | ints("xb xh xt cb ct")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "scale_ptr", "zero_ptr"), "*fp32") | ints("ROWS H T GROUP", "i32")
    return "rope", "_rope_kernel", types, {"E": 128, "ORDERED": True, "BITS": 4, "BR": 8, "BE": 128}, 4, 3


def sparse(kernel):
    types = {"codes_ptr": "*i8", "index_ptr": "*i32", "count_ptr": "*i32"}
    if kernel == "_up_kernel":
        types |= {
            "packed_ptr": "*u8",
            "gate_ptr": "*fp32",
            "sum_ptr": "*i32",
            "input_scale_ptr": "*fp32",
            "weight_scale_ptr": "*fp32",
        }
        types |= {"out_ptr": "*fp32"} | ints("K F ROW_BYTES stride_c stride_g")
        return "ternary.sparse", kernel, types, {"BR": 16, "BK": 256}, 4, 3
    types |= {"transposed_ptr": "*u8", "out_ptr": "*i32"} | ints("N ROW_BYTES stride_c")
    return "ternary.sparse", kernel, types, {"SPLIT": 8, "BF": 16, "BN": 256}, 4, 3


CASES = {  # what is compiled, the matrix instruction in the machine code, most registers
    "W4A16 decode": (weight_only(4, 128), "HGMMA", 208),
    "W3A16 decode": (weight_only(3, 32), "HGMMA", 144),
    "W4A16 decode, clusters": (weight_only(4, 64, clustered=True), "HGMMA", 168),
    "W4A16 prefill": (weight_only(4, 64, rows=128, columns=64, stages=3), "HGMMA", 224),
    "W3A16 prefill, clusters": (weight_only(3, 16, clustered=True, rows=64, columns=64, stages=3), "HGMMA", 240),
    "W4 float32 decode": (weight_only(4, 32, x="*fp32"), "HGMMA", 128),
    "W4A8 prefill, clusters": (cluster(128, 128, 8, 3), "IGMMA", 255),
    "W4A8 prefill, one cluster": (cluster(128, 128, 8, 3, clustered=False), "IGMMA", 176),
    "W4A8 decode": (cluster(16, 64, 4, 4), "IGMMA", 96),
    "W2A8 decode": (ternary(16, 64, 128, 4, 4, 4), "IGMMA", 144),
    "W2A8 prefill": (ternary(128, 128, 32, 1, 8, 3), "IGMMA", 176),
    "KV4 attention": (attention(4), "HMMA", 208),
    "KV3 attention, per token": (attention(3, dynamic=True), "HMMA", 192),
    "KV8 attention": (attention(8), "HMMA", 192),
    "KV4 attention, heads of 256": (attention(4, dim=256), "HMMA", 255),
    "KV4 attention, float32": (attention(4, q="*fp32"), "HMMA", 255),
    "KV3 attention, per token, float32": (attention(3, dynamic=True, q="*fp32"), "HMMA", 255),
    "KV7 attention, per token, float32": (attention(7, dynamic=True, q="*fp32"), "HMMA", 255),
    "KV4 attention, heads of 256, float32": (attention(4, q="*fp32", dim=256), "HMMA", 255),
    "KV3 attention, per token, heads of 256, float32": (attention(3, dynamic=True, q="*fp32", dim=256), "HMMA", 255),
    "norm, static": (norm("static"), None, 96),
    "norm, per token": (norm("int8"), None, 96),
    "norm, static, float32": (norm("static", "*fp32"), None, 96),
    "norm, per token, float32": (norm("int8", "*fp32"), None, 96),
    "norm, static, widest, float32": (norm("static", "*fp32", 16384), None, 128),
    "top-K": (topk(), None, 128),
    "top-K, float32": (topk("*fp32"), None, 128),
    "top-K, widest, float32": (topk("*fp32", 16384), None, 128),
    "KV3 append": (store(3), None, 192),
    "KV3 append, float32": (store(3, "*fp32"), None, 192),
    "KV7 append, float32": (store(7, "*fp32"), None, 192),
    "KV4 append, static, float32": (store(4, "*fp32", dynamic=False), None, 128),
    "rope": (rope(), None, 128),
    "rope, float32": (rope("*fp32"), None, 128),
    "gate first": (sparse("_up_kernel"), None, 160),
    "sparse down": (sparse("_down_kernel"), None, 192),
}


SPILLS = {"KV4 attention, heads of 256, float32": 200, "KV3 attention, per token, heads of 256, float32": 88}
"""Bytes of stack of the cases that have some: three-part products in float32 of heads of 256 channels."""

SHARED = 99 * 1024
"""Bytes of shared memory that a program has at most on GPUs of compute capability 8.6, 8.9 and 12.0."""
HOPPER_SHARED = {"W4A8 prefill, clusters": 128 * 1024, "W4A8 prefill, one cluster": 128 * 1024}
"""Cases that take more, which Hopper has: its products read both operands there. Compiled for 8.9 and 12.0 they take 96 KiB."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, dict]:
    """What each case compiled to; all of them in one process that does not interpret and shares no cache."""
    cases = [
        {"module": f"kernels.{m}", "kernel": k, "types": t, "constants": c, "warps": w, "stages": s}
        for (m, k, t, c, w, s), _, _ in CASES.values()
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm90"], cwd=ROOT, env=environment, input=json.dumps(cases), capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_machine_code(case, built):
    _, instruction, registers = CASES[case]
    got = built[case]
    assert got["stack"] <= SPILLS.get(case, 0) and got["local"] == 0, got
    assert case in SPILLS or got["LDL"] == got["STL"] == 0, got
    assert got["registers"] <= registers and got["shared"] <= HOPPER_SHARED.get(case, SHARED), got
    matrix = {name for name in ("HGMMA", "IGMMA", "HMMA", "IMMA") if got[name]}
    assert matrix == ({instruction} if instruction else set()), got


@pytest.mark.parametrize("case", [c for c, (_, instruction, _) in CASES.items() if instruction and "of 256, float32" not in c])
def test_packed_weights_arrive_asynchronously(case, built):
    assert built[case]["LDGSTS"] > 0, built[case]
