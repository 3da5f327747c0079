"""A link names the whole view in readable parts, opens it in another session, and holds nothing that a visitor wrote."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest

from app.session import Run
from app.tabs.link import Linked, go_to, query_of
from core.errors import InputError
from core.recipe import Calibration, QuantRecipe
from tests.app.tools import collect

TEXT = Calibration("sotu", 1024)
RECIPE = QuantRecipe("fake", scheme="W4A8")
DIARY = "text:" + "my diary of secret words " * 60
VIEW = {
    "tab": "compare", "layer": "3", "site": "q", "channel": "7", "linear": "1", "averaged": "1", "preview": "3",
    "size": "kv_bytes_per_token", "measure_on": "wikitext2", "measure_tokens": "8192", "memory_of": "opt-66b", "batch": "64",
    "sequence": "8192", "read_on": "wikitext2", "read_tokens": "256", "new_tokens": "96", "temperature": "0.7", "chat": "1",
    "sampling_seed": "5", "memory_scheme": "W4A8", "unit": "GiB",
}  # fmt: skip


@pytest.fixture
def ctx(page):
    """What the tabs of the file's page share."""
    return page.ctx


@pytest.fixture
def session(ctx, page, wait):
    """A session with ranges."""
    session = ctx.sessions.open()
    wait(collect(page.observe(session, "fake", None, TEXT)))
    return session


def values_of(page, **changed) -> dict:
    return {part: changed.get(name, part.value) for name, part in page.fields.items()}


def test_every_part_of_a_view_comes_back_from_its_link(page, ctx, session):
    linked = Linked.read({**VIEW, "scheme": "W4A8"}, RECIPE, page.fields)
    assert linked.refused is None and len(linked.settings) == 13
    go_to(session, VIEW)
    written = query_of(session, RECIPE, page.fields, values_of(page) | linked.settings, [])
    told = {name: value for name, (value,) in parse_qs(written).items()}
    assert {name: told[name] for name in VIEW} == VIEW and told["scheme"] == "W4A8"
    assert set(told) == {*VIEW, *parse_qs(RECIPE.to_query())}, "what is as on a new page is left out"


def test_a_new_view_has_a_short_link(page, session):
    session.selection.channel = None
    assert parse_qs(query_of(session, RECIPE, page.fields, values_of(page), [])).keys() - parse_qs(RECIPE.to_query()).keys() == {
        "tab", "layer", "site"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "words"),
    [({"measure_on": "/etc/passwd"}, "measure_on is '/etc/passwd'"), ({"batch": "1e999"}, "batch"), ({"batch": "0"}, "batch"),
     ({"temperature": "-1"}, "temperature"), ({"chat": "yes"}, "chat"), ({"runs": "../../x"}, "runs is"),
     ({"runs": ",".join([RECIPE.hash] * 13)}, "runs is"), ({"scheme": "W1A1"}, "scheme"), ({"colour": "red"}, "does not know")],
    ids=str,
)  # fmt: skip
def test_a_bad_part_gets_a_sentence_and_the_others_are_followed(page, query, words):
    linked = Linked.read({**query, "read_tokens": "256"}, RECIPE, page.fields)
    assert words in str(linked.refused) and str(linked.refused).endswith(".")
    assert linked.settings == {page.fields["read_tokens"]: 256} and linked.recipe == RECIPE and not linked.runs


@pytest.mark.parametrize("place", [{"linear": "2"}, {"preview": "9"}, {"preview": "x"}, {"size": "bytes"}, {"layer": "-1"}])
def test_a_bad_place_is_refused(session, place):
    with pytest.raises(InputError):
        go_to(session, place)


@pytest.mark.parametrize(
    "place", [{"layer": "99", "site": "q"}, {"site": "nowhere"}, {"channel": "99999"}, {"tab": "nowhere"}], ids=str
)
def test_a_place_that_is_not_there_is_named(session, place):
    name, value = next(iter(place.items()))
    with pytest.raises(InputError, match=value) as refused:
        go_to(session, place)
    assert refused.value.code == f"E-PARAM-{name.upper()}"


def test_a_link_holds_nothing_that_a_visitor_wrote(page, session):
    private = QuantRecipe("fake", calibration=Calibration(DIARY, 512))
    session.add_run(Run(RECIPE.hash, RECIPE.label(), RECIPE, name="my secret name"))
    session.add_run(Run(private.hash, private.label(), private))
    ticked = [RECIPE.hash, private.hash, "fake"]
    sent = values_of(page, sampling_seed="my secret", temperature=["secret"], memory_of="secret")
    written = query_of(session, private, page.fields, sent, ticked)
    assert "secret" not in written and "diary" not in written
    assert parse_qs(written)["runs"] == [RECIPE.hash], "a run on a private text opens for nobody else"
    assert "seed" in parse_qs(written) and not {"sampling_seed", "temperature", "memory_of"} & parse_qs(written).keys()


def test_a_link_opens_its_runs_and_names_one_that_is_gone(page, ctx, wait, bench):
    """The fake workbench knows folders alone, as does a server that has not quantised by that recipe."""

    async def opened(**query):
        answer = await page.opened(None, SimpleNamespace(session_hash="a", query_params=query))
        session = ctx.sessions.get(answer[ctx.key])
        while session.handlers:
            answer |= await session.page("a").take(0.5)
        return answer

    told = wait(opened(model="fake", tab="compare", runs=RECIPE.hash, batch="64"))
    assert RECIPE.hash in told[ctx.status] and "not kept here" in told[ctx.status]
    assert told[page.fields["batch"]] == 64 and told[page.start_tab] == "compare"
