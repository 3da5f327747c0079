"""Use Quantscope without a browser: `python -m app.cli VERB … [--json FILE]`.

    models        what can be named           evaluate   perplexity, divergence, bytes, speed
    inspect       ranges of every channel     generate   continue a prompt
    quantize      make a quantised folder     compare    several models side by side
    allocate      bits by layer for a budget  train      a small model from scratch
    curve         cost by number of clusters  memory     project memory by formula
    calibrations  two texts side by side      doctor     versions, tested ranges, backends
    sparsity      zeros of a BitNet model     recipe     a recipe as JSON, link, command
    sweep         many recipes, a row each    scores     accuracies on standard tasks
    export        a folder for other programs

Results go to stdout, as a table; `--json FILE` also writes one object (`-`: to stdout instead of the table). Exit code
0; 2 when something given cannot be used, with one line on stderr: its code, the value, the rule and what to do; 130
after Ctrl-C; 1 for a fault of Quantscope itself (E-BUG, details with --debug).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from app.cli import verbs
from app.cli.allocate import allocate
from app.cli.doctor import doctor
from app.cli.export import export, export_options
from app.cli.memory import memory
from app.cli.output import Console, complain
from app.cli.probe import calibrations, curve
from app.cli.quantize import quantize
from app.cli.scores import scores
from app.cli.sweep import sweep
from app.cli.train import train, train_options
from core.errors import InputError, QuantscopeError, ResourceError
from core.evaluation.memory import PROJECTED
from core.evaluation.roofline import GPUS
from core.memory import is_out_of_memory
from core.options import BASES, DISTILL_TEXTS
from core.probe.report import CONTEXT
from core.recipe import BITNET_MODES, METHODS, ORDERS, SCHEMES, SEGMENTS, VARIANTS, WEIGHT_METHODS

OK, BUG, BAD_INPUT, INTERRUPTED, TERMINATED, CLOSED_PIPE = 0, 1, 2, 130, 143, 141
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
PROG = "python -m app.cli"
TEXT_HELP = "a file of text, JSON, JSON lines or Parquet; sotu (default) or wikitext2"


class Terminated(KeyboardInterrupt):
    """Raised when the process is asked to end (SIGTERM, SIGHUP): it unwinds as for Ctrl-C, so that no half-written file stays."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `InputError`: one line, no usage block."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's sentence and the command that lists the options."""
        raise InputError(f"{message[0].upper()}{message[1:180]}: see {self.prog} --help.", code="E-PARAM-USAGE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. Nothing is ever raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console: Console | None = None
    try:
        arguments = parse(argv)
        console = Console(arguments.json)
        arguments.run(arguments, console)
        return OK
    except SystemExit as leaving:  # argparse after --help
        return leaving.code if isinstance(leaving.code, int) else OK
    except BaseException as error:  # noqa: BLE001 - process boundary: every end is an exit code and at most one line
        if console is not None:
            console.progress.close()
        if "--debug" in argv:
            traceback.print_exception(error)
        return report(error)


def report(error: BaseException) -> int:
    """Print on stderr, in one line, why the verb ended. Returns: its exit code."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        complain(str(error) or "Stopped. Nothing half-written was kept.")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if is_out_of_memory(error):
        error = ResourceError("The memory ran out. Use a smaller model, fewer tokens or a shorter window.")
    if isinstance(error, QuantscopeError):
        complain(f"error {error.code}: {error}")
        return BAD_INPUT
    complain(
        f"error E-BUG: Something broke on our side ({type(error).__name__}). Run again with --debug and report id "
        f"{fault_id(error)} with what it prints."
    )
    return BUG


def fault_id(error: BaseException) -> str:
    """Compute eight digits that are the same for the same fault: a hash of its type and the place where it was raised."""
    frames = [(os.path.basename(f.filename), f.name, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    return hashlib.sha256(repr((type(error).__name__, frames)).encode()).hexdigest()[:8]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line into a namespace with `run`, the verb's function. Raises: InputError."""
    known = list(VERBS)
    if not argv:
        raise InputError(f"No verb was given: use one of {', '.join(known)}, or --help.", code="E-PARAM-VERB")
    if not argv[0].startswith("-") and argv[0] not in known:
        close = difflib.get_close_matches(argv[0], known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"Unknown verb {argv[0][:40]!r}: use one of {', '.join(known)}.{hint}", code="E-PARAM-VERB")
    return parser().parse_args(argv)


def parser() -> Parser:
    """Build the parser of every verb and option."""
    root = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    table = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (run, options, summary) in VERBS.items():
        verb = table.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)
        options(verb)
        verb.add_argument("--json", metavar="FILE", help="also write the result as one JSON object; - writes it to stdout")
        verb.add_argument("--debug", action="store_true", help="print where an error came from")
        verb.set_defaults(run=run)
    return root


