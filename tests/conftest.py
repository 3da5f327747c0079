"""Settings of the whole session that must come before any import of Triton (transformers imports it for BitNet)."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors: see kernels/_triton.py
