"""The README is checked like code: front matter, commands, the map of files, and every path it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from app import main
from app.cli import __main__ as cli
from app.cli.recipe import recipe_of
from app.view import texts
from tests import make_map

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("app", "core", "kernels", "training", "benchmarks", "docs", "tests")
EMOJI_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def front_matter() -> dict:
    """The YAML between the first two rules."""
    return yaml.safe_load(TEXT.split("---\n")[1])


def commands(start: str) -> list[list[str]]:
    """Command lines of all code blocks that begin so, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith(start)]


# front matter


def test_front_matter_is_what_a_space_needs():
    facts = front_matter()
    assert facts["sdk"] == "gradio" and facts["python_version"] == "3.12" and facts["license"] == "apache-2.0"
    assert facts["title"] == texts.TITLE and len(facts["emoji"]) <= 2
    assert {facts["colorFrom"], facts["colorTo"]} <= EMOJI_COLOURS
    assert 0 < len(facts["short_description"]) <= 60
    assert facts["tags"] and all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in facts["tags"])
    assert (ROOT / facts["app_file"]).is_file() and (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_sdk_version_is_within_the_requirements():
    version = tuple(int(part) for part in front_matter()["sdk_version"].split("."))
    line = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("gradio"))
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in re.findall(r"[\d.]+", line))
    assert low <= version < high


# commands


def test_the_two_commands():
    assert commands("pip install -r requirements.txt")[0][-4:] == ["&&", "python", "-m", "app"]
    assert commands("pip install -r requirements-dev.txt")[0][-4:] == ["&&", "pytest", "-n", "2"]
    assert main.arguments(["--host", "127.0.0.1", "--port", "7860", "--model", "m"]).port == 7860
    assert "requirements-dev.txt" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("words", commands("python -m app.cli"), ids=lambda words: words[3])
def test_an_example_is_understood(words, capsys):
    arguments = cli.parse(words[3:])
    if words[3] == "quantize":
        assert recipe_of(arguments).model == arguments.model
    if words[3] in ("memory", "models"):
        assert cli.main(words[3:]) == 0 and capsys.readouterr().out


def test_every_verb_has_an_example():
    assert {words[3] for words in commands("python -m app.cli")} == set(cli.VERBS)


def test_options_that_the_text_names_exist():
    grammar = cli.parser()
    known = {"--host", "--port"} | set(re.findall(r"--[a-z-]+", grammar.format_help()))
    for verb in grammar._subparsers._group_actions[0].choices.values():
        known |= set(verb._option_string_actions)
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= known


# files


def test_the_readme_is_short():
    assert TEXT.count("\n") <= 150


def test_the_map_is_up_to_date():
    assert (ROOT / "docs" / "map.md").read_text(encoding="utf-8") == make_map.text(), "run python -m tests.make_map"


def test_a_first_line_fits_the_map():
    lines = [line for folder in make_map.FOLDERS for line in make_map.lines(ROOT / folder)]
    assert not [line for line in lines if len(line) > make_map.WIDTH], "shorten the first line of the file's docstring"


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page):
    """A path begins with one of the repository's folders; a file may also be named without its folder."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:app|core|kernels|training|benchmarks|configs|docs|tests|\.ci)/[^`\s<>*{}]*)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]
    names = {path.name for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]}
    assert not [file for file in re.findall(r"`(\w+\.(?:py|md|js|css))`", text) if file not in names]


def test_tabs_are_named_as_in_the_page():
    for label in (texts.EXPLORE, texts.REORDER, texts.QUANTIZE_TAB, texts.COMPARE):
        assert f"**{label.split('·')[1].strip()}**" in TEXT


NAMED_ELSEWHERE = {
    "app/worker/server": ("app/worker/client", "import wire"),  # another process: both speak this module's messages
    "core/workbench": ("app/settings", "core.workbench"),
    "core/methods/rptq/method": ("core/methods/rptq/plus", "core.methods.rptq.method"),  # the table of methods
    "core/methods/apply": ("core/methods/rptq/method", "core.methods.apply"),  # plan, then apply: both are called from one place
}
"""Files that the one above them does not import by name: where they are named instead, and how."""


def test_the_way_of_a_value_is_short_and_each_hop_is_a_call():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    way = re.findall(r"^\| \d+ \| `([a-z0-9_/]+)\.py` \|", text, flags=re.MULTILINE)
    assert 10 <= len(way) <= 14 and all((ROOT / f"{place}.py").is_file() for place in way)
    for above, below in zip(way, way[1:], strict=False):
        package, _, module = below.replace("/", ".").rpartition(".")
        place, words = NAMED_ELSEWHERE.get(below, (above, f"{package}.{module}"))
        source = (ROOT / f"{place}.py").read_text(encoding="utf-8")
        found = (words, f"from {package} import {module}", f"from {package} import (")
        assert any(form in source for form in found), (above, below)
