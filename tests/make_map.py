"""Write docs/map.md: every product file with the first line of its docstring. `python -m tests.make_map` after moving a file."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("app", "core", "kernels", "training", "benchmarks")
SUFFIXES = (".py", ".js", ".css")
WIDTH = 130
"""Longest line of the tree: a test holds the first lines of docstrings to it."""

HEAD = """# Where everything is

`app → training → core → kernels → torch`, never back; `app/cli` alone imports `training`. `tests/test_architecture.py` checks it.
`tests/` mirrors this tree. This page is written by `python -m tests.make_map`; its lines are the files' own first lines.

```text
"""


def first_line(path: Path) -> str:
    """Read what a file says of itself: the first line of its docstring, or of the comment it opens with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text.partition("\n")[0].strip("/* ").rstrip(".")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].rstrip(".")


def lines(folder: Path, depth: int = 0) -> list[str]:
    """List a folder: its own line, its files, its sub-folders."""
    own = folder / "__init__.py"
    found = [_line(folder.name + "/", first_line(own) if own.exists() else "", depth)]
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.is_dir() and any(p.suffix == ".py" for p in path.iterdir()):
            found += lines(path, depth + 1)
        elif path.suffix in SUFFIXES and path.name != "__init__.py":
            found.append(_line(path.name, first_line(path), depth + 1))
    return found


def _line(name: str, what: str, depth: int) -> str:
    return f"{'  ' * depth}{name:<{26 - 2 * depth}} {what}".rstrip()


def text() -> str:
    """Make the whole page; what stands below the tree is kept."""
    page = ROOT / "docs" / "map.md"
    kept = page.read_text(encoding="utf-8").partition("\n```\n")[2]
    return HEAD + "\n".join(line for folder in FOLDERS for line in lines(ROOT / folder)) + "\n```\n" + kept


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(text(), encoding="utf-8")
