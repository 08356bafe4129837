"""The layout: which folder may import which, and that no imports go in a circle.

Every import counts: at the top, inside a function, or for types only. `from registry.x import y` points at the module y if
there is one, else at x. Names of modules in strings count where a table loads them: `_HOMES` of the package, the formats
of files, and the commands of the command line.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from registry import Registry

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES: list[str] = SETTINGS["packages"]


class Arrow(NamedTuple):
    """One import.

    Attributes:
        source: the module that imports.
        target: the module that is imported.
        line: where.
        where: `top`, `function` or `types`.
    """

    source: str
    target: str
    line: int
    where: str

    def __str__(self) -> str:
        return f"{path_of(self.source)}:{self.line} imports {self.target}"


def folder_of(package: str) -> Path:
    """The folder of a package, as `package-dir` places it."""
    parts = package.split(".")
    for count in range(len(parts), 0, -1):
        place = SETTINGS["package-dir"].get(".".join(parts[:count]))
        if place is not None:
            return ROOT.joinpath(place, *parts[count:])
    raise ValueError(package)


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package's is that of its folder."""
    found = {}
    for package in PACKAGES:
        for path in sorted(folder_of(package).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def path_of(module: str) -> str:
    """The path of a module from the root of the checkout."""
    return str(MODULES[module].relative_to(ROOT))


def room_of(module: str) -> str:
    """The package that a module lies in; a package's own module lies in itself."""
    return module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]


def arrows() -> list[Arrow]:
    """All imports between modules of the project."""
    return [arrow for module in MODULES for arrow in _arrows_of(module)]


def _arrows_of(module: str) -> Iterator[Arrow]:
    tree = ast.parse(MODULES[module].read_text())
    for node, where in placed(tree):
        for target in _targets(node):
            if target != module:
                yield Arrow(module, target, node.lineno, where)
    for target, line in _in_tables(module, tree):
        yield Arrow(module, target, line, "function")


