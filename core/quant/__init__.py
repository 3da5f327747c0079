"""Quantisation grids, packed storage and low-bit layers, as functions and modules of tensors."""
