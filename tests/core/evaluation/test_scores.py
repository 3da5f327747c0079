"""Scores on tasks are those that the harness gives the same model of transformers; without the harness one sentence says so."""

from __future__ import annotations

import importlib.util
import json

import pytest

from core.errors import InputError, ResourceError
from core.evaluation import scores
from core.evaluation.scores import local_tasks, read_hellaswag, run_task, score_tasks, task_file
from core.models.tiny import tiny_model
from tests.core.tools import tiny_source

HARNESS = importlib.util.find_spec("lm_eval") is not None
ARC = [{"query": f"Question: Is {n} even?", "choices": ["yes", "no", "perhaps"], "gold": n % 2} for n in range(6)]
PLACES = [{"context_options": ["Ann thanked Bo as Ann", "Ann thanked Bo as Bo"], "continuation": "helped.", "gold": 1}] * 3
LAST = [{"context": "one two one", "continuation": "two"}] * 2
SWAG = "A man sits. he\n1\nflies.\nstands up.\nis blue.\neats the sun.\n" * 2


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("arc_easy.jsonl", ARC), ("winogrande.jsonl", PLACES), ("lambada_openai.jsonl", LAST)):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / "hellaswag_val_full.txt").write_text(SWAG)
    monkeypatch.setenv("QUANTSCOPE_DATA", str(tmp_path))
    return folder


def test_local_data_is_found_by_the_harness_name(tasks):
    assert local_tasks() == ["arc_easy", "hellaswag", "winogrande", "lambada_openai"]
    assert task_file("arc_easy") == tasks / "arc_easy.jsonl" and task_file("piqa") is task_file("nothing") is None


def test_hellaswag_has_six_lines_an_item(tasks):
    rows = read_hellaswag(tasks / "hellaswag_val_full.txt")
    assert rows == [{"query": "A man sits. he", "gold": 1, "choices": ["flies.", "stands up.", "is blue.", "eats the sun."]}] * 2
    (tasks / "hellaswag_val_full.txt").write_text(SWAG + "more\n")
    with pytest.raises(ValueError, match="six"):
        read_hellaswag(tasks / "hellaswag_val_full.txt")


def test_without_the_harness_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install lm-eval"):
        score_tasks(tiny_source("llama", seed=3), ["arc_easy"])


@pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is an optional package")
def test_scores_are_those_of_the_model_in_transformers(tasks):
    from lm_eval.models.huggingface import HFLM

    made = tiny_model("llama", seed=3)
    found = score_tasks(made, ["arc_easy", "winogrande", "lambada_openai", "hellaswag"])
    told = {(score.task, score.metric): score for score in found.scores}
    assert told["arc_easy", "accuracy"].questions == 6 and told["arc_easy", "accuracy"].stderr > 0
    plain = HFLM(pretrained=tiny_source("llama", seed=3).model, tokenizer=made.tokenizer, batch_size=1)
    for name in ("arc_easy", "winogrande", "lambada_openai", "hellaswag"):
        theirs = run_task(plain, name, task_file(name))["results"][name]
        assert told[name, "accuracy"].value == theirs["acc,none"]
    with pytest.raises(InputError, match="winogrande.jsonl is damaged"):
        (tasks / "winogrande.jsonl").write_text("{}")
        score_tasks(made, ["winogrande"])
