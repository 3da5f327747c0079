"""Describe a model in memory as reports: what it is, its backends, what quantising a layer cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.distill_report import DistillReport
from core.errors import InputError
from core.evaluation.memory import measured_parts, module_bytes
from core.methods.sequential import LayerOutcome
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.io.origin import Origin
from core.models.io.quantized import modules_of, parameters_of
from core.models.loaded import LoadedModel, context_of
from core.recipe import QuantRecipe
from core.report import BackendUse, LayerReport, ModelInfo, QuantizeReport, Report, SiteError, WeightError
from kernels import Backend


def model_info(loaded: LoadedModel, seconds: float) -> ModelInfo:
    """Describe a loaded model; `seconds`: how long loading took."""
    config, spec, positions = loaded.model.config, loaded.adapter.widest(loaded.model.config), loaded.model.decoder.positions
    table, head = loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight
    return ModelInfo(
        name=loaded.name,
        revision=loaded.revision,
        source=loaded.source,
        architecture=config.model_type,
        parameters=parameters_of(loaded.model),
        layers=len(loaded.model.blocks),
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffn=spec.ffn,
        vocab=config.vocab_size,
        context=context_of(loaded.model) or 0,
        weight_bytes=sum(measured_parts(loaded.model).values()),
        dtype=dtype_of(loaded.model),
        load_seconds=seconds,
        fidelity=fidelity_of(loaded.model),
        gated=spec.gated,
        tied=table.data_ptr() == head.data_ptr(),
        positions=0 if positions is None else positions.num_embeddings,
        label=label_of(loaded),
        precision="" if loaded.origin is None else loaded.origin.precision,
        lossy_source=loaded.origin is not None and loaded.origin.lossy,
        caution=lossy_caution(loaded.origin),
        experts=spec.experts,
        top_k=spec.top_k,
    )


def lossy_caution(origin: Origin | None) -> str | None:
    """Say what weights that had been rounded before mean for comparisons of weight bits; None for weights that had not."""
    if origin is None or not origin.lossy:
        return None
    return (
        f"{origin.label}: these weights were {origin.precision} before. They already hold few values, so fewer weight bits cost "
        "less here than on a model that was float."
    )


def caution_of(loaded: LoadedModel, reference: LoadedModel | None = None) -> str | None:
    """Say which warnings belong to measures of a model, alone or against a reference; None without any."""
    quantised, own = loaded.label is not None, loaded.origin
    said = []
    if quantised and own and reference and reference.origin and not own.same_weights(reference.origin):
        said.append(
            f"The reference {reference.origin.label} is not the model that this one was made from, {own.label}: the two differ "
            "before anything is quantised."
        )
    compared = [own, *([reference.origin] if reference else [])] if quantised or reference else []
    said += dict.fromkeys(filter(None, map(lossy_caution, compared)))
    return " ".join(said) or None


def dtype_of(model: CausalModel) -> str:
    """Name the float type that a model computes in, such as "float32"."""
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
    """Count the linear layers by the backend that they run on and its reason; empty for a float model."""
    return _counted((str(linear.choice.backend), linear.choice.reason) for linear in modules_of(loaded.model))


def _counted(choices: Iterable[tuple[str, str]]) -> list[BackendUse]:
    """Count equal pairs of backend and reason, in the order in which they come first."""
    return [BackendUse(backend, reason, n) for (backend, reason), n in Counter(choices).items()]


def fidelity_of(model: CausalModel) -> str | None:
    """Say how close a BitNet model's rules are to its training (`BitNetRules.fidelity`); None for every other model."""
    rules = model.blocks[0].rules if len(model.blocks) else None
    return None if rules is None else rules.fidelity


def label_of(loaded: LoadedModel) -> str:
    """Name a model in one line: a quantised one with its recipe, a float one with the precision and place of its weights
    (`Origin.label`), a BitNet model with `fidelity_of`."""
    if loaded.label:
        return loaded.label
    fidelity = fidelity_of(loaded.model)
    return f"{loaded.name} · {fidelity}" if fidelity else loaded.origin.label if loaded.origin else loaded.name


