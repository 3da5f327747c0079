"""Mistral: Llama's layer; the model's own attention mask carries the sliding window."""

from core.models.adapter import ADAPTERS, ModelAdapter

MISTRAL = ADAPTERS.register("mistral", ModelAdapter(name="Mistral", model_types=("mistral",), norm="rms"))
