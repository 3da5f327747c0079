"""The method "rotation": channels scaled and rotated by Hadamard matrices, grouped GPTQ weights."""
