"""Scores against the definition written out in float64: NLL, its error over windows, divergence, agreement."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core.calibration.data import windows as cut
from core.errors import Cancelled, NumericError
from core.evaluation.perplexity import LanguageScore, hidden_windows, score
from core.models.tiny import tiny_model
from tests.core.tools import ARCHITECTURES, quantised, tiny, tokens


def by_hand(logits: Tensor, windows: Tensor) -> list[float]:
    """Mean NLL of each window, one probability at a time."""
    losses = []
    for row, ids in zip(logits.double(), windows, strict=True):
        terms = []
        for t in range(len(ids) - 1):
            p = torch.exp(row[t] - row[t].max())
            terms.append(-math.log(float(p[ids[t + 1]] / p.sum())))
        losses.append(sum(terms) / len(terms))
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nll_and_perplexity(architecture):
    model, windows = tiny(architecture).model, tokens(5, 16, seed=1)
    found = score(model, windows)
    losses = by_hand(model(windows).logits, windows)
    mean = sum(losses) / 5
    assert found.nll == pytest.approx(mean, rel=1e-5) and found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.tokens == 5 * 15 and found.seconds > 0 and found.tokens_per_second > 0
    assert found.kld_mean is None and found.same_top_token is None


def test_standard_error_is_over_windows_and_carried_through_exp():
    model, windows = tiny("llama").model, tokens(6, 12, seed=2)
    found, losses = score(model, windows), by_hand(tiny("llama").model(windows).logits, windows)
    mean = sum(losses) / 6
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / 5)
    assert found.perplexity_stderr == pytest.approx(math.exp(mean) * deviation / math.sqrt(6), rel=1e-3)
    assert score(model, windows[:1]).perplexity_stderr == 0
    assert score(model, windows[:1].expand(4, -1)).perplexity_stderr == pytest.approx(0, abs=1e-6)


def test_windows_do_not_see_each_other():
    """Each window starts anew: scores of several are the mean of the scores alone, whatever their order."""
    model, windows = tiny("opt").model, tokens(4, 20, seed=3)
    alone = [score(model, w[None]).nll for w in windows]
    assert score(model, windows).nll == pytest.approx(sum(alone) / 4, rel=1e-7)
    assert score(model, windows.flip(0)).nll == pytest.approx(sum(alone) / 4, rel=1e-7)


def test_the_protocol_cuts_without_overlap_and_drops_the_rest():
    stream = torch.arange(57)
    parts = cut(stream, window=10)
    assert parts.tolist() == [list(range(i, i + 10)) for i in range(0, 50, 10)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_against_itself(architecture):
    model, windows = tiny(architecture).model, tokens(3, 14, seed=4)
    found = score(model, windows, reference=hidden_windows(model, windows), reference_head=model.get_output_embeddings())
    assert found.kld_mean == pytest.approx(0, abs=1e-7) and found.same_top_token == 1.0
    assert found.nll == score(model, windows).nll, "the reference changes nothing"


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_divergence_and_agreement_by_hand(architecture):
    q, windows = quantised(architecture, layers=1), tokens(3, 14, seed=5)
    base = q.base.model
    found = score(q.model, windows, reference=hidden_windows(base, windows), reference_head=base.get_output_embeddings())
    p, r = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (q.model, base))
    assert found.kld_mean == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4) and found.kld_mean > 0
    assert found.same_top_token == pytest.approx(float((p.argmax(-1) == r.argmax(-1)).double().mean()), abs=1e-6)
    assert 0 < found.same_top_token < 1
    other = score(base, windows, reference=hidden_windows(q.model, windows), reference_head=q.model.get_output_embeddings())
    assert abs(other.kld_mean - found.kld_mean) > 1e-4, "KL(reference || model) has a direction"


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    loaded = tiny_model("llama")
    loaded.model.lm_head.weight.data.zero_()
    found = score(loaded.model, tokens(2, 9))
    assert found.perplexity == pytest.approx(259, rel=1e-5) and found.perplexity_stderr == pytest.approx(0, abs=1e-3)


def test_a_loss_that_is_not_finite_is_an_error():
    loaded = tiny_model("llama")
    loaded.model.lm_head.weight.data[5] = math.nan
    with pytest.raises(NumericError, match="window 1") as caught:
        score(loaded.model, tokens(2, 9))
    assert caught.value.code == "E-NUM-NAN" and len(str(caught.value)) < 240


def test_a_hopeless_model_does_not_overflow():
    loaded = tiny_model("llama")
    loaded.model.lm_head.weight.data.mul_(1e5)
    found = score(loaded.model, tokens(2, 9))
    assert math.isfinite(found.perplexity) and found.nll > 700 and math.isfinite(found.perplexity_stderr)


def test_progress_counts_windows_and_cancel_stops():
    calls: list[tuple[str, float]] = []
    score(tiny("llama").model, tokens(3, 9), progress=lambda *call: calls.append(call))
    assert [f for _, f in calls] == pytest.approx([0, 1 / 3, 2 / 3]) and "window 3 of 3" in calls[-1][0]

    def stop(stage: str, fraction: float | None) -> None:
        raise Cancelled

    for work in (score, hidden_windows):
        with pytest.raises(Cancelled):
            work(tiny("llama").model, tokens(3, 9), progress=stop)


def test_no_time_is_no_speed():
    assert LanguageScore(1, 1, 0, None, None, 10, 0.0).tokens_per_second == 0.0
