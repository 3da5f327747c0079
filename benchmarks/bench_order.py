"""R0: RPTQ with one order of the residual stream for all layers against one of each: perplexity, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Result, interleave
from benchmarks.quality_table import protocol_of, text_of
from core import Calibration, Clusters, QuantRecipe, Workbench
from core.evaluation.paired import paired
from core.evaluation.perplexity import hidden_windows
from core.evaluation.windows import evaluation_windows
from core.methods.rptq.reorder import Orders, reorder_block
from core.models.decoder import CausalModel

SCHEMES = (("W4A4", "strict"), ("W4A8", "default"))
COUNTS = (8, 16, 32)
CALIBRATION_TOKENS = 8192


def run(model: str, tokens: int) -> Iterator[Result]:
    """Yield the ratio of perplexities for each scheme and g, then those of `passes`."""
    protocol, bench = protocol_of(model), Workbench()
    text, calibration = text_of(protocol.evaluation, 0), text_of(protocol.calibration, 1)
    options = {"text": text, "tokens": tokens, "window": protocol.window, "reference": model}
    plain = bench.evaluate(model, **{**options, "reference": None})
    for scheme, variant in SCHEMES:
        for count in COUNTS:
            recipe = QuantRecipe(
                model=model,
                scheme=scheme,
                variant=variant,
                clusters=Clusters.uniform(count),
                calibration=Calibration(calibration, CALIBRATION_TOKENS, protocol.window),
            )
            made = [bench.quantize(replace(recipe, order=order)) for order in ("layer", "shared")]
            layer, shared = (bench.evaluate(report.key, **options) for report in made)
            compared = paired(shared, layer)
            note = (
                f"perplexity {shared.perplexity:.2f} against {layer.perplexity:.2f}, float32 {plain.perplexity:.2f}; "
                f"{compared.verdict()}; KLD {shared.kld_mean:.4f} against {layer.kld_mean:.4f}; {shared.tokens:,} tokens in "
                f"windows of {shared.window}"
            )
            yield Result(
                f"order {scheme} {variant}, g={count}: perplexity over that of an order by layer",
                compared.ratio,
                "an order by layer",
                seconds=made[1].seconds,
                note=note,
                weight_bits=made[1].effective_weight_bits,
                kv_bytes=shared.kv_bytes_per_token,
                text=protocol.text,
            )
    base = bench.model(model)
    parts, _ = evaluation_windows(base, text, tokens=protocol.window, window=protocol.window)
    yield from passes(base.model, parts)


def passes(model: CausalModel, window: Tensor) -> Iterator[Result]:
    """Yield the time of a float pass in one order over that of one whose norms store R1 and R4: a window, and a single token.

    Args: window: [1, T] int64.
    """
    order = torch.randperm(model.blocks[0].spec.hidden, generator=torch.Generator().manual_seed(0))
    stores = Orders(R1=order, R4=order)
    stored = model.with_blocks([reorder_block(block, stores) for block in model.blocks])
    folded = model.with_blocks([block.in_order(order) for block in model.blocks], order)
    for ids, rounds in ((window, 21), (window[:, :1], 501)):
        with_stores, without = interleave(*(partial(hidden_windows, each, ids) for each in (stored, folded)), rounds=rounds)
        yield Result(
            f"order: time over that of norms which reorder, float pass of {ids.shape[1]} tokens",
            without / with_stores,
            "R1 and R4 stored by the norms",
            seconds=without,
        )
