"""The integer layer against float64 arithmetic on its own integer codes, on sizes that fit no tile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import pack
from kernels.linear import ReferenceOperands
from kernels.linear.choose import kernels_take_codes
from kernels.linear.int8 import ROWS_TO_SHARE, Int8Operands, exact_int8_products

SHAPES = {
    "one cluster": (7, 64, 32, (0, 64)),
    "one column": (3, 1, 5, (0, 1)),
    "odd width": (5, 63, 7, (0, 20, 63)),
    "single rows": (1, 100, 33, (0, 1, 100)),
    "one column clusters": (4, 9, 6, tuple(range(10))),
    "many rows": (17, 100, 13, (0, 31, 32, 99, 100)),
    "one output": (2, 48, 1, (0, 5, 48)),
    "wide": (3, 1031, 9, (0, 500, 501, 1031)),
}


NEEDS_EXACT = pytest.mark.skipif(not exact_int8_products(), reason="this processor's int8 products saturate at 8-bit weights")


class Case:
    """A random layer by its integers. Scales make the output of order one."""

    def __init__(
        self,
        rows: int,
        width: int,
        outputs: int,
        offsets: tuple[int, ...],
        *,
        bits: int = 4,
        zero: int = 40,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        clusters = len(offsets) - 1
        self.offsets = offsets
        self.run = torch.repeat_interleave(torch.arange(clusters), torch.tensor(offsets).diff())
        self.qx = torch.randint(-128, 128, (rows, width), generator=g).to(torch.int8)
        self.qw = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, width), generator=g).to(torch.int8)
        self.sx = (torch.rand(clusters, generator=g) + 0.5) / 128
        self.zx = torch.randint(-zero, zero + 1, (clusters,), generator=g).float()
        self.sw = (torch.rand(outputs, clusters, generator=g) + 0.5) / (2**bits * width**0.5)
        self.zw = torch.randint(-zero // 4, zero // 4 + 1, (outputs, clusters), generator=g).float()
        self.bias = torch.randn(outputs, generator=g) if bias else None

    def exact(self) -> Tensor:
        """Σ sx (qx - zx) sw (qw - zw) + b in float64, from the integers alone."""
        x = self.sx.double()[self.run] * (self.qx.double() - self.zx.double()[self.run])
        w = self.sw.double()[:, self.run] * (self.qw.double() - self.zw.double()[:, self.run])
        y = x @ w.t()
        return y if self.bias is None else y + self.bias.double()

    def x_hat(self) -> Tensor:
        return self.sx[self.run] * (self.qx.float() - self.zx[self.run])

    def reference(self) -> ReferenceOperands:
        return ReferenceOperands(self.sw[:, self.run] * (self.qw.float() - self.zw[:, self.run]), self.bias)

    def int8(self) -> Int8Operands:
        """Folded exactly as the module's text says, in float64, so that the test does not repeat QuantLinear's code."""
        scale = self.sx.double()[:, None] * self.sw.double().t()
        weight = self.sw.double()[:, self.run] * (self.qw.double() - self.zw.double()[:, self.run])
        folded = -(weight * (self.sx.double() * self.zx.double())[self.run]).sum(1)
        bias = folded if self.bias is None else folded + self.bias.double()
        return Int8Operands(self.qw, scale.float(), (scale * self.zw.double().t()).float(), bias.float(), self.offsets)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", (2, 4, 7, pytest.param(8, marks=NEEDS_EXACT)))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_both_backends_against_float64(shape, bits, bias):
    case = Case(*SHAPES[shape], bits=bits, bias=bias)
    exact = case.exact()
    assert error(case.int8().product(case.qx), exact) < 2e-6  # measured: at most 3e-7
    assert error(case.reference().product(case.x_hat()), exact) < 2e-6


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("inference", (True, False))
def test_tiles_on_several_threads(threads, inference):
    """Rows and channels that end inside a tile; the number of threads and the mode are the caller's before and after."""
    case, before = Case(ROWS_TO_SHARE + 39, 70, 1100, (0, 30, 70)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(inference):
            found = case.int8().product(case.qx)
            assert found.is_inference() is inference and torch.is_inference_mode_enabled() is inference
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert error(found, case.exact()) < 2e-6


@pytest.mark.parametrize("rows", range(1, 18))
def test_every_small_number_of_rows(rows):
    case = Case(rows, 37, 11, (0, 3, 4, 37), seed=rows)
    found = case.int8().product(case.qx)
    assert found.shape == (rows, 11) and found.dtype == torch.float32 and error(found, case.exact()) < 2e-6


def test_large_zero_points_fold_into_the_bias():
    case = Case(6, 80, 10, (0, 40, 80), zero=4000)
    assert error(case.int8().product(case.qx), case.exact()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulators_are_exact_integers(shape):
    """With unit scales and no zero points the INT8 path returns the int64 product itself, bit for bit."""
    case = Case(*SHAPES[shape], bits=7, zero=0, bias=False)
    clusters = len(case.offsets) - 1
    ones, zeros = torch.ones(clusters, case.qw.shape[0]), torch.zeros(clusters, case.qw.shape[0])
    operands = Int8Operands(case.qw, ones, zeros, None, case.offsets)
    exact = case.qx.to(torch.int64) @ case.qw.to(torch.int64).t()
    assert int(exact.abs().max()) < 2**24  # float32 holds the integer
    assert torch.equal(operands.product(case.qx).to(torch.int64), exact)


@pytest.mark.parametrize("bits", (4, 7, pytest.param(8, marks=NEEDS_EXACT)))
@pytest.mark.parametrize("rows", (1, 2, 40))
def test_worst_case_sums_do_not_saturate(bits, rows):
    """All four corners: pairs of such products leave int16, where AVX2 without VNNI would saturate."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ones = torch.ones(1, 3)
    for x in (-128, 127):
        for w in (low, high):
            qx, qw = torch.full((rows, 512), x, dtype=torch.int8), torch.full((3, 512), w, dtype=torch.int8)
            operands = Int8Operands(qw, ones, ones, None, (0, 512))
            assert operands.product(qx).unique().tolist() == [x * w * 512 - x * 512]


def test_strided_codes():
    case = Case(8, 50, 12, (0, 7, 50))
    wide = torch.zeros(8, 100, dtype=torch.int8)
    wide[:, ::2] = case.qx
    columns = case.qx.t().contiguous().t()
    exact = case.exact()
    for x in (wide[:, ::2], columns):
        assert not x.is_contiguous() and error(case.int8().product(x), exact) < 2e-6


@pytest.mark.parametrize("stride", (0, 1, 16, 64, 200))
def test_a_single_row_of_any_stride(stride):
    """torch._int_mm takes the row's stride for a leading dimension and returns garbage when it is below the width."""
    case = Case(1, 64, 16, (0, 64))
    row = torch.zeros(256, dtype=torch.int8)
    row[:64] = case.qx[0]
    assert error(case.int8().product(row.as_strided((1, 64), (stride, 1))), case.exact()) < 2e-6


def test_operands_are_not_changed():
    case = Case(4, 30, 6, (0, 10, 30))
    operands = case.int8()
    kept = [t.clone() for t in (operands.bias, operands.codes, operands.output_scale, operands.zero_rows, case.qx)]
    first, second = operands.product(case.qx), operands.product(case.qx)
    assert torch.equal(first, second)
    after = (operands.bias, operands.codes, operands.output_scale, operands.zero_rows, case.qx)
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@pytest.mark.parametrize("offsets", [(0, 64), (0, 32, 64), (0, 20, 64)], ids=str)
def test_the_triton_operands_give_the_layer(offsets):
    """On tensors that are not on a GPU the ops run their references: what is checked here is what they are handed."""
    from kernels.linear.cluster import ClusterOperands
    from kernels.linear.weight_only import WeightOnlyOperands

    case = Case(5, 64, 7, offsets)
    packed = pack((case.qw + 8).to(torch.uint8), 4)
    int8 = case.int8()
    with_codes = ClusterOperands(packed, int8.output_scale, int8.zero_rows, int8.bias, offsets)
    assert torch.allclose(with_codes.product(case.qx).double(), case.exact(), atol=1e-5)
    floating = WeightOnlyOperands(packed, case.sw, case.zw, case.bias, 4, offsets)
    x = case.sx[case.run] * (case.qx - case.zx[case.run])
    assert torch.allclose(floating.product(x[None])[0].double(), case.exact(), atol=1e-4)
    assert with_codes.takes_codes and int8.takes_codes and not floating.takes_codes and not case.reference().takes_codes
    assert kernels_take_codes(4, 8, offsets) == (20 not in offsets)


def test_the_probe_finds_a_processor_without_vnni():
    """oneDNN can be held to older instructions: the probe must then agree with a direct comparison."""
    code = (
        "import torch; from kernels.linear.int8 import exact_int8_products as probe; g = torch.Generator().manual_seed(0); "
        "a = torch.randint(-128, 128, (40, 512), generator=g).to(torch.int8); "
        "b = torch.randint(-128, 128, (24, 512), generator=g).to(torch.int8); "
        "same = torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t()); assert probe() == same, same; "
        "b = b // 2; assert torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    )
    assert done.returncode == 0, done.stderr
