"""Rules of the code: who may change files, and what nobody may call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path for folder in ("registry", "store", "models", "cli") for path in ROOT.glob(f"{folder}/**/*.py")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


CHANGES_FILES = {
    *("os.write", "os.pwrite", "os.rename", "os.replace", "os.link", "os.symlink", "os.unlink", "os.remove"),
    *("os.mkdir", "os.makedirs", "os.rmdir", "os.truncate", "os.ftruncate", "os.fsync", "os.fdatasync"),
    *("shutil.move", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.rmtree"),
    *(".write_text", ".write_bytes", ".touch", ".symlink_to", ".hardlink_to", ".rename"),
}
RUNS_CODE = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("np.load", "numpy.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *(
        "os.system",
        "os.popen",
        "subprocess.run",
        "subprocess.Popen",
        ".extractall",
        "torch.load",
        "torch.save",
    ),
}
LOCKS = {"fcntl.flock", "fcntl.lockf"}
ALLOWED = {
    "store/durable.py": CHANGES_FILES | LOCKS,
    "registry/files/torch_files.py": {"torch.load", "torch.save"},
    # In memory, as the planners of torch.distributed.checkpoint hand values over.
    "registry/checkpoints/sharded_reader.py": {"torch.save"},
    "registry/checkpoints/sharded_writer.py": {"torch.load"},
    "registry/catalog/database.py": {"sqlite3.connect"},
    "registry/catalog/invariants.py": {"sqlite3.connect"},  # in memory
    "registry/catalog/old_format.py": {"sqlite3.connect"},
    "registry/checkpoints/measured.py": {"sqlite3.connect"},  # in the user's cache
    "registry/catalog/refolding.py": {".rename"},  # `durable.disk.rename` is a durable step
    "registry/integrations/trainer_folders.py": {".write_text"},  # in a folder that was just checked out
    # The user's own script, in a temporary folder.
    "registry/resuming/checking.py": {"subprocess.run", "open"},
    "registry/resuming/scratch.py": {"shutil.copytree"},
    "registry/remote/forked.py": {"subprocess.Popen"},  # this package, in a fresh interpreter
    "registry/ui/asking.py": {"subprocess.Popen"},  # this package, in a fresh interpreter
    "registry/resuming/traced.py": {"open"},
    "cli/sharing.py": {"subprocess.run"},  # the user's own command, without a shell
    "registry/runs/provenance.py": {"subprocess.run"},  # git, without a shell
    "cli/runs.py": {"os.symlink"},  # in a temporary folder, for TensorBoard
}


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every call: `module.function`, `function`, or `.method`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                if isinstance(function.value, ast.Name):
                    yield node.lineno, f"{function.value.id}.{function.attr}"
                yield node.lineno, f".{function.attr}"
            elif isinstance(function, ast.Name):
                yield node.lineno, function.id


def opens_to_write(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("open", "fdopen"):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                mode = argument.value if isinstance(argument, ast.Constant) else ""
                if isinstance(mode, str) and set(mode) <= set("rwabx+t") and set(mode) & set("wax+"):
                    yield node.lineno


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_their_own_modules_change_files_run_pickle_or_open_the_catalog(path: Path) -> None:
    name = name_of(path)
    allowed = ALLOWED.get(name, set())
    found = {(line, call) for line, call in calls(path) if call in CHANGES_FILES | RUNS_CODE | LOCKS}
    found |= {(line, call) for line, call in calls(path) if call == "sqlite3.connect"}
    wrong = {(line, call) for line, call in found if call not in allowed}
    assert wrong == set()
    assert "open" in allowed or list(opens_to_write(path)) == []


def test_torch_files_are_loaded_with_weights_only() -> None:
    tree = ast.parse((ROOT / "registry" / "files" / "torch_files.py").read_text())
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert loads
    for load in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
        assert given.get("weights_only") == "True"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_layers_point_one_way(path: Path) -> None:
    """cli -> models -> registry -> store."""
    below = {"store": (), "registry": ("store",), "models": ("store",), "cli": ("store", "models")}
    forbidden = {"store", "models", "cli"} - {layer_of(path)} - set(below[layer_of(path)])
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] != "registry":
                continue
            assert len(parts) < 2 or parts[1] not in forbidden, f"{path}:{node.lineno} imports {name}"
            if layer_of(path) == "store":
                assert parts[1:2] == ["store"], f"{path}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_registry_asks_the_catalog(path: Path) -> None:
    asked = [(line, call) for line, call in calls(path) if call in (".query", ".execute", ".executemany")]
    assert layer_of(path) == "registry" or asked == []


def test_the_walk_sees_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import os\nos.rename(a, b)\nopen(p, 'wb')\np.open(mode='a')\nq.write_text('x')\nopen('w.txt')\n"
    )
    assert {call for _, call in calls(path)} >= {"os.rename", ".write_text"}
    assert list(opens_to_write(path)) == [3, 4]
