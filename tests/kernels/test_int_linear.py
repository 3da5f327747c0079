"""The integer layer against float64 arithmetic on its own integer codes, on sizes that fit no tile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import Backend, Choice, int_linear, pack, select_linear_backend
from kernels.int_linear import LinearOperands, exact_int8_products, kernels_take_codes

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

    def reference(self) -> LinearOperands:
        weight = self.sw[:, self.run] * (self.qw.float() - self.zw[:, self.run])
        return LinearOperands(Backend.REFERENCE, self.offsets, self.bias, weight=weight)

    def int8(self) -> LinearOperands:
        """Folded exactly as the module's text says, in float64, so that the test does not repeat QuantLinear's code."""
        scale = self.sx.double()[:, None] * self.sw.double().t()
        weight = self.sw.double()[:, self.run] * (self.qw.double() - self.zw.double()[:, self.run])
        folded = -(weight * (self.sx.double() * self.zx.double())[self.run]).sum(1)
        bias = folded if self.bias is None else folded + self.bias.double()
        return LinearOperands(
            Backend.INT8,
            self.offsets,
            bias.float(),
            codes=self.qw,
            output_scale=scale.float(),
            zero_rows=(scale * self.zw.double().t()).float(),
        )


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", (2, 4, 7, pytest.param(8, marks=NEEDS_EXACT)))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_both_backends_against_float64(shape, bits, bias):
    case = Case(*SHAPES[shape], bits=bits, bias=bias)
    exact = case.exact()
    assert error(int_linear(case.qx, case.int8()), exact) < 2e-6  # measured: at most 3e-7
    assert error(int_linear(case.x_hat(), case.reference()), exact) < 2e-6


@pytest.mark.parametrize("rows", range(1, 18))
def test_every_small_number_of_rows(rows):
    case = Case(rows, 37, 11, (0, 3, 4, 37), seed=rows)
    found = int_linear(case.qx, case.int8())
    assert found.shape == (rows, 11) and found.dtype == torch.float32 and error(found, case.exact()) < 2e-6


def test_large_zero_points_fold_into_the_bias():
    case = Case(6, 80, 10, (0, 40, 80), zero=4000)
    assert error(int_linear(case.qx, case.int8()), case.exact()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulators_are_exact_integers(shape):
    """With unit scales and no zero points the INT8 path returns the int64 product itself, bit for bit."""
    case = Case(*SHAPES[shape], bits=7, zero=0, bias=False)
    clusters = len(case.offsets) - 1
    ones, zeros = torch.ones(clusters, case.qw.shape[0]), torch.zeros(clusters, case.qw.shape[0])
    operands = LinearOperands(Backend.INT8, case.offsets, None, codes=case.qw, output_scale=ones, zero_rows=zeros)
    exact = case.qx.to(torch.int64) @ case.qw.to(torch.int64).t()
    assert int(exact.abs().max()) < 2**24  # float32 holds the integer
    assert torch.equal(int_linear(case.qx, operands).to(torch.int64), exact)


@pytest.mark.parametrize("bits", (4, 7, pytest.param(8, marks=NEEDS_EXACT)))
@pytest.mark.parametrize("rows", (1, 2, 40))
def test_worst_case_sums_do_not_saturate(bits, rows):
    """All four corners: pairs of such products leave int16, where AVX2 without VNNI would saturate."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ones = torch.ones(1, 3)
    for x in (-128, 127):
        for w in (low, high):
            qx, qw = torch.full((rows, 512), x, dtype=torch.int8), torch.full((3, 512), w, dtype=torch.int8)
            operands = LinearOperands(Backend.INT8, (0, 512), None, codes=qw, output_scale=ones, zero_rows=ones)
            assert int_linear(qx, operands).unique().tolist() == [x * w * 512 - x * 512]


def test_strided_codes():
    case = Case(8, 50, 12, (0, 7, 50))
    wide = torch.zeros(8, 100, dtype=torch.int8)
    wide[:, ::2] = case.qx
    columns = case.qx.t().contiguous().t()
    exact = case.exact()
    for x in (wide[:, ::2], columns):
        assert not x.is_contiguous() and error(int_linear(x, case.int8()), exact) < 2e-6


