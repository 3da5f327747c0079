"""Low-bit linear layers with one scale per input cluster: y = x̂ Ŵᵀ + b.

    x̂[m, k] = sx[c] (qx[m, k] - zx[c])          Ŵ[n, k] = sw[n, c] (qw[n, k] - zw[n, c])          c = cluster of column k

Clusters are contiguous runs of columns given by `offsets` [G + 1]. Activation scales are static, so their zero points become
part of a bias computed once, and only Σ qx per cluster is left for the weights' zero points:

    y[m, n] = Σ_c sx[c] sw[n, c] ( Σ_k qx qw  -  zw[n, c] Σ_k qx )  +  b'[n]
    b'[n]   = b[n] - Σ_c sx[c] zx[c] Σ_k Ŵ[n, k]                                       (docs/rptq.md, integer identity)

Each backend has its own file with its own operands, the form in which it multiplies with a weight:

    operands.py      the interface of all operands, and REFERENCE, which multiplies x̂ and Ŵ in float32
    int8.py          INT8: integer codes of inputs and weights, on CPUs
    int4.py          INT4: 4-bit weights and few rows of floats, on CPUs
    cluster.py       TRITON: 4-bit weights and integer codes; the op `cluster_linear`
    weight_only.py   TRITON: weights of 2, 3, 4 or 8 bits and floats; the op `weight_only_linear`
    choose.py        chooses the backend of a layer, and says why
    pace.py          measures from how many columns per cluster INT8 is faster than REFERENCE
"""

from __future__ import annotations

from kernels.linear.choose import select_linear_backend
from kernels.linear.operands import LinearOperands, ReferenceOperands

__all__ = ["LinearOperands", "ReferenceOperands", "select_linear_backend"]
