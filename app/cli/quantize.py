"""The verb `quantize`: a model into a folder, in memory or layer by layer."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from app.cli.output import Console, cautions, facts, table
from app.cli.recipe import recipe_of
from app.view.figure import bytes_text, number, seconds_text
from app.view.tables import distill_rows
from app.view.texts_distill import TABLE
from core.errors import InputError, ResourceError
from core.recipe import QuantRecipe


def quantize(args: Namespace, console: Console) -> None:
    """Quantise a model into a folder that every other verb accepts as `--model`."""
    recipe = recipe_of(args)
    from core import estimate, load_model
    from core.calibration.data import resolve_text
    from core.models.io.quantized import check_output, save_quantized, weights_id
    from core.models.io.saved import saved_folder, state_folder
    from core.provenance import provenance
    from core.workbench import quantize as run

    check_output(args.out)
    source = resolve_text(recipe.calibration.text, split="calibration")
    if args.stream:
        _quantize_streamed(args, recipe, console)
        return
    base = load_model(recipe.model, revision=recipe.revision, device=args.device, progress=console.progress)
    expected = estimate(base, recipe)
    if args.dry_run:
        console.finish(expected.to_dict() | {"recipe": recipe.to_record(), "provenance": provenance()}, _expected(expected))
        return
    console.write(_expected(expected) + "\n")
    state = None
    if recipe.distill is not None:  # all weights are read for their name
        state = state_folder(saved_folder(recipe.hash, recipe.calibration.text, source.sha256, weights_id(base), None))
    made, report = run(base, recipe, state=state, progress=console.progress)
    saved = replace(report, folder=args.out)
    console.progress("Saving the quantised model", None)
    try:
        save_quantized(args.out, made, {"recipe": saved.recipe, "report": saved.to_dict()})
    except ResourceError as error:  # what was found out in the run is shown all the same
        console.write(_quantize_text(replace(report, unsaved=str(error))))
        raise
    document = saved.to_dict() | {"out": args.out, "estimate": expected.to_dict(), "provenance": provenance()}
    console.finish(document, _quantize_text(saved))


def _quantize_streamed(args: Namespace, recipe: QuantRecipe, console: Console) -> None:
    """Quantise with one layer in memory at a time, continuing where an earlier run of the same command ended."""
    if args.dry_run:
        raise InputError("--dry-run estimates runs in memory: leave out --dry-run or --stream.", code="E-PARAM-STREAM")
    from core import quantize_streamed
    from core.provenance import provenance

    report = quantize_streamed(recipe, args.out, device=args.device, note=console.note, progress=console.progress)
    console.finish(report.to_dict() | {"out": args.out, "provenance": provenance()}, _quantize_text(report))


def _expected(found: Any) -> str:
    """Write what a run will take."""
    peak, lacking = found.peak_bytes(measured=False), found.lacking_bytes(measured=False)
    pairs = [
        ("time", f"about {seconds_text(found.seconds)} on {found.tokens:,} calibration tokens"),
        ("memory", f"about {bytes_text(peak)} at the peak, {bytes_text(found.added_bytes)} more than now"),
        ("bytes", f"{bytes_text(found.model_bytes)} saved, {bytes_text(found.packed_bytes)} of it packed weights"),
        ("estimated", f"from the shapes and one layer, timed in {seconds_text(found.timing_seconds)}"),
    ]
    short = f"{bytes_text(lacking)} more than are free: use fewer calibration tokens or a smaller model"
    return facts([*pairs, ("caution", short)] if lacking else pairs)


def _decibels(value: float | None) -> str:
    return "–" if value is None else number(value)


def _quantize_text(report: Any) -> str:
    rows = [
        [str(entry.layer), _decibels(entry.output_sqnr_db), *_worst(entry.sites), *_worst(entry.weights)]
        for entry in report.layers
    ]
    saved = f"{bytes_text(report.weight_bytes)} of {bytes_text(report.float_bytes)} as float"
    text = facts(
        [
            ("model", report.base),
            ("recipe", f"{report.label} ({report.key})"),
            ("calibration", report.calibration),
            ("weights", f"{saved}, {number(report.effective_weight_bits)} bits per decoder weight with scales"),
            ("time", ", ".join(f"{name} {number(seconds)} s" for name, seconds in report.stages.items())),
            ("backends", "; ".join(f"{use.backend} × {use.layers} ({use.reason})" for use in report.backends)),
            *_routed(report.layers),
            *cautions(report),
            *(report.loads or {}).items(),
        ]
    )
    text += "\nSignal to quantisation noise, dB\n"
    text += table(["layer", "output", "worst site", "dB", "worst weight", "dB"], rows, left=0)
    text += "".join(f"{note}\n" for note in report.fallbacks)
    text += _distillation(report.distilled) if report.distilled else ""
    if report.unsaved:
        return text + "\nNot saved.\n"
    out = report.folder
    return text + f"\nSaved as {out}. Next: python -m app.cli evaluate --model {out} --reference {report.recipe['model']}\n"


def _routed(layers: Any) -> list[tuple[str, str]]:
    """Write how many calibration tokens experts got; nothing where there are none."""
    counts = sorted(count for entry in layers for count in entry.routed)
    if not counts:
        return []
    return [("experts", f"{counts[0]:,} to {counts[-1]:,} calibration tokens each, {counts[len(counts) // 2]:,} in the middle")]


def _distillation(found: Any) -> str:
    """Write what a distillation changed."""
    taken = f"{found.steps} steps of {found.tokens:,} tokens in {seconds_text(found.seconds)}"
    taken += ", stopped" if found.stopped else ""
    return f"\nDistilled: {taken}; the model after step {found.best} is kept\n{table(list(TABLE), distill_rows(found))}"


def _worst(errors: dict[str, Any]) -> list[str]:
    """Name and decibels of the noisiest entry; dashes when nothing is quantised."""
    known = {name: entry.sqnr_db for name, entry in errors.items() if entry.sqnr_db is not None}
    if not known:
        return ["–", "–"]
    name = min(known, key=known.__getitem__)
    return [f"{name} ({errors[name].bits} bits)", _decibels(known[name])]
