"""The verbs of the command line: each reads its options, calls core, and prints the report.

Everything cheap to check is checked before a model is loaded. core's heavy parts are imported by the verbs that need them.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from app.cli.html import write_html
from app.cli.output import Console, cautions, check_target, facts, table
from app.cli.recipe import calibration_of, command_of, recipe_of
from app.view import bases
from app.view import texts_bases as words
from app.view.figure import bytes_text, number
from app.view.tables import probability_change, quantile, share, with_error
from core.baselines.registry import baseline_key, find_baseline, split_key
from core.checks import parse_int, require_choice, require_int
from core.errors import InputError
from core.options import BASES
from core.recipe import SITES, Calibration, QuantRecipe

BACKENDS = ("auto", "reference", "int8", "int4", "triton")
MAX_TOKENS = 1_048_576
OUTLIERS_SHOWN = 10


def models(args: Namespace, console: Console) -> None:
    """Print the catalogue of models."""
    from core import catalogue

    entries = catalogue()
    document = {
        "models": [
            {
                "name": e.name,
                "title": e.title,
                "description": e.description,
                "licence": e.licence,
                "size_bytes": e.size_bytes,
                "source": e.source,
                "precision": e.precision,
            }
            for e in entries
        ]
    }
    rows = [[e.name, e.title, e.licence, bytes_text(e.size_bytes)] for e in entries]
    sources = facts([(e.name, f"{e.precision}; {e.source}") for e in entries])
    also = "Also: owner/name of the Hugging Face Hub, a local folder, a .gguf file.\n"
    console.finish(document, f"{table(['name', 'title', 'licence', 'size'], rows, left=3)}\nSources\n{sources}\n{also}")


def inspect(args: Namespace, console: Console) -> None:
    """Observe and print the ranges of every channel."""
    calibration = calibration_of(args, Calibration())
    seed = parse_int("seed", args.seed or "0")
    QuantRecipe(args.model, seed=seed)  # its rules for seed and name
    _require_text(calibration.text, "calibration")
    basis = args.basis and require_choice("basis", args.basis, tuple(BASES))
    from core import load_model, observe, observe_in_bases
    from core.evaluation.describe import model_info
    from core.provenance import provenance

    loaded = load_model(args.model, device=args.device, progress=console.progress)
    info = model_info(loaded, 0.0)
    observed = observe_in_bases if basis else observe
    report = observed(loaded, calibration, seed=seed, progress=console.progress)
    report = report[basis] if basis else report
    rows = []
    for kind in SITES:
        sites = [s for s in report.sites.values() if s.kind == kind]
        low, high = min(float(s.low.min()) for s in sites), max(float(s.high.max()) for s in sites)
        rows.append([kind, str(len(sites)), str(len(sites[0].low)), number(low), number(high)])
    widest = [[o.site, str(o.channel), number(o.low), number(o.high), number(o.ratio)] for o in report.outliers(OUTLIERS_SHOWN)]
    text = facts(
        [
            ("model", info.label),
            ("weights", f"{info.precision}; {info.source}"),
            (
                "observed",
                f"{report.tokens:,} tokens of {report.text_name} in windows of "
                f"{report.window}, {number(report.seconds)} s on {report.device}",
            ),
            ("basis", report.basis),
            *cautions(info),
        ]
    )
    text += "\n" + table(["site", "layers", "channels", "smallest", "largest"], rows)
    text += "\nWidest channels, relative to their site's median width\n"
    text += table(["site", "channel", "min", "max", "× median"], widest)
    if report.peaks:
        text += f"\n{words.TOKENS}\n" + table(words.TOKEN_HEADERS, bases.token_rows(report.massive_tokens(OUTLIERS_SHOWN)))
    origin = {name: getattr(info, name) for name in ("label", "source", "precision", "lossy_source", "caution")}
    console.finish(report.to_dict() | origin | {"provenance": provenance()}, text)


def recipe(args: Namespace, console: Console) -> None:
    """Print the recipe that the options describe, with its hash, its link and its command; nothing is loaded."""
    made = recipe_of(args)
    lines = [("recipe", made.label()), ("hash", made.hash), ("link", f"?{made.to_query()}"), ("command", command_of(made))]
    console.finish(made.to_dict(), facts(lines))


def evaluate(args: Namespace, console: Console) -> None:
    """Measure and print the numbers of one model, with a reference when one is given."""
    protocol = _protocol(args)
    if args.stream and args.html is not None:
        raise InputError("--html reports models in memory: leave out --html or --stream.", code="E-PARAM-STREAM")
    from core import Workbench, evaluate_streamed
    from core.provenance import provenance

    measured = protocol | {"reference": args.reference, "progress": console.progress}
    if args.stream:
        report = evaluate_streamed(args.model, device=args.device, **measured)
    else:
        bench = Workbench(device=args.device)
        report = bench.evaluate(args.model, **measured)
        if args.html is not None:
            write_html(args.html, bench, protocol, [(args.model, report)])
    document = report.to_dict() | {"model": args.model, "reference": args.reference, "provenance": provenance()}
    console.finish(document, _evaluation_text(report, args.reference))


def generate(args: Namespace, console: Console) -> None:
    """Print the continuation of a prompt, piece by piece as it is made."""
    writing = _writing(args, args.prompt) | {"seed": _seed(args), "backend": _backend(args)}
    from core import Workbench

    report = _stream(Workbench(device=args.device), args.model, args.prompt, writing, console)
    document = report.to_dict() | {"model": args.model, "prompt": args.prompt}
    console.finish(document, "\n")
    console.note(_speed(report))


def compare(args: Namespace, console: Console) -> None:
    """Measure several models, and baselines of the first, and print a row for each; the first is the others' reference."""
    first, own = args.models[0], [find_baseline(name).name for name in dict.fromkeys(args.baseline)]
    models = [*args.models, *(baseline_key(first, name) for name in own)]
    if len(models) < 2:
        raise InputError("Only one model is given: name two or more, the first being the reference.", code="E-PARAM-MODELS")
    protocol, writing = _protocol(args), _writing(args, args.prompt) | {"backend": _backend(args)}
    from core import Workbench
    from core.models.io.catalog import resolve
    from core.provenance import provenance

    bench = Workbench(device=args.device)
    for name in args.models:
        resolve(name, progress=console.progress)  # an unknown name must fail before the first model is measured
    reports = [
        bench.evaluate(name, reference=None if i == 0 else first, **protocol, progress=console.progress)
        for i, name in enumerate(models)
    ]
    if args.html is not None:
        write_html(args.html, bench, protocol, list(zip(models, reports, strict=True)))
    headers = ["model", "perplexity", "ln ratio", "KLD", "same top", "weights", "bits/weight", "KV / token", "tokens/s"]
    rows = [
        [
            name,
            f"{number(r.perplexity, 4)} ± {number(r.perplexity_stderr, 2)}",
            with_error(r.ln_ratio, r.ln_ratio_stderr),
            with_error(r.kld_mean, r.kld_stderr),
            share(r.same_top_token, r.same_top_stderr),
            bytes_text(r.weight_bytes),
            number(r.effective_weight_bits),
            bytes_text(r.kv_bytes_per_token),
            number(r.tokens_per_second),
        ]
        for name, r in zip(models, reports, strict=True)
    ]
    console.write(table(headers, rows) + f"\nln ratio, KLD and same top token are against the first. {reports[0].protocol}.\n")
    console.write("".join(f"\n{name}\n{facts(_divergence(r))}" for name, r in zip(models[1:], reports[1:], strict=True)))
    origins = ((name, r.label if split_key(name)[1] else r.origin) for name, r in zip(models, reports, strict=True))
    sources = [(name, said) for name, said in origins if said]
    sources += [("caution", said) for said in dict.fromkeys(r.caution for r in reports if r.caution)]
    console.write(f"\n{facts(sources)}" if sources else "")
    written = []
    for name in models if args.prompt is not None else ():
        console.write(f"\n── {name}\n")
        written.append(_stream(bench, name, args.prompt, writing, console))
        console.write(f"\n[{_speed(written[-1])}]\n")
    measured = [{"model": name, **r.to_dict()} for name, r in zip(models, reports, strict=True)]
    continued = [{"model": w.key, **w.to_dict()} for w in written]
    console.finish(
        {"reference": first, "models": measured, "prompt": args.prompt, "continuations": continued, "provenance": provenance()},
        "",
    )


