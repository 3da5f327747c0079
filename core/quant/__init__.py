"""Grids, packed storage and low-bit layers: tensors in, tensors out."""
