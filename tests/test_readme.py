"""The README is checked like code: front matter, commands, file tree, and every path it names."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from app import cli, main, texts
from app.cli_recipe import recipe_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
PRODUCT = ("app", "core", "kernels", "benchmarks", "docs")
LISTED = {".py", ".js", ".css", ".md"}
EMOJI_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def front_matter() -> dict:
    """The YAML between the first two rules."""
    return yaml.safe_load(TEXT.split("---\n")[1])


def commands(start: str) -> list[list[str]]:
    """Command lines of all code blocks that begin so, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith(start)]


def listed() -> list[str]:
    """Paths of the file tree; folders end in a slash."""
    paths, folders = [], []
    for line in BLOCKS["text"].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry, _, what = line.strip().partition(" ")
        assert what.strip(), f"{entry} has no line that says what it is"
        folders = folders[:depth]
        assert len(folders) == depth, f"{entry} is indented below nothing"
        paths.append("".join(folders) + entry)
        folders.append(entry)
    return paths


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
    assert commands("pip install -r requirements-dev.txt")[0][-2:] == ["&&", "pytest"]
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


def test_every_listed_file_is_there():
    assert not [path for path in listed() if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]


def test_every_product_file_is_listed():
    there = []
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*")):
            empty = path.name == "__init__.py"  # says what its folder's line says
            if path.suffix in LISTED and not empty and "__pycache__" not in path.parts and "embedded" not in path.parts:
                there.append(path)
    missing = [path for path in there if path.relative_to(ROOT).as_posix() not in listed()]
    assert not missing, "\n" + "\n".join(f"{path.relative_to(ROOT)}: {_first_line(path)}" for path in missing)


def _first_line(path: Path) -> str:
    if path.suffix != ".py":
        return path.read_text(encoding="utf-8").partition("\n")[0]
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/rptq.md", "docs/bitnet.md", "docs/log.md"])
def test_paths_in_backticks_exist(page):
    """A path is anything in backticks that begins with one of the repository's folders."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:app|core|kernels|benchmarks|docs|tests|\.ci)/[^`\s<>*{}]*)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_tabs_are_named_as_in_the_page():
    for label in (texts.EXPLORE, texts.REORDER, texts.QUANTIZE_TAB, texts.COMPARE):
        assert f"**{label.split('·')[1].strip()}**" in TEXT
