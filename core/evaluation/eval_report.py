"""Make the report of a measurement: scores of a model, with the bytes and backends of its layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from core.calibration.data import TextSource
from core.evaluation.describe import backend_use, caution_of, dtype_of, label_of
from core.evaluation.memory import kv_bytes_per_token, measured_parts, working_bytes
from core.evaluation.perplexity import Reference
from core.models.loaded import LoadedModel, context_of
from core.report import BackendUse, EvalReport, Scores


@dataclass(frozen=True)
class Footprint:
    """What a model's layers take.

    Attributes:
        parts: bytes as `measured_parts` counts them. working, kv_per_token: bytes as in `EvalReport`.
        backends: as `backend_use`. linear: stored bytes and number of the linear layers' weights.
    """

    parts: dict[str, int]
    working: int
    kv_per_token: int
    backends: list[BackendUse]
    linear: tuple[int, int]


def footprint_of(loaded: LoadedModel) -> Footprint:
    """Measure a model in memory."""
    model = loaded.model
    linears = [linear for block in model.blocks for linear in block.linears().values()]
    stored, count = sum(x.stored_bytes for x in linears), sum(x.in_features * x.out_features for x in linears)
    parts, working, kv_per_token = measured_parts(model), working_bytes(model), kv_bytes_per_token(model)
    return Footprint(parts, working, kv_per_token, backend_use(loaded), (stored, count))


def joint_footprint(layers: list[Footprint], outside: dict[str, int]) -> Footprint:
    """Compute the footprint of a model that runs layer by layer.

    Args:
        layers: of models of one layer each, which share what is outside it. outside: bytes of that, as `measured_parts` counts.
    Returns: working copies are those of the largest layer; all other bytes are those of the whole model.
    """
    parts, uses = Counter(outside), Counter[tuple[str, str]]()
    for layer in layers:
        parts.update(layer.parts)
        parts.subtract(outside)
        uses.update({(use.backend, use.reason): use.layers for use in layer.backends})
    backends = [BackendUse(*choice, number) for choice, number in uses.items()]
    working, kv_per_token = max(layer.working for layer in layers), sum(layer.kv_per_token for layer in layers)
    stored, count = (sum(sizes) for sizes in zip(*(layer.linear for layer in layers), strict=True))
    return Footprint({name: size for name, size in parts.items() if size}, working, kv_per_token, backends, (stored, count))


def eval_report(
    loaded: LoadedModel,
    parts: Tensor,
    source: TextSource,
    scores: Scores,
    footprint: Footprint,
    *,
    reference: Reference | None = None,
    key: str | None = None,
) -> EvalReport:
    """Make the report of a measurement on windows [S, T].

    Args: loaded: the model; its layers are not read. Others: as `core.stages.evaluate`.
    """
    count, window = parts.shape
    device, dtype = str(loaded.model.device), dtype_of(loaded.model)
    whole = ", the model's whole context," if window == context_of(loaded.model) else ""
    return EvalReport(
        **vars(scores),
        key=key or loaded.name,
        label=label_of(loaded),
        text_name=source.name,
        tokens=parts.numel(),
        window=window,
        reference=reference.name if reference else None,
        weight_bytes=sum(footprint.parts.values()),
        weight_parts=footprint.parts,
        working_bytes=footprint.working,
        kv_bytes_per_token=footprint.kv_per_token,
        device=device,
        dtype=dtype,
        backend="; ".join(f"{u.backend} × {u.layers} ({u.reason})" for u in footprint.backends) or f"torch {dtype}",
        protocol=f"{counted_windows(count, 'non-overlapping ')} of {window} tokens{whole} of {source.name}; mean next-token loss "
        f"over {window - 1} targets each, exponentiated; ± is the standard error over windows; "
        f"{dtype} on {device}, one window at a time",
        origin="" if loaded.origin is None else f"{loaded.origin.label}: {loaded.origin.sentence}",
        caution=caution_of(loaded),
        effective_weight_bits=8 * footprint.linear[0] / footprint.linear[1],
    )


def counted_windows(count: int, kind: str = "") -> str:
    """Write a number of windows."""
    return f"{count} {kind}window{'' if count == 1 else 's'}"
