"""Qwen2: Llama's layer with biases on q, k and v; R2 and R3 permute them with their rows."""

from core.models.adapter import ADAPTERS, ModelAdapter

QWEN2 = ADAPTERS.register("qwen2", ModelAdapter(name="Qwen2", model_types=("qwen2",), norm="rms"))
