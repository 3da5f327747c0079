"""Divergence token by token: against log-softmax by hand, its groups, and what is refused."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.evaluation.tokens import CONFIDENCE, token_divergences
from core.evaluation.windows import evaluation_windows
from tests.core.tools import quantised, tiny

TEXT = "text:" + "a few words that a tiny model reads " * 8


def test_every_token_against_the_formula():
    made = quantised("llama", scheme="W4A4KV", weights="rtn")
    report = token_divergences(made.loaded, made.base, TEXT, tokens=40, key="run")
    (ids,), _ = evaluation_windows(made.loaded, TEXT, tokens=40, window=40)
    ours, theirs = (
        torch.log_softmax(x.model.decoder.head(x.model.decoder(ids[None]))[0, :-1], -1) for x in (made.loaded, made.base)
    )
    assert (report.key, report.reference, len(report.tokens)) == ("run", made.base.name, 40)
    assert report.tokens[0].kld is None and not report.tokens[0].likeliest
    for place, token in enumerate(report.tokens[1:]):
        p, q = theirs[place], ours[place]
        assert token.text == made.base.tokenizer.decode(ids[place + 1 : place + 2])
        assert token.kld == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert token.probability == pytest.approx(float(q[ids[place + 1]].exp()), abs=1e-5)
        assert token.flips == (int(p.argmax()) != int(q.argmax()))
        assert [x for _, x in token.reference_likeliest] == pytest.approx(p.exp().topk(5).values.tolist(), abs=1e-5)
        assert token.likeliest[0][0] == made.base.tokenizer.decode([int(q.argmax())])
    assert report.kld == pytest.approx(sum(t.kld for t in report.tokens[1:]) / 39, rel=1e-4)


def test_groups_hold_every_token_once():
    made = quantised("llama", scheme="W4A4KV", weights="rtn")
    report = token_divergences(made.loaded, made.base, TEXT, tokens=64)
    groups = report.groups
    assert sum(g.tokens for g in groups) == 63 and all(g.low in CONFIDENCE for g in groups)
    assert sum(g.tokens * g.kld for g in groups) / 63 == pytest.approx(report.kld, rel=1e-4)
    assert sum(g.tokens * g.flips for g in groups) == pytest.approx(sum(t.flips for t in report.tokens), rel=1e-4)


def test_a_model_beside_itself_differs_nowhere():
    base = tiny("opt")
    report = token_divergences(base, base, TEXT, tokens=32)
    assert report.kld == 0 and not any(t.flips or t.kld for t in report.tokens)


@pytest.mark.parametrize("tokens", [7, 513, "many", None])
def test_numbers_out_of_range_are_refused(tokens):
    with pytest.raises(InputError, match="tokens"):
        token_divergences(tiny("llama"), tiny("llama"), TEXT, tokens=tokens)
