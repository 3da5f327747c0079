"""Quantisation methods, registered by name: one line each."""

from core.methods import bitnet as bitnet  # noqa: F401
from core.methods import rtn  # noqa: F401
from core.methods.base import METHODS
from core.methods.rptq import method  # noqa: F401

__all__ = ["METHODS"]
