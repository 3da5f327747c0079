"""Turn projections of memory and time into rows and sentences, for page and command line."""

from __future__ import annotations

from collections.abc import Sequence

from app.view import texts_memory as texts
from app.view.figure import bytes_text, number, seconds_text
from core.evaluation.memory import CLAIMS, Claim, MemoryEstimate, largest_batch
from core.evaluation.roofline import GPU, GPUS, Operator, cards_needed, least_seconds
from core.evaluation.shapes import Shape

Rows = list[list[str]]


def in_unit(size: float, unit: str, digits: int = 4) -> str:
    """Format bytes in a unit of `texts.UNITS`, without its name."""
    return number(size / texts.UNITS[unit], digits)


def place(batch: int, sequence: int) -> str:
    """Name a batch and a sequence length shortly: "8 × 2k", "3 × 1,000"."""
    return f"{batch} × {sequence // 1024}k" if sequence % 1024 == 0 else f"{batch} × {sequence:,}"


def grid_rows(cells: Sequence[MemoryEstimate], unit: str) -> tuple[list[str], Rows]:
    """Make headers and rows of all cells of a grid: a row for each scheme, a column for each place."""
    schemes = dict.fromkeys(cell.scheme for cell in cells)
    headers = ["scheme", *dict.fromkeys(place(cell.batch, cell.sequence) for cell in cells)]
    return headers, [[name, *(in_unit(c.total, unit) for c in cells if c.scheme == name)] for name in schemes]


def fit_rows(shape: Shape, chosen: MemoryEstimate) -> Rows:
    """Make rows that say on which GPUs a projection fits, and how many sequences fit at the most."""
    rows = []
    for gpu in GPUS.values():
        cards = cards_needed(chosen.total, gpu)
        said = texts.FITS_NO.format(cards=f"{cards:,}")
        if cards == 1:
            said = texts.FITS_YES.format(share=f"{100 * chosen.total / gpu.memory:.0f} %")
        most = largest_batch(shape, chosen.scheme, sequence=chosen.sequence, memory=gpu.memory)
        rows.append([gpu.name, f"{gpu.memory // 10**9} GB", said, f"{most:,}"])
    return rows


def fits_caption(chosen: MemoryEstimate) -> str:
    """Name a projection's place and its bytes in both units."""
    total = f"{chosen.total / 1e9:,.2f} GB = {chosen.total / 2**30:,.2f} GiB"
    return texts.FITS_CAPTION.format(scheme=chosen.scheme, batch=chosen.batch, sequence=chosen.sequence, total=total)


def operator_rows(found: Sequence[Operator], gpu: GPU) -> Rows:
    """Make rows of operators on a GPU, and one of all together."""
    rows = [
        [
            op.name,
            number(op.flops),
            bytes_text(op.bytes),
            number(op.intensity),
            seconds_text(op.seconds(gpu)),
            op.bound(gpu),
        ]
        for op in found
    ]
    flops, moved = sum(op.flops for op in found), sum(op.bytes for op in found)
    total = seconds_text(least_seconds(found, gpu))
    return [*rows, [texts.ROOF_ALL, number(flops), bytes_text(moved), number(flops / moved), total, ""]]


def speed_text(found: Sequence[Operator], gpu: GPU, *, phase: str, batch: int, sequence: int) -> str:
    """Say how fast a phase can be on a GPU at the most."""
    seconds = least_seconds(found, gpu)
    said, tokens = (texts.DECODE_SPEED, batch) if phase == "decode" else (texts.PREFILL_SPEED, batch * sequence)
    return said.format(seconds=seconds_text(seconds), rate=number(tokens / seconds))


def claims_of(shape: Shape) -> list[str]:
    """Write the published claims on a shape, each beside what the formula gives, without and with activations."""
    return [_claim_text(claim) for claim in CLAIMS if claim.shape == shape]


def _claim_text(claim: Claim) -> str:
    before, after = claim.check()
    old, new = (cell.weights + cell.kv_cache for cell in (before, after))
    saved, whole = old - new, before.total - after.total
    return texts.CLAIM.format(
        **{name: getattr(claim, name) for name in ("said", "model", "batch", "sequence", "before", "after")},
        **{name: f"{size / 1e9:,.1f} GB" for name, size in (("old", old), ("new", new), ("saved", saved), ("whole", whole))},
        saved_gib=f"{saved / 2**30:,.1f} GiB",
        whole_gib=f"{whole / 2**30:,.1f} GiB",
        share=f"{100 * saved / old:.1f}",
        whole_share=f"{100 * whole / before.total:.1f}",
    )
