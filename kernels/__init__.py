"""Low-bit operations: one file per op, each with its reference. Importing this package touches no device.

`__version__` stays "0.0.0": transformers probes for another package of this name by importing it, and reads that
number to decide that it is too old to use.
"""

from kernels.backend import Backend, Choice
from kernels.int_linear import int_linear, select_linear_backend
from kernels.packing import pack, packed_width, unpack
from kernels.quantize import dequantize, fake_quantize, quantize

__version__ = "0.0.0"

__all__ = [
    "Backend",
    "Choice",
    "dequantize",
    "fake_quantize",
    "int_linear",
    "pack",
    "packed_width",
    "quantize",
    "select_linear_backend",
    "unpack",
]
