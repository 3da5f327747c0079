"""Two reports compared window by window, against numpy; what may not be compared; and a verdict in words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import InputError
from core.evaluation.paired import PairedRatio, paired, protocol_problem, t_quantile
from core.report import EvalReport


def report(losses: list[float], **changes) -> EvalReport:
    """A report of one window per loss."""
    nll = math.fsum(losses) / len(losses)
    plain = {
        "nll": nll,
        "window_nll": losses,
        "perplexity": math.exp(nll),
        "perplexity_stderr": 0.1,
        "windows_id": "0123456789abcdef",
        "text_name": "sotu",
        "tokens": 512 * len(losses),
        "window": 512,
        "weight_parts": {},
        **dict.fromkeys(("seconds", "tokens_per_second", "weight_bytes", "working_bytes", "kv_bytes_per_token"), 1),
        **dict.fromkeys(("key", "label", "device", "dtype", "backend", "protocol"), "x"),
    }
    return EvalReport(**(plain | changes))


def test_the_paired_error_is_that_of_the_differences():
    """Windows differ by a factor of ten in loss, the models by one percent: only the paired error sees that."""
    rng = np.random.default_rng(0)
    b = rng.uniform(1, 10, 64)
    a = b + 0.01 + rng.normal(0, 0.002, 64)
    found = paired(report(a.tolist()), report(b.tolist()))
    assert found.ln_ratio == pytest.approx((a - b).mean()) and found.windows == 64
    assert found.stderr == pytest.approx((a - b).std(ddof=1) / 8)
    assert found.ratio == pytest.approx(math.exp(a.mean()) / math.exp(b.mean()))
    assert found.stderr < a.std() / 8 / 100 and found.differs
    assert found.verdict().endswith(": worse") and paired(report(b.tolist()), report(a.tolist())).verdict().endswith(": better")


def test_what_is_not_told_apart_says_so():
    assert not PairedRatio(0.01, 0.01, 64).differs and PairedRatio(0.01, 0.01, 64).verdict().endswith("not told apart")
    assert PairedRatio(0.0, 0.0, 4).differs is False, "a model and itself"
    assert PairedRatio(0.0253, 0.0022, 4).differs, "what two overlapping errors of single perplexities hide"
    assert PairedRatio(0.05, 0.01, 2).differs is False, "with two windows an error is hardly known"
    alone = paired(report([2.0]), report([1.0]))
    assert alone.stderr is None and alone.differs is None and "one window" in alone.verdict()
    assert PairedRatio(1e4, 1.0, 9).ratio < math.inf


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (3, 3.182), (7, 2.365), (10, 2.228), (11, 2.201), (15, 2.131), (20, 2.086), (30, 2.042), (63, 1.998)],
)
def test_quantiles_of_t(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows_id": "f" * 16, "tokens": 8192}, "8,192 tokens of sotu in windows of 512"),
        ({"windows_id": "f" * 16, "text_name": "wikitext2"}, "of wikitext2"),
        ({"windows_id": "f" * 16, "window": 256}, "windows of 256"),
        ({"windows_id": "f" * 16}, "different tokens"),
        ({"windows_id": "", "window_nll": []}, "before losses were kept"),
    ],
)
def test_other_protocols_are_refused(changes, words):
    a, b = report([1.0, 2.0]), report([1.0, 2.0], **changes)
    for pair in ((a, b), (b, a)):
        assert words in protocol_problem(*pair)
        with pytest.raises(InputError, match="measure both on the same") as caught:
            paired(*pair)
        assert caught.value.code == "E-PARAM-PROTOCOL" and len(str(caught.value)) < 240
    assert protocol_problem(a, report([3.0, 4.0])) is None


def test_reports_are_json():
    found = report([1.0, 2.0], kld_quantiles={"50": 0.1, "100": math.inf}).to_dict()
    assert found["window_nll"] == [1.0, 2.0] and found["kld_quantiles"] == {"50": 0.1, "100": None}
    assert PairedRatio(0.1, None, 1).to_dict() == {"ln_ratio": 0.1, "stderr": None, "windows": 1}
