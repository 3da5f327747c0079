"""Score models on standard tasks with lm-evaluation-harness, which is optional: `pip install lm-eval`.

The harness gets our model as any model of transformers (its public class `HFLM`), and computes likelihoods, accuracies and
errors. Tasks whose data lies in `$QUANTSCOPE_DATA/tasks` are read from there, others by the harness from the Hub. Prompts are
the harness's own: a question ends in "Answer:" in ARC, PIQA and BoolQ, the text stands alone in the others.
Source: github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import InputError, ModelError, ResourceError
from core.evaluation.describe import label_of, set_backend
from core.models.io.foreign import LIBRARY_ERRORS, quiet
from core.models.loaded import LoadedModel
from core.progress import Progress, silent
from core.report import ScoreReport, TaskScore

Row = dict[str, Any]

FILES = {
    "arc_easy": "arc_easy.jsonl",
    "arc_challenge": "arc_challenge.jsonl",
    "hellaswag": "hellaswag_val_full.txt",
    "winogrande": "winogrande.jsonl",
    "piqa": "piqa.jsonl",
    "lambada_openai": "lambada_openai.jsonl",
    "openbookqa": "openbook_qa.jsonl",
    "boolq": "boolq.jsonl",
    "copa": "copa.jsonl",
    "wsc273": "winograd_wsc.jsonl",
}
"""File of each task's data, by the harness's name of the task."""
ASKED = ("arc_easy", "arc_challenge", "piqa", "boolq")
"""Tasks whose prompt ends in "Answer:"."""
NORMALISED = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa")
"""Tasks of which the accuracy by likelihood per character is reported too."""
METRICS = {"acc": "accuracy", "acc_norm": "accuracy per character"}


def score_tasks(
    loaded: LoadedModel, tasks: Sequence[str], *, limit: int | None = None, backend: str = "auto", progress: Progress = silent
) -> ScoreReport:
    """Score a model on tasks.

    Args:
        tasks: names of the harness. limit: questions of each task from its start, None for all.
        backend: as `core.stages.evaluate` takes it.
    Raises: ResourceError E-EXTRA if the harness is not installed; InputError E-PARAM-TASKS for a task that it does not know, or
        whose data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("Tasks are scored by lm-evaluation-harness: run `pip install lm-eval` once.", code="E-EXTRA")
    from lm_eval.models.huggingface import HFLM

    set_backend(loaded, backend)
    found = []
    with quiet():
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    for index, name in enumerate(tasks):
        progress(f"Scoring {name}", index / len(tasks))
        path = task_file(name)
        try:
            with quiet():
                results = run_task(model, name, path, limit)
        except (KeyError, *LIBRARY_ERRORS) as error:
            reason = "its data cannot be had here" if path is None else f"its file {path.name} is damaged"
            raise InputError(
                f"The task {name[:40]!r} cannot be scored: {reason}. Local tasks: {', '.join(local_tasks()) or 'none'}.",
                code="E-PARAM-TASKS",
            ) from error
        for own, result in results["results"].items():
            found += _scores(own, result, results["n-samples"][own]["effective"], path)
    if not found:
        raise ModelError("The tasks gave no accuracy: choose tasks with answers to choose from.", code="E-PARAM-TASKS")
    return ScoreReport(loaded.name, label_of(loaded), found, limit)


def task_file(name: str) -> Path | None:
    """Return the local file of a task's data; None where there is none."""
    root = os.environ.get("QUANTSCOPE_DATA")
    path = Path(root) / "tasks" / FILES[name] if root and name in FILES else None
    return path if path is not None and path.is_file() else None


def local_tasks() -> list[str]:
    """List the tasks whose data lies on this machine."""
    return [name for name in FILES if task_file(name) is not None]


def _scores(name: str, result: Row, questions: int, path: Path | None) -> list[TaskScore]:
    """Return what the harness found of one task."""
    source = "the harness's own data" if path is None else path.name
    found = []
    for metric in METRICS:
        value, error = result.get(f"{metric},none"), result.get(f"{metric}_stderr,none")
        if isinstance(value, float):
            found.append(TaskScore(name, METRICS[metric], value, error if isinstance(error, float) else None, questions, source))
    return found


def run_task(model: Any, name: str, path: Path | None, limit: int | None = None) -> Row:
    """Run the harness on one task, over a local file where one is given. Returns: its results.

    Args: model: of the harness. limit: as for `score_tasks`.
    """
    from lm_eval import simple_evaluate

    run = partial(simple_evaluate, model=model, limit=limit, log_samples=False)
    if path is None:
        return run(tasks=[name])
    from lm_eval.api.task import ConfigurableTask

    rows = read_hellaswag(path) if path.suffix == ".txt" else _read_lines(path)
    metrics = ("acc", "acc_norm") if name in NORMALISED else ("acc",)
    with tempfile.TemporaryDirectory() as folder:  # the library `datasets` reads files, and writes a copy of each
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder},
            "test_split": "test",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            **_prompts(name, rows[0]),
        }
        return run(tasks=[ConfigurableTask(config=config)])


def _prompts(name: str, row: Row) -> dict[str, Any]:
    """Say how a task's rows become prompts and answers: by the fields of its first row."""

    def question(row: Row) -> str:
        return row["query"].strip() + ("\nAnswer:" if name in ASKED else "")

    chosen: dict[str, Callable[[Row], Any]]
    if "choices" in row:
        chosen = {"doc_to_text": question, "doc_to_choice": lambda row: row["choices"], "doc_to_target": lambda row: row["gold"]}
    elif "context_options" in row:  # the same end after several beginnings
        chosen = {
            "doc_to_text": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["context_options"],
            "doc_to_target": lambda row: row["continuation"],
        }
    else:
        plain = {"doc_to_text": lambda row: row["context"], "doc_to_target": lambda row: f" {row['continuation']}"}
        return {"output_type": "loglikelihood", **plain}
    return {"output_type": "multiple_choice", **chosen}


def _read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_hellaswag(path: Path) -> list[Row]:
    """Read HellaSwag in llama.cpp's format: six lines each, beginning, index of the right end, four ends. Raises: ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) % 6:
        raise ValueError("HellaSwag's file has a number of lines that six does not divide")
    items = [lines[place : place + 6] for place in range(0, len(lines), 6)]
    return [{"query": first, "gold": int(gold), "choices": ends} for first, gold, *ends in items]
