"""Distilling a tiny model: judged on held-out windows, stopped, continued, and saved as it was evaluated."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import pytest
import torch

from core.distill import loop
from core.distill.loop import JUDGED_EVERY, distill_model
from core.distill.state import read_state
from core.distill.texts import DistillTexts
from core.distill_report import DistillReport
from core.errors import Cancelled, NumericError
from core.models.io.quantized import block_facts, block_tensors, load_quantized, save_quantized
from core.models.tiny import tiny_tokenizer
from core.options import DistillOptions
from core.recipe import Bits
from tests.core.tools import Quantised, quantised, tokens
from tests.core.workbench_tools import TEXT

OPTIONS = DistillOptions(steps=8, tokens=512, lr=0.05)


@lru_cache(maxsize=1)
def texts() -> DistillTexts:
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    return DistillTexts(rows[8:72], rows[:8], ("numbers",), tokens(4, 32), "noise")


@lru_cache(maxsize=1)
def start() -> Quantised:
    bits = Bits(weights=3, attn_in=4, k=3, v=3, mlp_in=4)
    return quantised("llama", method="rotation", scheme="custom", bits=bits, windows=texts().train[:8])


def distilled(options: DistillOptions = OPTIONS, **arguments):
    return distill_model(start().base.model, start().model, options, texts(), **arguments)


def stored(model) -> list[dict[str, torch.Tensor]]:
    return [block_tensors(block) for block in model.blocks]


def equal(one, other) -> bool:
    """Say whether two models store the same bits."""
    pairs = zip(stored(one), stored(other), strict=True)
    facts = [[block_facts(block) for block in model.blocks] for model in (one, other)]  # clip ratios
    return facts[0] == facts[1] and all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


def test_the_divergence_on_held_out_windows_falls_and_is_that_of_the_saved_model(tmp_path):
    before = [{name: t.clone() for name, t in block.items()} for block in stored(start().model)]
    model, report = distilled()
    assert [mark.step for mark in report.marks] == [0, 4, 8] and report.best in (4, 8)
    assert report.after.kld < 0.9 * report.before.kld
    assert len(report.losses) == report.steps == 8 and report.tokens == 512 and report.held_out == 256
    assert report.texts == ("numbers",) and report.other == "noise" and report.after.other_perplexity > 0
    assert DistillReport.from_dict(report.to_dict()) == report
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, stored(start().model), strict=True) for name in a)

    save_quantized(tmp_path / "q", dataclasses.replace(start().loaded, model=model), {})
    again = load_quantized(tmp_path / "q").model
    assert equal(again, model)
    held = texts().held_out
    assert torch.equal(again(held).logits, model(held).logits)
    log_p, log_q = (m(held).logits[:, :-1].double().log_softmax(-1) for m in (again, start().base.model))
    kld = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert kld == pytest.approx(report.after.kld, rel=1e-4), "the model that was judged is the one that was saved"
    loss = -float(log_p.gather(-1, held[:, 1:, None]).mean())
    assert report.after.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


def test_steps_that_make_the_model_worse_are_not_kept():
    model, report = distilled(dataclasses.replace(OPTIONS, steps=2, lr=1.0))
    assert report.marks[-1].kld > report.before.kld and report.best == 0
    assert model is start().model and report.after == report.before


def stop_at(step: int, error: type[BaseException]):
    def progress(stage: str, fraction: float | None) -> None:
        if stage.startswith(f"Distilling: step {step} "):
            raise error

    return progress


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_stop_keeps_the_best_so_far_which_is_the_run_of_as_many_steps(error, tmp_path):
    model, report = distilled(progress=stop_at(7, error), state=tmp_path / "state")
    assert report.stopped and report.steps == JUDGED_EVERY and len(report.losses) == JUDGED_EVERY
    short, shorter = distilled(dataclasses.replace(OPTIONS, steps=JUDGED_EVERY))
    assert equal(model, short) and report.marks == shorter.marks and not shorter.stopped
    assert (tmp_path / "state").is_dir(), "to continue from"


def test_a_stop_in_the_middle_of_a_backward_pass_keeps_the_best(tmp_path):
    count = itertools.count()

    def progress(stage: str, fraction: float | None) -> None:
        if stage.startswith("Distilling: step 6 ") and next(count) == 2:  # two blocks forward, then one again, backward
            raise Cancelled

    model, report = distilled(progress=progress)
    assert report.stopped and equal(model, distilled(dataclasses.replace(OPTIONS, steps=4))[0])


def test_a_stop_before_the_first_judgement_raises_and_before_the_first_step_changes_nothing():
    with pytest.raises(Cancelled):
        distilled(progress=lambda stage, fraction: (_ for _ in ()).throw(Cancelled()))
    model, report = distilled(progress=stop_at(1, Cancelled))
    assert model is start().model and report.steps == report.best == 0


def test_a_continued_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    state = tmp_path / "state"
    distilled(progress=stop_at(6, Cancelled), state=state)
    taken = []
    model, report = distilled(state=state, progress=lambda stage, fraction: taken.append(stage))
    assert not any(" step 1 " in stage or " step 4 " in stage for stage in taken), "it went on from the fourth step"
    whole, expected = distilled()
    assert equal(model, whole)
    assert dataclasses.replace(report, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)
    assert not state.exists(), "nothing is left once it has ended"


def test_a_damaged_state_is_left_out(tmp_path, caplog):
    state = tmp_path / "state"
    distilled(progress=stop_at(6, Cancelled), state=state)
    content = bytearray((state / "state.safetensors").read_bytes())
    content[-1] ^= 255
    (state / "state.safetensors").write_bytes(content)
    assert read_state(state, start().model) is None and "left out" in caplog.text
    assert equal(distilled(state=state)[0], distilled()[0])


def test_a_loss_that_is_not_finite_is_named():
    done = quantised("llama", method="rotation")
    done.base.model.blocks[0].norm1.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="smaller lr"):
        distill_model(done.base.model, done.model, OPTIONS, texts())


def test_memory_does_not_grow_with_the_layers_but_by_what_enters_them():
    """Tensors that autograd keeps between the passes: the inputs of blocks, and the states before the head."""
    kept = []
    for layers in (1, 3):
        done = quantised("llama", layers=layers, method="rotation", variant="strict", windows=texts().train[:8])
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        run = loop._Run(done.base.model, done.model, OPTIONS, texts())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.step(lambda stage, fraction: None)
        kept.append(sum(sizes.values()))
    state = 512 * 64 * 4
    assert kept[1] - kept[0] <= 3 * state, kept