@pytest.mark.parametrize("stride", (0, 1, 16, 64, 200))
def test_a_single_row_of_any_stride(stride):
    """torch._int_mm takes the row's stride for a leading dimension and returns garbage when it is below the width."""
    case = Case(1, 64, 16, (0, 64))
    row = torch.zeros(256, dtype=torch.int8)
    row[:64] = case.qx[0]
    assert error(int_linear(row.as_strided((1, 64), (stride, 1)), case.int8()), case.exact()) < 2e-6


def test_operands_are_not_changed():
    case = Case(4, 30, 6, (0, 10, 30))
    operands = case.int8()
    kept = [t.clone() for t in (operands.bias, operands.codes, operands.output_scale, operands.zero_rows, case.qx)]
    first, second = int_linear(case.qx, operands), int_linear(case.qx, operands)
    assert torch.equal(first, second)
    after = (operands.bias, operands.codes, operands.output_scale, operands.zero_rows, case.qx)
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@pytest.mark.parametrize("offsets", [(0, 64), (0, 32, 64), (0, 20, 64)], ids=str)
def test_the_triton_operands_give_the_layer(offsets):
    """On tensors that are not on a GPU the ops run their references: what is checked here is what they are handed."""
    case = Case(5, 64, 7, offsets)
    packed = pack((case.qw + 8).to(torch.uint8), 4)
    int8 = case.int8()
    with_codes = LinearOperands(
        Backend.TRITON, offsets, int8.bias, output_scale=int8.output_scale, zero_rows=int8.zero_rows, packed=packed, bits=4
    )
    assert torch.allclose(int_linear(case.qx, with_codes).double(), case.exact(), atol=1e-5)
    floating = LinearOperands(Backend.TRITON, offsets, case.bias, packed=packed, scale=case.sw, zero_point=case.zw, bits=4)
    x = case.sx[case.run] * (case.qx - case.zx[case.run])
    assert torch.allclose(int_linear(x[None], floating)[0].double(), case.exact(), atol=1e-4)
    assert with_codes.takes_codes and not floating.takes_codes and floating.nbytes == 0
    assert kernels_take_codes(4, 8, offsets) == (20 not in offsets)


def test_working_bytes_are_counted():
    case = Case(4, 30, 6, (0, 10, 30))
    assert case.int8().nbytes == 6 * 30 + 2 * 6 * 4 * 2 and case.reference().nbytes == 6 * 30 * 4


SELECT = {"weight_bits": 4, "activation_bits": 8, "offsets": (0, 256), "rows": 48, "device": torch.device("cpu")}
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "change, backend, words",
    [
        ({}, Backend.INT8, "1 cluster of about 256 columns"),
        ({"offsets": (0, 192, 384)}, Backend.INT8, "2 clusters of about 192"),
        ({"offsets": (0, 100, 382)}, Backend.REFERENCE, "2 clusters of about 191 columns"),
        ({"offsets": tuple(range(257))}, Backend.REFERENCE, "256 clusters"),
        ({"activation_bits": 16, "offsets": (0, 100, 256)}, Backend.REFERENCE, "not multiples of 32"),
        ({"activation_bits": 16, "weight_bits": 5}, Backend.REFERENCE, "5-bit weights do not fit"),
        ({"activation_bits": 16, "rows": 20}, Backend.REFERENCE, "20 output channels"),
        ({"activation_bits": 16, "weight_bits": 16}, Backend.REFERENCE, "activations stay in float"),
        ({"weight_bits": 16}, Backend.REFERENCE, "weights stay in float"),
        ({"device": torch.device("mps")}, Backend.REFERENCE, "mps"),
        ({"device": CUDA}, Backend.TRITON, "packed weights and integer codes on the GPU"),
        ({"device": CUDA, "offsets": (0, 100, 256)}, Backend.TRITON, "more than 256 rows are float products"),
        ({"device": CUDA, "activation_bits": 16}, Backend.TRITON, "more than 256 rows are float products"),
        ({"device": CUDA, "weight_bits": 5}, Backend.REFERENCE, "5-bit weights have no kernel"),
        ({"device": CUDA, "weight_bits": 16}, Backend.REFERENCE, "weights stay in float"),
        ({"activation_bits": 2}, Backend.INT8, "fill"),
    ],
    ids=(
        "wide",
        "just wide enough",
        "just too narrow",
        "per channel",
        "float input, odd clusters",
        "float input, 5 bits",
        "float input, odd rows",
        "float input and weight",
        "float weight",
        "other device",
        "cuda",
        "cuda, odd clusters",
        "cuda, float input",
        "cuda, 5 bits",
        "cuda, float weight",
        "2 bits",
    ),
)
def test_auto_chooses_and_says_why(change, backend, words, capability):
    choice = select_linear_backend(Backend.AUTO, **(SELECT | change))
    assert choice.backend is backend and words in choice.reason and len(choice.reason) < 160


