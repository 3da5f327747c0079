"""Linear layers of ternary weights, -1, 0 or 1, in two bits: exact products, dense or skipping zeros.

`reference.py` defines how weights are stored and multiplies in plain torch; `linear.py` and `sparse.py` are the ops with Triton
kernels. Every path gives the same bits.
"""

from __future__ import annotations

from kernels.ternary.reference import ROW_DENSITY, apply_scales, pack_ternary, ternary_product, unpack_ternary

__all__ = ["ROW_DENSITY", "apply_scales", "pack_ternary", "ternary_product", "unpack_ternary"]
