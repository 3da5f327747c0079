"""Scores against the definition written out in float64: NLL, its error over windows, divergence, agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from core.calibration.data import windows as cut
from core.errors import Cancelled, NumericError
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.models.tiny import tiny_model
from tests.core.tools import ARCHITECTURES, quantised, tiny, tokens


def reference_of(model, windows: Tensor) -> Reference:
    return Reference("reference", model.get_output_embeddings(), hidden_windows(model, windows))


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
    assert found.tokens_per_second == pytest.approx(5 * 15 / found.seconds)
    assert found.window_nll == pytest.approx(losses, rel=1e-5)
    assert found.kld_mean is None and found.same_top_token is None and found.ln_ratio is None


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
    found = score(model, windows, reference=reference_of(model, windows))
    assert found.kld_mean == pytest.approx(0, abs=1e-7) and found.same_top_token == 1.0
    assert abs(found.ln_ratio) < 1e-6 and found.delta_p_mean == found.delta_p_rms == found.delta_p_rms_stderr == 0
    assert found.nll == score(model, windows).nll, "the reference changes nothing"


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over windows and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_comparison_with_a_reference_by_hand(architecture):
    """Every figure of llama-perplexity's list, in numpy from the two models' logits in float64, errors over windows."""
    q, windows = quantised(architecture, layers=1), tokens(5, 14, seed=5)
    base = q.base.model
    found = score(q.model, windows, reference=reference_of(base, windows))
    p, r = (m(windows).logits[:, :-1].double().log_softmax(-1).numpy() for m in (q.model, base))
    right = windows[:, 1:, None].numpy()
    p_right, r_right = (np.take_along_axis(x, right, axis=2)[..., 0] for x in (p, r))
    kld, delta = (np.exp(r) * (r - p)).sum(-1), np.exp(p_right) - np.exp(r_right)
    same = (p.argmax(-1) == r.argmax(-1)).astype(float)
    ratio, error = mean_and_error((r_right - p_right).mean(1))
    assert (found.ln_ratio, found.ln_ratio_stderr) == pytest.approx((ratio, error), rel=1e-3, abs=1e-7)
    assert (found.kld_mean, found.kld_stderr) == pytest.approx(mean_and_error(kld.mean(1)), rel=1e-3) and found.kld_mean > 0
    assert (found.same_top_token, found.same_top_stderr) == pytest.approx(mean_and_error(same.mean(1)), abs=1e-6)
    assert (found.delta_p_mean, found.delta_p_stderr) == pytest.approx(mean_and_error(delta.mean(1)), rel=1e-3, abs=1e-8)
    square, square_error = mean_and_error((delta**2).mean(1))
    assert (found.delta_p_rms, found.delta_p_rms_stderr) == pytest.approx(
        (np.sqrt(square), square_error / (2 * np.sqrt(square))), rel=1e-3
    )
    expected = {name: np.quantile(kld, float(name) / 100) for name in ("50", "90", "95", "99", "99.9", "100")}
    assert found.kld_quantiles == pytest.approx(expected, rel=1e-3)
    assert found.kld_quantiles["100"] == pytest.approx(kld.max(), rel=1e-3)
    assert 0 < found.same_top_token < 1 and found.delta_p_rms > 0
    other = score(base, windows, reference=reference_of(q.model, windows))
    assert abs(other.kld_mean - found.kld_mean) > 1e-4, "KL(reference || model) has a direction"
    assert other.ln_ratio == pytest.approx(-found.ln_ratio, abs=1e-5)


def test_a_single_window_has_no_error():
    q, windows = quantised("llama", layers=1), tokens(1, 14, seed=5)
    found = score(q.model, windows, reference=reference_of(q.base.model, windows))
    errors = (found.ln_ratio_stderr, found.kld_stderr, found.same_top_stderr, found.delta_p_stderr, found.delta_p_rms_stderr)
    assert errors == (None,) * 5 and found.ln_ratio is not None and found.perplexity_stderr == 0


def test_equal_windows_have_equal_ids():
    model, windows = tiny("llama").model, tokens(4, 12, seed=6)
    ids = [score(model, w).windows_id for w in (windows, windows.clone(), windows[:3], windows.view(8, 6), windows.flip(0))]
    assert ids[0] == ids[1] and len(set(ids[1:])) == 4 and len(ids[0]) == 16


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    loaded = tiny_model("llama")
    loaded.model.decoder.head.weight.data.zero_()
    found = score(loaded.model, tokens(2, 9))
    assert found.perplexity == pytest.approx(259, rel=1e-5) and found.perplexity_stderr == pytest.approx(0, abs=1e-3)


def test_a_loss_that_is_not_finite_is_an_error():
    loaded = tiny_model("llama")
    loaded.model.decoder.head.weight.data[5] = math.nan
    with pytest.raises(NumericError, match="window 1") as caught:
        score(loaded.model, tokens(2, 9))
    assert caught.value.code == "E-NUM-NAN" and len(str(caught.value)) < 240


def test_a_hopeless_model_does_not_overflow():
    loaded = tiny_model("llama")
    loaded.model.decoder.head.weight.data.mul_(1e5)
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


def test_no_time_is_no_speed(monkeypatch):
    monkeypatch.setattr("core.evaluation.perplexity.time.perf_counter", lambda: 1.0)
    assert score(tiny("llama").model, tokens(2, 9)).tokens_per_second == 0.0