def _no_options(verb: Parser) -> None:
    """Add no options: the verb has none of its own."""


def _model(verb: Parser, *, required: bool = True) -> None:
    verb.add_argument(
        "--model",
        required=required,
        metavar="M",
        help="a catalogue name, a Hub id owner/name[@revision], the address of its page, a folder, or a .gguf file",
    )
    _device(verb)


def _device(verb: Parser) -> None:
    verb.add_argument("--device", default="cpu", metavar="D", help="where the model runs: cpu (default) or cuda")


def _calibration(verb: Parser) -> None:
    verb.add_argument("--calibration", metavar="FILE", help=TEXT_HELP)
    verb.add_argument("--calibration-tokens", metavar="N", help="how many tokens to observe (default 8192)")
    verb.add_argument("--window", metavar="T", help="tokens per window (default 512)")
    verb.add_argument("--seed", metavar="S", help="chooses the windows (default 0)")


def _scoring(verb: Parser) -> None:
    verb.add_argument("--text", default="sotu", metavar="FILE", help=TEXT_HELP)
    verb.add_argument("--window", default="512", metavar="T", help="tokens per window (default 512)")
    verb.add_argument("--tokens", default="4096", metavar="N", help="tokens to score, in whole windows (default 4096)")
    verb.add_argument("--html", metavar="FILE", help="also write a report with tables and charts as one HTML file")
    _backend(verb)


def _backend(verb: Parser) -> None:
    verb.add_argument("--backend", default="auto", help=f"{', '.join(verbs.BACKENDS)}: how layers multiply (default auto)")


def _writing(verb: Parser) -> None:
    verb.add_argument("--max-new-tokens", default="64", metavar="N", help="at most so many (default 64)")
    verb.add_argument("--temperature", default="0", metavar="X", help="0 (default) always takes the likeliest token")
    verb.add_argument("--chat", action="store_true", help="put the prompt into the model's chat format")


def _inspect(verb: Parser) -> None:
    _model(verb)
    _calibration(verb)


def _ranges(verb: Parser) -> None:
    _inspect(verb)
    verb.add_argument("--basis", metavar="B", help=f"one of {', '.join(BASES)}: lists the largest tokens too (default: original)")


def _quantize(verb: Parser) -> None:
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to write; any verb takes it as --model")
    verb.add_argument("--dry-run", action="store_true", help="only estimate what the run takes: seconds, memory, bytes")
    verb.add_argument("--stream", action="store_true", help="hold one layer in memory at a time; run again, a killed run goes on")
    _recipe(verb)


def _allocate(verb: Parser) -> None:
    verb.add_argument("--budget-of", metavar="S", help="spend what this scheme takes (default: the recipe's own scheme)")
    verb.add_argument("--bytes", metavar="N", help="spend so many bytes, of the model and of its cache")
    verb.add_argument("--kld", metavar="X", help="spend as few bytes as this divergence allows, nats per token")
    verb.add_argument("--context", default=str(CONTEXT), metavar="T", help=f"tokens whose cache counts (default {CONTEXT})")
    verb.add_argument("--activations", action="store_true", help="spread the activations' bits over layers too, as many in all")
    verb.add_argument("--within", default="5", metavar="P", help="also: the smallest g within P %% of per channel (default 5)")
    _probe(verb)
    verb.add_argument("--out", metavar="FILE", help="write the recipe as JSON, for quantize --recipe")
    _recipe(verb)


def _probe(verb: Parser) -> None:
    verb.add_argument("--text", default="sotu", metavar="FILE", help="what the probe reads: a text file, sotu or wikitext2")
    verb.add_argument("--tokens", default="512", metavar="N", help="tokens that the probe reads (default 512)")


