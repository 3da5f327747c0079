"""The verbs `curve` and `calibrations`: costs by number of clusters, and two calibration texts"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from app.cli.output import Console, facts, table
from app.cli.recipe import calibration_of, recipe_of
from app.view import calibrations as pairs
from app.view import groups
from app.view import texts_groups as texts
from app.view.figure import number
from app.view.tables import with_error
from core.checks import parse_int
from core.errors import InputError
from core.probe.report import ProbeText
from core.recipe import SITES, Calibration, QuantRecipe


def curve(args: Namespace, console: Console) -> None:
    """Print squared error and predicted divergence of one site by its number of clusters, and where the knees lie."""
    where, _, site = args.site.rpartition(".")
    place = where.removeprefix("layers.")
    if site not in SITES or where not in ("", f"layers.{place}"):
        rule = f"use one of {', '.join(SITES)}, or layers.3.k for one layer"
        raise InputError(f"Site {args.site[:40]!r} is not known: {rule}.", code="E-PARAM-SITE")
    layer = parse_int("layer", place) if where else None
    recipe = QuantRecipe(args.model, calibration=calibration_of(args, Calibration()), seed=parse_int("seed", args.seed or "0"))
    recipe = recipe.with_bits({site: parse_int("bits", args.bits)})
    probe = {"text": ProbeText(args.text, parse_int("probe tokens", args.tokens)), "progress": console.progress}
    from core import Workbench, error_curve
    from core.provenance import provenance

    bench = Workbench(device=args.device)
    costs = bench.curve(recipe, site, layer, **probe)
    ranges = bench.observe(recipe.model, recipe.calibration, seed=recipe.seed, progress=console.progress)
    error = error_curve(ranges, f"layers.{costs.layers[0]}.{site}", bits=costs.bits)
    text = facts(
        [
            ("site", f"{args.site} at {costs.bits} bits; squared error: layer {costs.layers[0]}"),
            ("calibration", f"{ranges.tokens:,} tokens of {ranges.text_name}"),
            ("noise floor", f"{number(costs.noise_floor)} nats"),
        ]
    )
    text += "\n" + table(texts.CURVE_HEADERS, groups.curve_rows(error, costs)) + f"\n{groups.knee_words(error, costs)}\n"
    squared = {name: getattr(error, name) for name in ("g", "kmeans", "equal", "per_channel", "knee")}
    console.finish(costs.to_dict() | {"squared_error": squared, "provenance": provenance()}, text)


def calibrations(args: Namespace, console: Console) -> None:
    """Compare the recipe's calibration (A) with another one (B): ranges, clusters, and the divergence with each."""
    recipe = recipe_of(args)
    tokens = recipe.calibration.tokens if args.against_tokens is None else parse_int("tokens", args.against_tokens)
    other = replace(recipe.calibration, text=args.against, tokens=tokens)
    probe = {"text": ProbeText(args.text, parse_int("probe tokens", args.tokens)), "progress": console.progress}
    from core import Workbench
    from core.provenance import provenance

    pair = Workbench(device=args.device).calibrations(recipe, other, **probe)
    costs = zip(pairs.NAMES, pair.tokens, pair.texts, pair.predicted, pair.measured, strict=True)
    rows = [
        [f"{name}: {count:,} tokens of {text}", number(predicted.total), with_error(measured.kld, measured.stderr)]
        for name, count, text, predicted, measured in costs
    ]
    told = f"{facts([('recipe', recipe.label()), ('in words', pairs.words(pair, 'The recipe'))])}\n"
    told += table(["calibration", "predicted, nats", "measured on the probe, nats"], rows)
    told += f"\nSites that differ most\n{table(texts.PAIR_HEADERS, pairs.rows(pair), left=2)}"
    console.finish(pair.to_dict() | {"recipe": recipe.to_record(), "provenance": provenance()}, told)
