"""Write quantised models in the formats of other programs, or say why one does not fit."""

FORMATS = ("compressed-tensors", "gguf", "bitnet", "transformers")
"""Formats that a model can be exported in."""