def _curve(verb: Parser) -> None:
    verb.add_argument("--site", required=True, metavar="S", help="a site of all layers (down_in), or of one (layers.3.k)")
    verb.add_argument("--bits", default="4", metavar="B", help="bits of the site, 2 to 8 (default 4)")
    _inspect(verb)
    _probe(verb)


def _calibrations(verb: Parser) -> None:
    verb.add_argument("--against", required=True, metavar="FILE", help="calibration text B: a text file, sotu or wikitext2")
    verb.add_argument("--against-tokens", metavar="N", help="tokens of B (default: those of the recipe's calibration, A)")
    _probe(verb)
    _recipe(verb)


def _recipe(verb: Parser) -> None:
    _model(verb, required=False)
    verb.add_argument("--method", help=f"{', '.join(METHODS)} (default rptq)")
    verb.add_argument("--scheme", metavar="S", help=f"{', '.join(SCHEMES)} or custom (default W4A4)")
    verb.add_argument("--bits", metavar="k=3,v=3", help="own bits on top of the scheme; with custom, the others stay at 16")
    verb.add_argument(
        "--variant",
        help=f"rules: {', '.join(VARIANTS)}; matched: RTN by RPTQ's groups and ranges; sorted: RPTQ in groups of equal size",
    )
    verb.add_argument(
        "--set",
        action="append",
        metavar="layers.7.k=3",
        help="bits or clusters of one layer or site, as layers.0-3.weights=8, layers.7.weights.down=3, layers.7.R5=64 or "
        "layers.7=16; may be repeated",
    )
    verb.add_argument("--clusters", metavar="R1=32,R2=4", help="clusters per reordering, one number for all, or channel")
    verb.add_argument("--segments", help=f"{', '.join(SEGMENTS)}: how many accumulators integers take (default exact)")
    verb.add_argument("--order", help=f"{' or '.join(ORDERS)}: of the residual stream, in each layer or in all (default layer)")
    verb.add_argument("--weights", help=f"{' or '.join(WEIGHT_METHODS)} (default gptq)")
    switches = "options of the method rotation: scale, rotate, key_mean, dynamic, clip, halfway on or off; "
    switches += "block and group as numbers, 0 for all channels; kv=static or token"
    verb.add_argument("--rotation", metavar="scale=off,group=64", help=switches)
    parts = "RPTQ+: on, or switches as of --rotation; group 0 for clusters, dynamic and rotate as sites joined by +; off: RPTQ"
    verb.add_argument("--plus", metavar="on", help=parts)
    verb.add_argument(
        "--distill",
        metavar="steps=12,tokens=1024",
        help="train the quantised model towards the original: steps, tokens per step, lr, and texts, some of "
        f"{', '.join(DISTILL_TEXTS)} joined by +; off takes it out of a recipe",
    )
    verb.add_argument("--mode", help=f"rules of bitnet: {', '.join(BITNET_MODES)} (default a4.8)")
    verb.add_argument("--keep", metavar="X", help="share of the output projection's input that bitnet's TopK keeps (default 0.5)")
    verb.add_argument("--kv-bits", metavar="B", help="bits of bitnet's keys and values (default 16)")
    verb.add_argument("--bos-bits", metavar="B", help="bits of the first token's keys and values below 16 bits (default 4)")
    verb.add_argument("--q-bits", metavar="B", help="bits of bitnet's queries (default 16)")
    _calibration(verb)
    verb.add_argument("--recipe", metavar="FILE", help="a recipe as JSON; options given beside it win")


def _evaluate(verb: Parser) -> None:
    _model(verb)
    verb.add_argument("--reference", metavar="M0", help="the model to compare with: adds divergence and agreement")
    verb.add_argument("--stream", action="store_true", help="hold one layer in memory at a time")
    _scoring(verb)


def _generate(verb: Parser) -> None:
    _model(verb)
    verb.add_argument("--prompt", required=True, help="the text to continue")
    _writing(verb)
    verb.add_argument("--seed", default="0", metavar="S", help="of sampling (default 0)")
    _backend(verb)


def _compare(verb: Parser) -> None:
    verb.add_argument("--models", required=True, nargs="+", metavar="M", help="two or more; the first is the reference")
    verb.add_argument("--baseline", action="append", default=[], metavar="B", help="baseline of the first: see doctor")
    _device(verb)
    _scoring(verb)
    verb.add_argument("--prompt", help="also let every model continue this text")
    _writing(verb)


