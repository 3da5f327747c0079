"""What keeps the parts apart and readable: import directions, documentation, sizes, and words that may not appear."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("app", "core", "kernels", "training", "benchmarks")
BANNED = {
    "kernels": {"core", "app", "transformers", "gradio"},
    "core": {"app", "training", "gradio", "plotly", "triton"},
    "training": {"app", "gradio", "plotly", "triton"},
    "app": {"kernels", "torch", "numpy", "triton", "sklearn", "transformers"},
}
STAGES = (
    {"errors", "checks", "cache", "disk", "folders", "memory", "storage", "privacy", "progress", "provenance"},
    {"bits", "options", "overrides", "recipe"},
    {"report", "distill_report"},
    {"pace"},
    {"quant"},
    {"models"},
    {"hf"},
    {"calibration"},
    {"methods"},
    {"baselines"},
    {"doctor"},
    {"evaluation"},
    {"distill"},
    {"stages"},
    {"stream"},
    {"probe"},
    {"workbench"},
    {"run"},
    {"sweep"},
)
"""Parts of core from bottom to top: a part imports from its own row and the rows before it."""

MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_LAYOUT = 400, 65, 120, 90  # a tab's layout is one declaration


def sources(*packages: str) -> list[Path]:
    """Python files of packages, in order."""
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name(path: Path) -> str:
    """A file's name in messages and test ids."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside functions too, but not for type checking alone."""
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: a relative import hides its direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def stage(module: str) -> int | None:
    """Row of STAGES that a module of core belongs to; None outside core and for `core` itself."""
    parts = module.split(".")
    if parts[0] != "core" or len(parts) < 2:
        return None
    return next((row for row, members in enumerate(STAGES) if parts[1] in members), None)


# import directions


@pytest.mark.parametrize("package", BANNED)
def test_imports_point_down(package):
    found = [f"{name(path)} imports {module}" for path in sources(package) for module in imports(path)
             if module.split(".")[0] in BANNED[package]]
    assert not found


def test_core_imports_from_left_to_right():
    found = []
    for path in sources("core"):
        if path.parent.name == "core" and path.stem == "__init__":
            continue
        own = stage(name(path).removesuffix(".py").replace("/", "."))
        assert own is not None, f"{name(path)} belongs to no stage: add its package to STAGES and to the design"
        found += [f"{name(path)} imports {module}" for module in imports(path)
                  if (used := stage(module)) is not None and used > own]
    assert not found


def file_of(module: str) -> Path | None:
    """The file of this project that a dotted name stands in; None for other packages."""
    while module:
        base = ROOT.joinpath(*module.split("."))
        found = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
        if found:
            return found
        module = module.rpartition(".")[0]
    return None


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count: they may keep an import cheap, not hide a circle."""
    edges = {path: {f for module in imports(path) if (f := file_of(module)) not in (None, path)} for path in sources(*PACKAGES)}
    reached: dict[Path, set[Path]] = {}
    for start in edges:
        seen, pending = set(), [start]
        while pending:
            new = edges.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        reached[start] = seen
    circles = {tuple(sorted(name(q) for q in edges if q in reached[p] and p in reached[q])) for p in edges if p in reached[p]}
    assert not circles


def test_no_function_swallows_arguments():
    """A renamed argument of a library ended in a `**_` once, and every model forgot what it had read."""
    found = []
    for path in sources(*PACKAGES):
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg:
                body = node.body if isinstance(node.body, list) else [node.body]
                used = {n.id for part in body for n in ast.walk(part) if isinstance(n, ast.Name)}
                if node.args.kwarg.arg not in used:
                    found.append(f"{name(path)}:{node.lineno} **{node.args.kwarg.arg} is not read")
    assert not found


def test_kernels_and_tests_are_not_imported_by_the_app():
    found = [name(path) for path in sources(*PACKAGES) for module in imports(path) if module.split(".")[0] == "tests"]
    assert not found


@pytest.mark.parametrize(("statement", "absent"), [
    ("import core", {"torch", "transformers", "gradio", "numpy"}),
    ("import core.recipe, core.errors", {"torch", "transformers", "gradio"}),
    ("import core.evaluation.memory", {"torch", "transformers"}),
    ("import kernels; assert kernels.__version__ == '0.0.0'", {"transformers", "gradio", "core", "app"}),
    ("import app.cli.__main__", {"torch", "transformers", "gradio", "plotly"}),
    ("import app.main", {"torch", "transformers", "gradio"}),
])
def test_importing_is_cheap(statement, absent):
    code = f"import sys; {statement}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_other_package_is_called_kernels():
    """transformers imports any package of that name that it finds and reads its version: ours must be the only one."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    assert "kernels" not in installed
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


