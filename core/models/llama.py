"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. SmolLM and SmolLM2 are this architecture."""

from core.models.adapter import ADAPTERS, ModelAdapter

LLAMA = ADAPTERS.register("llama", ModelAdapter(name="Llama", model_types=("llama",), norm="rms"))