@dataclass(frozen=True)
class LayerRecord(Report):
    """What the report of a quantisation needs of one layer.

    Attributes:
        report: the layer in plain numbers.
        linears: of each low-bit linear layer its weights' number, their stored bits, the backend and its reason.
        weight_bytes, float_bytes: of the quantised and of the original layer's tensors.
        fidelity: as `fidelity_of`.
    """

    report: LayerReport
    linears: list[tuple[int, float, str, str]]
    weight_bytes: int
    float_bytes: int
    fidelity: str | None

    @classmethod
    def of(cls, float_bytes: int, after: DecoderBlock, outcome: LayerOutcome) -> LayerRecord:
        """Describe a layer that was quantised. Args: float_bytes: of its original's tensors."""
        sites = {name: SiteError(s.bits, len(s.offsets) - 1, s.sqnr_db) for name, s in outcome.plan.sites.items()}
        linears = [
            (m.in_features * m.out_features, m.effective_bits, str(m.choice.backend), m.choice.reason) for m in modules_of(after)
        ]
        return cls(
            LayerReport(after.layer_index, outcome.output_sqnr_db, sites, outcome.weights, list(outcome.routed)),
            linears,
            module_bytes(after),
            float_bytes,
            None if after.rules is None else after.rules.fidelity,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerRecord:
        """Read what `to_dict` wrote."""
        return cls(**{**data, "report": _layer_report(data["report"]), "linears": [tuple(linear) for linear in data["linears"]]})


def quantize_report(
    base: LoadedModel,
    recipe: QuantRecipe,
    layers: Sequence[LayerRecord],
    *,
    calibration: str,
    stages: dict[str, float],
    seconds: float,
) -> QuantizeReport:
    """Make the report of a quantisation.

    Args:
        base: the float model; its blocks are not read.
        calibration: a sentence. stages: seconds of each. seconds: of all.
    """
    label = " · ".join(filter(None, (recipe.label(), layers[0].fidelity)))
    outside = module_bytes(base.model.with_blocks(()))
    linears = [linear for layer in layers for linear in layer.linears]
    weights = sum(count for count, _, _, _ in linears)
    return QuantizeReport(
        key=recipe.hash,
        recipe=recipe.to_record(),
        label=label,
        bits_description=recipe.describe_bits(),
        seconds=seconds,
        stages=stages,
        calibration=calibration,
        effective_weight_bits=sum(bits * count for count, bits, _, _ in linears) / weights,
        weight_bytes=outside + sum(layer.weight_bytes for layer in layers),
        float_bytes=outside + sum(layer.float_bytes for layer in layers),
        layers=[layer.report for layer in layers],
        backends=_counted((backend, reason) for _, _, backend, reason in linears),
        folder="",
        base=label_of(base),
        caution=caution_of(replace(base, label=label)),
    )


def report_from_dict(data: dict[str, Any]) -> QuantizeReport:
    """Read what `QuantizeReport.to_dict` wrote; infinite decibels, stored as None, become infinite again."""
    layers = [_layer_report(entry) for entry in data["layers"]]
    loads = data.get("loads")  # of a folder that anybody may have written: texts to show, or nothing
    loads = {str(k)[:40]: str(v)[:400] for k, v in loads.items()} if isinstance(loads, dict) else None
    distilled = DistillReport.from_dict(data["distilled"]) if data.get("distilled") else None  # earlier versions had none
    own = {"layers": layers, "backends": [BackendUse(**b) for b in data["backends"]], "loads": loads, "distilled": distilled}
    return QuantizeReport(**data | own)


def _layer_report(entry: dict[str, Any]) -> LayerReport:
    def decibels(value: float | None) -> float:
        return float("inf") if value is None else value

    sites = {k: SiteError(**v) for k, v in entry["sites"].items()}
    weights = {k: WeightError(**{**v, "sqnr_db": decibels(v["sqnr_db"])}) for k, v in entry["weights"].items()}
    routed = [int(count) for count in entry.get("routed") or ()]  # earlier versions had none
    return LayerReport(entry["layer"], decibels(entry["output_sqnr_db"]), sites, weights, routed)
