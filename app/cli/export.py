"""The verb `export`: write a quantised model in the format of another program, or say why it does not fit."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from app.cli.output import Console, facts
from app.view.figure import bytes_text
from core.checks import require_choice
from core.errors import InputError
from core.models.export import FORMATS


def export_options(verb: ArgumentParser) -> None:
    """Add the options of `export`."""
    verb.add_argument("--model", required=True, metavar="RUN", help="a folder that quantize made, or a ternary model")
    verb.add_argument("--format", required=True, metavar="F", help=", ".join(FORMATS))
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    verb.add_argument("--numbers", metavar="FILE", help="what evaluate --json measured on this model, for the card README.md")
    verb.add_argument(
        "--push", metavar="OWNER/NAME", help="also push the folder to a new repository of the Hub, with your own token"
    )
    verb.add_argument("--public", action="store_true", help="the repository of --push is for everybody (default: private)")


def export(args: Namespace, console: Console) -> None:
    """Write a model as a folder in a format; what does not fit is refused with the reason."""
    require_choice("format", args.format, FORMATS)
    from core.models.export.card import read_numbers
    from core.models.export.export import check_empty, export_model
    from core.models.export.push import check_destination, push_folder
    from core.models.io.load import load_model

    check_empty(args.out)
    if args.push is not None:
        check_destination(args.push)
    elif args.public:
        raise InputError("--public says who sees the repository of --push: give both, or leave it out.", code="E-PARAM-PUSH")
    loaded = load_model(args.model, progress=console.progress)
    numbers = None if args.numbers is None else read_numbers(args.numbers, loaded.label)
    console.progress("Writing the exported model", None)
    report = export_model(args.out, loaded, args.format, numbers=numbers)
    lines = [("exported", f"{report.label} as {report.format}"), ("folder", f"{report.folder} ({bytes_text(report.nbytes)})")]
    lines += [("differs", difference) for difference in report.differences or ["in nothing"]]
    document = report.to_dict()
    if args.push is not None:
        console.progress(f"Pushing to {args.push}", None)
        document["pushed"] = push_folder(args.out, args.push, private=not args.public)
        lines.append(("pushed", document["pushed"]))
    console.finish(document, facts([*lines, *report.loads.items()]))
