"""Facts about a model in memory as reports: what it is, which backends it runs on, what quantising a layer cost."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from core.errors import InputError
from core.evaluation.memory import measured_parts
from core.methods.sequential import LayerOutcome
from core.models.architectures import ModelAdapter
from core.models.io.load import LoadedModel, context_of
from core.models.io.quantized import modules_of, parameters_of
from core.report import BackendUse, LayerReport, ModelInfo, QuantizeReport, SiteError, WeightError
from kernels import Backend


def model_info(loaded: LoadedModel, seconds: float) -> ModelInfo:
    """Facts of a loaded model."""
    config, spec = loaded.model.config, loaded.adapter.spec(loaded.model.config)
    parts = measured_parts(loaded.model, loaded.adapter)
    return ModelInfo(
        loaded.name,
        loaded.revision,
        loaded.source,
        config.model_type,
        parameters_of(loaded.model),
        len(loaded.model.blocks),
        spec.hidden,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.ffn,
        config.vocab_size,
        context_of(loaded.model) or 0,
        sum(parts.values()),
        dtype_of(loaded.model),
        seconds,
        fidelity_of(loaded.model, loaded.adapter),
    )


def dtype_of(model: PreTrainedModel) -> str:
    """The float type a model computes in, such as "float32"."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def set_backend(loaded: LoadedModel, backend: str) -> None:
    """Choose the implementation of every quantised linear layer. Raises: BackendError, InputError."""
    if backend not in tuple(Backend):
        raise InputError(f"backend is {str(backend)[:20]!r}: use one of {', '.join(Backend)}.", code="E-PARAM-BACKEND")
    linears = modules_of(loaded.model)
    for linear in linears:
        if linear.requested != backend:
            linear.set_backend(Backend(backend))


def backend_use(loaded: LoadedModel) -> list[BackendUse]:
    """Which backends the linear layers run on, and why; empty for a float model."""
    counts: dict[tuple[str, str], int] = {}
    for linear in modules_of(loaded.model):
        name = (str(linear.choice.backend), linear.choice.reason)
        counts[name] = counts.get(name, 0) + 1
    return [BackendUse(backend, reason, n) for (backend, reason), n in counts.items()]


def fidelity_of(model: PreTrainedModel, adapter: ModelAdapter) -> str | None:
    """What a BitNet model's rules are worth for it (`BitNetRules.fidelity`); None for every other model."""
    rules = model.blocks[0].rules
    return None if rules is None else rules.fidelity


def label_of(loaded: LoadedModel) -> str:
    """One line for tables: what a model quantised here was made by, else its name and what its rules are worth."""
    return loaded.label or " · ".join(filter(None, (loaded.name, fidelity_of(loaded.model, loaded.adapter))))


def layer_report(index: int, outcome: LayerOutcome) -> LayerReport:
    """Describe one quantised layer in plain numbers."""
    sites = {name: SiteError(s.bits, len(s.offsets) - 1, s.sqnr_db) for name, s in outcome.plan.sites.items()}
    return LayerReport(index, outcome.output_sqnr_db, sites, outcome.weights)


def report_from_dict(data: dict[str, Any]) -> QuantizeReport:
    """Inverse of `QuantizeReport.to_dict` (infinite decibels were stored as None and come back infinite)."""

    def decibels(value: float | None) -> float:
        return float("inf") if value is None else value

    layers = []
    for entry in data["layers"]:
        sites = {k: SiteError(**v) for k, v in entry["sites"].items()}
        weights = {k: WeightError(**{**v, "sqnr_db": decibels(v["sqnr_db"])}) for k, v in entry["weights"].items()}
        layers.append(LayerReport(entry["layer"], decibels(entry["output_sqnr_db"]), sites, weights))
    return QuantizeReport(**{**data, "layers": layers, "backends": [BackendUse(**b) for b in data["backends"]]})