@pytest.mark.parametrize(
    "change",
    ({"activation_bits": 16}, {"weight_bits": 16}, {"device": CUDA}),
    ids=("float input", "float weight", "other device"),
)
def test_int8_by_name_never_falls_back(change):
    with pytest.raises(ValueError, match="use reference"):
        select_linear_backend(Backend.INT8, **(SELECT | change))


def test_a_gpu_too_old_for_the_kernels_is_named(capability):
    """A T4 would fail to compile them in the first forward pass."""
    capability(7, 5)
    choice = select_linear_backend(Backend.AUTO, **(SELECT | {"device": CUDA}))
    reason = "compute capability 7.5, kernels need 8.0"
    assert choice == Choice(Backend.REFERENCE, f"no kernel runs this layer: {reason}")
    with pytest.raises(ValueError, match="compute capability 7.5"):
        select_linear_backend(Backend.TRITON, **(SELECT | {"device": CUDA}))
    capability(8, 0)
    assert select_linear_backend(Backend.AUTO, **(SELECT | {"device": CUDA})).backend is Backend.TRITON


def test_triton_by_name_never_falls_back(capability):
    assert select_linear_backend(Backend.TRITON, **(SELECT | {"device": CUDA})).reason == "asked for"
    for change, words in (({}, "not on cpu"), ({"device": CUDA, "weight_bits": 3, "offsets": (0, 12)}, "multiple of 8")):
        with pytest.raises(ValueError, match=words):
            select_linear_backend(Backend.TRITON, **(SELECT | change))


@pytest.mark.parametrize("requested", (Backend.INT8, Backend.REFERENCE))
def test_a_backend_asked_for_by_name_is_taken(requested):
    narrow = SELECT | {"offsets": tuple(range(257))}  # AUTO would choose otherwise for INT8
    choice = select_linear_backend(requested, **narrow)
    assert choice.backend is requested and choice.reason == "asked for"


@pytest.mark.parametrize("exact", (True, False), ids=("vnni", "no vnni"))
def test_8_bit_weights_need_exact_products(exact, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.int_linear"], "exact_int8_products", lambda: exact)
    eight = SELECT | {"weight_bits": 8}
    if exact:
        assert select_linear_backend(Backend.AUTO, **eight).backend is Backend.INT8
        return
    choice = select_linear_backend(Backend.AUTO, **eight)
    assert choice.backend is Backend.REFERENCE and "saturate" in choice.reason
    with pytest.raises(ValueError, match="saturates on this processor"):
        select_linear_backend(Backend.INT8, **eight)
    assert select_linear_backend(Backend.INT8, **(SELECT | {"weight_bits": 7})).backend is Backend.INT8


def test_the_probe_finds_a_processor_without_vnni():
    """oneDNN can be held to older instructions: the probe must then agree with a direct comparison."""
    code = (
        "import torch; from kernels.int_linear import exact_int8_products as probe; g = torch.Generator().manual_seed(0); "
        "a = torch.randint(-128, 128, (40, 512), generator=g).to(torch.int8); "
        "b = torch.randint(-128, 128, (24, 512), generator=g).to(torch.int8); "
        "same = torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t()); assert probe() == same, same; "
        "b = b // 2; assert torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    )
    assert done.returncode == 0, done.stderr