def sparsity(args: Namespace, console: Console) -> None:
    """Count and print zero codes at every projection's input, layer by layer."""
    tokens = parse_int("tokens", args.tokens)
    require_int("tokens", tokens, 8, MAX_TOKENS, f"use 8 to {MAX_TOKENS}")
    _require_text(args.text, "evaluation")
    from core import Workbench
    from core.provenance import provenance

    report = Workbench(device=args.device).sparsity(args.model, text=args.text, tokens=tokens, progress=console.progress)
    names = ("qkv", "out", "up", "gate", "down", "gates", "overall")
    named = [*((str(i), layer) for i, layer in enumerate(report.layers)), ("all", report.total)]
    rows = [[title, *(share(getattr(layer, name)) for name in names)] for title, layer in named]
    text = f"{args.model}: {report.fidelity}\n{report.tokens:,} tokens of {report.text_name}\n\n"
    text += table(["layer", *names], rows)
    text += f"\n{report.active_parameters:,} of {report.parameters:,} decoder weights meet a code that is not zero.\n"
    console.finish(report.to_dict() | {"model": args.model, "provenance": provenance()}, text)


def _protocol(args: Namespace) -> dict[str, Any]:
    """Return text, window, tokens and backend of a measurement."""
    window = require_int("window", parse_int("window", args.window), 8, 8192, "use 8 to 8192 tokens")
    rule = f"use at least one window ({window}) and at most {MAX_TOKENS}"
    tokens = require_int("tokens", parse_int("tokens", args.tokens), window, MAX_TOKENS, rule)
    _require_text(args.text, "evaluation")
    if args.html is not None:
        check_target(args.html, code="E-PARAM-HTML")
    return {"text": args.text, "window": window, "tokens": tokens, "backend": _backend(args)}


