"""The verb `allocate`: bits of single layers for a budget of bytes, predicted and measured on the probe."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from app.cli.output import Console, check_target, facts, table, write_json
from app.cli.recipe import recipe_of
from app.view.autopilot import compared
from app.view.figure import bytes_text, number
from core.checks import parse_float, parse_int
from core.errors import InputError
from core.probe.report import ProbeText
from core.recipe import Overrides, QuantRecipe


def allocate(args: Namespace, console: Console) -> None:
    """Choose bits for a budget, print them layer by layer beside the best uniform recipe, and write the recipe."""
    given = [name for name in ("budget_of", "bytes", "kld") if getattr(args, name) is not None]
    if len(given) > 1:
        raise InputError("Several budgets are given: choose one of --budget-of, --bytes and --kld.", code="E-PARAM-BUDGET")
    if args.out is not None:
        check_target(args.out, code="E-PARAM-OUT")
    if args.budget_of is not None and args.scheme is args.bits is args.recipe is None:
        args.scheme = args.budget_of
    recipe, context = recipe_of(args), parse_int("context", args.context)
    probe = {"text": ProbeText(args.text, parse_int("probe tokens", args.tokens)), "progress": console.progress}
    within = parse_float("within", args.within) / 100
    limits = {
        "budget": None if args.bytes is None else parse_float("bytes", args.bytes),
        "bound": None if args.kld is None else parse_float("kld", args.kld),
    }
    of = None if args.budget_of is None else replace(recipe, scheme=args.budget_of, bits=None, overrides=Overrides())
    from core import Workbench
    from core.evaluation.memory import total_bytes
    from core.evaluation.shapes import shape_of_loaded
    from core.provenance import provenance

    bench = Workbench(device=args.device)
    shape = shape_of_loaded(bench.load(recipe.model, revision=recipe.revision, progress=console.progress))
    if of is not None:
        limits["budget"] = total_bytes(shape, of, context)
    found = bench.allocate(recipe, **limits, context=context, activations=args.activations, **probe)
    made = replace(recipe, overrides=Overrides.from_dict(found.overrides))
    measured, rival = bench.measure(made, **probe), None
    if found.rival is not None:
        rival = bench.measure(recipe.with_bits(found.rival.bits), **probe)
    grouped = made.method == "rptq" or made.variant == "matched"
    smallest = bench.smallest_g(made, within=within, **probe) if grouped else None
    if args.out is not None:
        write_json(args.out, made.to_dict())
    document = found.to_dict() | {
        "recipe": made.to_record(),
        "measured": measured.to_dict(),
        "rival_measured": rival and rival.to_dict(),
        "smallest_g": smallest and smallest.to_dict(),
        "provenance": provenance(),
    }
    console.finish(document, _text(found, made, measured, rival, smallest))


def _text(found: Any, recipe: QuantRecipe, measured: Any, rival: Any, smallest: Any) -> str:
    """Write the allocation for people."""
    limit = f"{bytes_text(found.budget)} allowed" if found.budget is not None else f"{number(found.bound)} nats allowed"
    lines = [
        ("recipe", recipe.label()),
        ("bytes", f"{bytes_text(found.nbytes)} with the keys and values of {found.context:,} tokens; {limit}"),
        ("predicted", f"{number(found.predicted)} nats per token"),
        ("measured", f"{number(measured.kld)} nats per token on the probe, weights rounded to nearest"),
        ("against", compared(found, measured, rival)),
    ]
    if smallest is not None:
        near = f"{number(smallest.predicted)} nats predicted, {number(smallest.per_channel)} with one cluster per channel"
        lines.append(("smallest g", f"{smallest.g}: {near}"))
    cells = list(dict.fromkeys(name.rpartition(".")[2] for name in found.bits))
    layers = sorted({int(name.split(".")[1]) for name in found.bits})
    rows = [[str(layer), *(str(found.bits[f"layers.{layer}.{cell}"]) for cell in cells)] for layer in layers]
    return facts(lines) + "\nBits\n" + table(["layer", *cells], rows, left=0)