def _scores(verb: Parser) -> None:
    verb.add_argument("--models", required=True, nargs="+", metavar="M", help="one or more; any verb's models")
    verb.add_argument("--tasks", required=True, metavar="T,T", help="names of lm-evaluation-harness: arc_easy,piqa,hellaswag,…")
    verb.add_argument("--limit", metavar="N", help="questions of each task (default all)")
    _backend(verb)
    _device(verb)


def _sweep(verb: Parser) -> None:
    verb.add_argument("grid", metavar="GRID.yaml", help="fields of recipes, each with one value or a list; see docs/sweeps.md")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder of the rows; run again with it to go on")
    verb.add_argument("--workers", default="1", metavar="N", help="processes, which share the cores (default 1)")
    verb.add_argument("--retry", action="store_true", help="run recipes that failed before once more")
    verb.add_argument("--html", metavar="FILE", help="also write a report with tables and charts as one HTML file")
    _device(verb)


def _memory(verb: Parser) -> None:
    verb.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_SHAPE",
        help="opt-13b, …, layers=40,hidden=5120,heads=40, a model folder, a config.json, or owner/name of the Hub",
    )
    verb.add_argument("--scheme", required=True, metavar="S", help=f"{', '.join(PROJECTED)}; several with commas, or all")
    verb.add_argument("--batch", required=True, metavar="B", help="sequences at once; several with commas make a grid")
    verb.add_argument("--seq", required=True, metavar="T", help="tokens per sequence; several with commas make a grid")
    verb.add_argument("--gpu", metavar="G", help=f"also the roofline of {', '.join(GPUS)}")


def _sparsity(verb: Parser) -> None:
    _model(verb)
    verb.add_argument("--text", default="sotu", metavar="FILE", help=TEXT_HELP)
    verb.add_argument("--tokens", default="512", metavar="N", help="tokens to run, in whole windows of up to 256 (default 512)")


VERBS: dict[str, tuple[Callable[[argparse.Namespace, Console], None], Callable[[Parser], None], str]] = {
    "models": (verbs.models, _no_options, "List the models that can be named"),
    "inspect": (verbs.inspect, _ranges, "Observe the range of every channel of every activation"),
    "recipe": (verbs.recipe, _recipe, "Write a recipe as JSON, link and command; nothing is loaded"),
    "quantize": (quantize, _quantize, "Quantise a model into a folder"),
    "allocate": (allocate, _allocate, "Choose bits of single layers for a budget of bytes, from predicted costs"),
    "curve": (curve, _curve, "Predict what one site costs by its number of clusters"),
    "calibrations": (calibrations, _calibrations, "Compare two calibration texts: ranges, clusters, divergence"),
    "export": (export, export_options, "Write a quantised model in the format of another program"),
    "evaluate": (verbs.evaluate, _evaluate, "Measure perplexity, divergence from a reference, bytes and speed"),
    "generate": (verbs.generate, _generate, "Continue a prompt, streamed to stdout"),
    "compare": (verbs.compare, _compare, "Measure several models on the same text, the first being the reference"),
    "sparsity": (verbs.sparsity, _sparsity, "Count the zeros a BitNet model multiplies with, and its active parameters"),
    "memory": (memory, _memory, "Project memory by formula; nothing is loaded"),
    "sweep": (sweep, _sweep, "Run many recipes by several processes, one row each, resumable"),
    "scores": (scores, _scores, "Score models on standard tasks, by lm-evaluation-harness (pip install lm-eval)"),
    "doctor": (doctor, _no_options, "Print versions with their tested ranges, and which backends run and why"),
    "train": (train, train_options, "Train a small model, BitNet or float, from a configuration"),
}


def _drop_stdout() -> None:
    """Discard output that is still buffered after the reader of stdout has gone, without a message at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _prepare_process() -> None:
    """Set up what a process of its own needs: quiet libraries, signals that unwind, output in any locale."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)  # a level of the root logger would not stop the libraries' own handlers

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), leave)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run() -> Any:
    """Run the command line and exit: the entry of `python -m app.cli`."""
    _prepare_process()
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = report(BrokenPipeError())
    sys.exit(code)


if __name__ == "__main__":
    run()
