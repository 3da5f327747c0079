"""Packed keys and values of attention: their store, adding new ones, and attention over them.

    STATIC   x = s[h, e] (u - z[h, e])            scales per head and channel, known in advance (RPTQ, arXiv:2304.01089)
    DYNAMIC  x = s[t] (u - code_offset(bits))     one scale per token and head (BitNet a4.8, arXiv:2411.04965, section 2.3)

`heads.py` is the store, `append.py` the op `kv_append`, `attention.py` the op `decode_attention` with its Triton kernels, and
`folded.py` its path on CPUs.
"""

from __future__ import annotations

from kernels.kv.heads import PackedHeads

__all__ = ["PackedHeads"]
