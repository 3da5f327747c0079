"""Quantise models that are larger than the memory: layer by layer from their files, resumable after each."""
