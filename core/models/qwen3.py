"""Qwen3: Llama's layer with an RMSNorm per head on q and k, before the rotation."""

from core.models.adapter import ADAPTERS, ModelAdapter

QWEN3 = ADAPTERS.register(
    "qwen3", ModelAdapter(name="Qwen3", model_types=("qwen3",), norm="rms", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
)