def placed(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import of a module, and where it stands."""

    def walk(node: ast.AST, where: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, where
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, "function")
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from walk(child, "types")
            else:
                yield from walk(child, where)

    yield from walk(tree, "top")


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
        return
    home = node.module or ""
    for alias in node.names:
        inner = f"{home}.{alias.name}"
        if inner in MODULES:
            yield inner
        elif home in MODULES:
            yield home


def _in_tables(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules that tables of text name."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        texts = [(n.value, n.lineno) for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
        if name in ("_HOMES", "FORMATS"):
            yield from ((text, line) for text, line in texts if text in MODULES)
        elif name == "_ROWS":
            yield from ((f"registry.cli.{text}", n) for text, n in texts if f"registry.cli.{text}" in MODULES)


def circles(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of names that can all be reached from one another, the largest first."""
    after: dict[str, set[str]] = {}
    for source, target in pairs:
        if source != target:
            after.setdefault(source, set()).add(target)
    reach = {name: _reached(name, after) for name in after}
    found = {
        frozenset(other for other in reach if other in reach[name] and name in reach[other])
        for name in reach
        if name in reach[name]
    }
    return sorted((sorted(group) for group in found), key=len, reverse=True)


def _reached(start: str, after: Mapping[str, Collection[str]]) -> set[str]:
    found: set[str] = set()
    left = list(after.get(start, ()))
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += after.get(name, ())
    return found


def folder_circles(found: Iterable[Arrow], room: Callable[[str], str] = room_of) -> list[list[str]]:
    """The circles of packages."""
    return circles((room(arrow.source), room(arrow.target)) for arrow in found)


LAYERS = (
    ("registry.store",),
    (
        "registry.configs",
        "registry.log",
        "registry.reports",
        "registry.progress",
        "registry.patterns",
        "registry.release",
    ),
    ("registry.catalog", "registry.remote"),
    ("registry.home",),
    ("registry.live", "registry.upkeep"),
    ("registry.checkpoints", "registry.cache"),
    ("registry.files",),
    ("registry.transfer",),
    ("registry.runs", "registry.resuming"),
    ("registry.registry",),
    ("registry",),
    ("registry.models", "registry.integrations", "registry.ui"),
    ("registry.cli",),
)
"""The lowest first. What lies in one imports from those below it, and nothing beside it."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to: its package, or itself where it lies in none of the folders."""
    return module if module in LEVEL else room_of(module)


def test_every_module_has_a_layer() -> None:
    assert {module for module in MODULES if layer_of(module) not in LEVEL} == set()


def test_every_folder_is_a_package_that_is_installed() -> None:
    folders = {
        path.parent
        for place in ("registry", "models", "cli", "store")
        for path in (ROOT / place).rglob("*.py")
    }
    assert {folder_of(package) for package in PACKAGES} == folders
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_arrow_leads_up_or_sideways() -> None:
    odd = [
        str(arrow)
        for arrow in arrows()
        if layer_of(arrow.source) != layer_of(arrow.target)
        and LEVEL[layer_of(arrow.source)] <= LEVEL[layer_of(arrow.target)]
    ]
    assert odd == []


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles((arrow.source, arrow.target) for arrow in arrows()) == []


def test_no_folders_import_one_another_in_a_circle() -> None:
    assert folder_circles(arrows(), layer_of) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for(package: str) -> None:
    first = (folder_of(package) / "__init__.py").read_text().lstrip()
    assert first.startswith('"""')
    assert len(first.split('"""')[1].split()) > 3


HEAVY = {
    "obstore",
    "psycopg",
    "torch",
    "torchvision",
    "tensorboard",
    "numpy",
    "pydantic",
    "safetensors",
    "yaml",
    "rich",
    "werkzeug",
    "jinja2",
}
"""Packages that a command which needs the metadata alone does not load."""

REASON = re.compile(r" *# Lazy: (?:loads (?P<package>[\w.]*\w)|start-up)\.")


def loaded_by(node: ast.Import | ast.ImportFrom) -> set[str]:
    """What an import names: modules of the project, with the packages that they lie in, and packages of others."""
    names = list(_targets(node))
    if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
    elif node.module:
        names.append(node.module)
    found = set()
    for name in names:
        parts = name.split(".")
        prefixes = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        found |= prefixes & MODULES.keys() or prefixes
    return found


@functools.cache
def loaded_with() -> dict[str, set[str]]:
    """For each module all that is loaded with it, itself among it: by imports at the top, of it and of what these load."""
    after = {}
    for module, path in MODULES.items():
        tops = (node for node, where in placed(ast.parse(path.read_text())) if where == "top")
        parents = {module.rpartition(".")[0]} & MODULES.keys()
        after[module] = parents.union(*map(loaded_by, tops)) - {module}
    return {module: _reached(module, after) | {module} for module in MODULES}


def lazy_imports(module: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, re.Match[str] | None]]:
    """The imports inside functions of a module, each with the comment directly above its group."""
    text = MODULES[module].read_text()
    tree, lines = ast.parse(text), text.splitlines()
    inside = [node for node, where in placed(tree) if where == "function"]
    covered = {line for node in inside for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for node in inside:
        first = node.lineno
        while first - 1 in covered or (not lines[first - 2] and first - 2 in covered):
            first -= 1
        yield node, REASON.fullmatch(lines[first - 2])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The modules of the project that `registry ls`, `show` and `status` load."""
    program = (
        "import sys\nfrom registry.cli import main\n"
        "try: main()\nexcept SystemExit as done: assert not done.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    root = tmp_path_factory.mktemp("quick") / "r"
    Registry(root).save("net", {"model": {}})
    found = set()
    for command in (["list"], ["show", "net"], ["status"]):
        words = [sys.executable, "-c", program, *command, "--root", str(root)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found |= set(done.stderr.split()) & MODULES.keys()
    return found


@pytest.mark.parametrize("module", MODULES)
def test_an_import_inside_a_function_says_why(module: str, quick: set[str]) -> None:
    """`# Lazy: loads NAME.` is true: what is imported loads the package, and the module does not load it by itself.

    `# Lazy: start-up.` stands in the command line, and in what the commands that are typed most load.
    """
    loads = loaded_with()
    wrong = []
    for node, reason in lazy_imports(module):
        names = loaded_by(node)
        problem = ""
        if reason is None:
            if names & (MODULES.keys() | HEAVY):
                problem = "has no reason above it"
        elif package := reason["package"]:
            if package in loads[module]:
                problem = f"could stand at the top, as the module loads {package} anyway"
            elif package not in names.union(*(loads[name] for name in names & MODULES.keys())):
                problem = f"does not load {package}"
        elif room_of(module) != "registry.cli" and module not in quick:
            problem = "is in a module that `registry ls`, `show` and `status` do not load"
        if problem:
            wrong.append(f"{path_of(module)}:{node.lineno}: {ast.unparse(node)} {problem}")
    assert wrong == []


LONGEST = {ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
"""Lines of a class or function, without docstrings."""
DEEPEST = 4
"""Levels of statements that hold others, in a function."""

_HOLDERS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def lines_of(node: ast.AST) -> int:
    """The lines of a definition without those of docstrings in it."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    texts = [
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr)
        and isinstance(inner.value, ast.Constant)
        and isinstance(inner.value.value, str)
    ]
    spent = sum((text.end_lineno or text.lineno) - text.lineno + 1 for text in texts)
    return (node.end_lineno or node.lineno) - node.lineno + 1 - spent


def depth_of(node: ast.AST, depth: int = 0) -> int:
    """How many statements lie in one another; `elif` is no level of its own."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inner = depth + (isinstance(child, _HOLDERS) and not is_elif)
        deepest = max(deepest, depth_of(child, inner))
    return deepest


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_long_or_deep_without_a_reason(module: str) -> None:
    """Whatever is longer or deeper says in its docstring that it is long, and why."""
    wrong = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, tuple(LONGEST)):
            continue
        lines, depth = lines_of(node), depth_of(node) if not isinstance(node, ast.ClassDef) else 0
        is_long = lines > LONGEST[type(node)] or depth > DEEPEST
        if is_long and "long" not in (ast.get_docstring(node) or ""):
            wrong.append(f"{path_of(module)}:{node.lineno} {node.name}: {lines} lines, {depth} levels")
    assert wrong == []