def _writing(args: Namespace, prompt: str | None) -> dict[str, Any]:
    """Return the options of a continuation."""
    if prompt is not None and not prompt.strip():
        raise InputError("The prompt is empty: write a few words to continue.", code="E-PARAM-PROMPT")
    try:
        temperature = float(args.temperature)
    except ValueError:
        temperature = float("nan")
    if not 0 <= temperature <= 5:
        raise InputError(f"temperature is {args.temperature[:40]!r}: use 0 (greedy) to 5.", code="E-PARAM-TEMPERATURE")
    new_tokens = require_int("new tokens", parse_int("new tokens", args.max_new_tokens), 1, MAX_TOKENS, "use 1 or more")
    return {"max_new_tokens": new_tokens, "temperature": temperature, "chat": args.chat}


def _backend(args: Namespace) -> str:
    require_choice("backend", args.backend, BACKENDS)
    return args.backend


def _seed(args: Namespace) -> int:
    return require_int("seed", parse_int("seed", args.seed), 0, 2**31 - 1, "use 0 to 2147483647")


def _require_text(text: str, split: str) -> None:
    """Check before the model is loaded that a text exists and is readable."""
    from core.calibration.data import resolve_text

    resolve_text(text, split=split)


def _stream(bench: Any, model: str, prompt: str, writing: dict[str, Any], console: Console) -> Any:
    """Generate, showing each piece when it comes. Returns: GenerationReport."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        console.write(piece)

    report = bench.generate(model, prompt, on_text=show, progress=console.progress, **writing)
    console.write(report.text[len("".join(pieces)) :])
    return report


def _speed(report: Any) -> str:
    speed = f"{report.new_tokens} new tokens at {number(report.tokens_per_second)} tokens/s, stopped by {report.stopped}"
    return f"{speed}; KV cache {bytes_text(report.kv_bytes)}, as float {bytes_text(report.kv_bytes_float)}"


def _divergence(report: Any) -> list[tuple[str, str]]:
    """List everything that was measured against the reference, as `llama-perplexity` does: names and values."""
    from core.evaluation.paired import against_reference

    quantiles = [f"{quantile(name)} {number(value)}" for name, value in (report.kld_quantiles or {}).items()]
    change, rms = probability_change(report)
    return [
        (f"against {report.reference}", against_reference(report).verdict()),
        ("KLD", f"{with_error(report.kld_mean, report.kld_stderr)} nats; {', '.join(quantiles)}"),
        ("Δp", f"{change} %, root mean square {rms} %"),
        ("same top token", share(report.same_top_token, report.same_top_stderr)),
    ]


def _evaluation_text(report: Any, reference: str | None) -> str:
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in report.weight_parts.items())
    return facts(
        [
            ("model", report.label),
            ("perplexity", f"{number(report.perplexity, 4)} ± {number(report.perplexity_stderr, 2)}"),
            ("loss", f"{number(report.nll, 4)} nats per token"),
            *(_divergence(report) if reference is not None else []),
            ("weights", f"{bytes_text(report.weight_bytes)} ({parts})"),
            ("KV cache", f"{bytes_text(report.kv_bytes_per_token)} per token"),
            ("speed", f"{number(report.tokens_per_second)} tokens/s"),
            ("measured", f"{report.tokens:,} tokens: {report.protocol}"),
            ("backend", report.backend),
            ("weights of", report.origin),
            *cautions(report),
        ]
    )
