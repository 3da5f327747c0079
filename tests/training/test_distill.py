"""Distillation: the divergence and its gradient, what a student starts with, and that it learns its teacher's distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.errors import InputError
from core.models.io.load import load_model
from tests.training.train_tools import losses, tiny, write_text
from training.config import TrainConfig
from training.corpus import load_corpus
from training.distill import divergence, load_teacher, start_from, teacher_logits
from training.export import export_run
from training.loop import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, a cache of its own, and a float model that was trained on the text: `teacher`."""
    folder = tmp_path_factory.mktemp("distill")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    write_text(folder / "text.txt")
    train(tiny(folder, architecture="llama", mode="fp", lr=(1e-2, 1e-2), tokens=60 * 64), folder / "run")
    export_run(folder / "run", folder / "teacher")
    yield folder
    patch.undo()


def student(place, **fields) -> TrainConfig:
    """A ternary run that learns from the teacher."""
    return tiny(place, teacher=str(place / "teacher"), **fields)


def test_the_divergence_is_that_of_the_definition():
    student_logits, teacher = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    student_logits.requires_grad_()
    q, p = student_logits.softmax(-1), teacher.softmax(-1)
    found = divergence(student_logits, teacher)
    assert found.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    found.backward()
    assert torch.allclose(student_logits.grad, (q - p).detach() / 10)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_a_student_starts_with_the_teachers_tensors(place):
    config = student(place, teacher_start=True)
    teacher = load_model(str(place / "teacher"))
    model = config.build_model()
    copied = start_from(model, teacher)
    own = {name: p.numel() for name, p in model.named_parameters()}
    assert copied == sum(size for name, size in own.items() if "sub_norm" not in name)
    rows = torch.arange(64).view(2, 32)
    embedded = teacher.model.decoder.embed.weight
    assert torch.equal(model.get_input_embeddings().weight, embedded) and teacher_logits(teacher, rows).shape == (2, 31, 300)


def test_a_teacher_pulls_the_student_to_its_distribution(place, tmp_path):
    """After as many tokens, the student of the divergence alone is closer to the teacher than one of the text alone."""
    teacher = load_model(str(place / "teacher"))
    distances = []
    for weight in (0.0, 1.0):
        config = student(place, teacher_weight=weight, tokens=60 * 64, lr=(1e-2, 1e-2), seed=1)
        train(config, tmp_path / str(weight))
        export_run(tmp_path / str(weight), tmp_path / f"model-{weight}")
        made = load_model(str(tmp_path / f"model-{weight}"))
        rows = load_corpus(config.texts, vocab=300).held_out[: 8 * 32].view(8, 32)
        distances.append(float(divergence(teacher_logits(made, rows), teacher_logits(teacher, rows))))
    assert distances[1] < distances[0]
    plain = tiny(place, tokens=60 * 64, lr=(1e-2, 1e-2), seed=1)
    train(plain, tmp_path / "plain")
    assert losses(tmp_path / "plain") == losses(tmp_path / "0.0"), "a weight of 0 is no teacher"


def test_a_resumed_student_is_an_uninterrupted_one(place, tmp_path):
    whole = student(place, teacher_start=True)
    train(whole, tmp_path / "whole")

    def stop(text, share):
        if share and share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(whole, tmp_path / "cut", progress=stop)
    train(whole, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    with pytest.raises(InputError, match="teacher"):
        train(replace(whole, teacher_weight=0.9), tmp_path / "cut", resume=True)


def test_the_card_names_the_teacher(place, tmp_path):
    train(student(place), tmp_path / "run")
    card = export_run(tmp_path / "run", tmp_path / "model")
    assert "distilled from" in card["description"] and card["title"].endswith("M") and "distilled" in card["title"]


def test_teachers_that_do_not_fit_are_refused(place):
    tokenizer = load_corpus(tiny(place).texts, vocab=280).tokenizer_file
    with pytest.raises(InputError, match="other tokens"):
        load_teacher(str(place / "teacher"), tokenizer, seq=32, device="cpu")
    with pytest.raises(InputError, match="32 tokens at most"):
        load_teacher(str(place / "teacher"), load_corpus(tiny(place).texts, vocab=300).tokenizer_file, seq=33, device="cpu")


@pytest.mark.parametrize("fields", [
    {"teacher": 3}, {"teacher": ""}, {"teacher": "m", "teacher_weight": 2.0}, {"teacher": "m", "teacher_start": 1},
    {"teacher_start": True}, {"teacher": "m", "teacher_start": True, "init_from": "x"},
], ids=str)
def test_fields_that_do_not_fit_are_refused(place, fields):
    with pytest.raises(InputError, match="teacher"):
        tiny(place, **fields)