# documentation and size


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name)
def test_a_file_is_documented_and_small(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(tree(path)), "the file does not say what it is"
    assert text.count("\n") <= MAX_FILE, "the file has grown beyond what one reads at once: split it"
    found = []
    for node, inner in _definitions(tree(path)):
        length = node.end_lineno - node.lineno + 1
        limit = MAX_FUNCTION
        if any("triton" in ast.dump(d) for d in node.decorator_list):
            limit = MAX_KERNEL
        elif path.is_relative_to(ROOT / "app"):
            limit = MAX_LAYOUT
        if isinstance(node, ast.ClassDef):
            limit = MAX_FILE
        if length > limit:
            found.append(f"{node.name} has {length} lines")
        if inner or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _overrides(node):
            found.append(f"{node.name} has no docstring")
        if not isinstance(node, ast.ClassDef):
            found += _unannotated(node)
    assert not found


VERBS = """
Accept Add Apply Ask Break Build Capture Check Choose Clear Cluster Collect Compare Compute Connect Continue Convert Copy Count
Cut Decide Decode Delete Dequantise Derive Describe Download Draw Drop End Estimate Factorise Fetch Fill Find Fit Follow Format
Handle Hide Hold Ignore Import Keep Label Let Limit List Load Lock Log Look Lower Make Mark Measure Multiply Name Normalise
Observe Open Pack Parse Pickle Plan Predict Prepare Print Project Put Quantise Raise Read Record Refuse Remove Rename Render
Repeat Replace Resolve Restore Return Rotate Round Run Say Score Select Send Serve Set Shorten Show Solve Split Start Stop Store
Swap Switch Time Tokenise Train Turn Undo Unpack Unpickle Wait Wrap Write Yield Zip
"""
"""Verbs that open the docstrings of functions and methods; a new one is added here."""


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name)
def test_docstrings_of_functions_say_what_is_done(path):
    found = []
    for node, inner in _definitions(tree(path)):
        text = ast.get_docstring(node)
        noun = isinstance(node, ast.ClassDef) or any("property" in ast.dump(decorator) for decorator in node.decorator_list)
        if text and not (inner or noun or node.name.startswith("_") or _imperative(text)):
            found.append(f"{node.name}: {text.splitlines()[0]}")
    assert not found, "begin with a verb and its object, such as “Return the …”"


@pytest.mark.parametrize(("text", "good"), [
    ("Return the width.", True), ("Normalise, reorder and quantise rows.", True), ("The width.", False), ("A width.", False),
    ("Whether it fits.", False), ("Width of a site.", False), ("Name of a run.", False), ("Returns the width.", False),
    ("Run", False),
])
def test_verbs_are_told_from_nouns(text, good):
    assert _imperative(text) is good


def _imperative(text: str) -> bool:
    """Say whether a docstring opens with an imperative verb that has an object."""
    words = text.split()
    return len(words) > 1 and words[0].rstrip(",") in VERBS.split() and words[1] not in ("of", "is", "are")


def _definitions(module: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Classes and functions, and whether each is an inner or private matter."""
    pending: list[tuple[ast.AST, bool]] = [(module, False)]
    while pending:
        node, private = pending.pop()
        for child in ast.iter_child_nodes(node):
            hidden = private
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child, private
                hidden = private or child.name.startswith("_") or not isinstance(child, ast.ClassDef)
            pending.append((child, hidden))


def _overrides(node: ast.AST) -> bool:
    """Methods whose meaning another class has written down."""
    return any("override" in ast.dump(decorator) for decorator in getattr(node, "decorator_list", ()))


def _unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    missing = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
    missing += ["its result"] if node.returns is None else []
    return [f"{node.name}: {', '.join(missing)} without annotation"] if missing else []


# what may not appear


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Dotted name and node of every call."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_code_is_run_that_a_model_brings():
    found = []
    for path in sources(*PACKAGES):
        for function, node in calls(path):
            trusted = any(k.arg == "trust_remote_code" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                          for k in node.keywords)
            loads_pickle = function in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "marshal.loads")
            if trusted or loads_pickle or function in ("eval", "exec", "os.system"):
                found.append(f"{name(path)}:{node.lineno} {function}")
        if path.parent.name in ("core", "kernels") or name(path).startswith(("core/", "kernels/")):
            found += [f"{name(path)} imports {m}" for m in imports(path) if m.split(".")[0] in ("pickle", "marshal", "shelve")]
    assert not found


PICKLE_OF_OUR_OWN = {"app/worker/wire.py"}
"""The page talks to the worker it started over a private socket pair; what crosses is checked there."""


def test_pickle_stays_at_the_private_pipe():
    found = [name(path) for path in sources(*PACKAGES) for m in imports(path) if m.split(".")[0] == "pickle"]
    assert set(found) <= PICKLE_OF_OUR_OWN


LEAVES = {"app/cli/__main__.py", "app/__main__.py", "app/main.py", "app/worker/server.py"}
"""Entry points: the only files that may end their process."""


def test_only_entry_points_end_the_process():
    found = []
    for path in sources("app", "core", "kernels"):
        if name(path) in LEAVES:
            continue
        found += [f"{name(path)}:{node.lineno} {function}" for function, node in calls(path)
                  if function in ("sys.exit", "exit", "quit", "os._exit", "os.abort")]
        found += [f"{name(path)}:{node.lineno} raise SystemExit" for node in ast.walk(tree(path))
                  if isinstance(node, ast.Raise) and "SystemExit" in ast.dump(node)]
    assert not found


def test_no_debugging_is_left_behind():
    found = [f"{name(path)}:{node.lineno}" for path in sources(*PACKAGES) for function, node in calls(path)
             if function in ("breakpoint", "pdb.set_trace")]
    assert not found


def test_what_subclasses_define_is_abstract():
    """A missing method is found where the object is made, not where it is called."""
    found = [f"{name(path)}:{node.lineno}" for path in sources(*PACKAGES) for node in ast.walk(tree(path))
             if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node)]
    assert not found


def test_requirements_do_not_hold_the_other_kernels_package():
    for file in ("requirements.txt", "requirements-dev.txt"):
        names = [line.split(">")[0].split("=")[0].split("<")[0].strip() for line in (ROOT / file).read_text().splitlines()]
        assert "kernels" not in names
