"""Commands that need the metadata alone load nothing heavy."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import commands, examples, words_of

from registry import Registry
from registry.cli.app import COMMANDS

HEAVY = {"torch", "torchvision", "tensorboard", "numpy", "pydantic", "safetensors", "yaml", "rich"}

PROGRAM = """
import json, sys
from registry.cli import main
try:
    main()
except SystemExit as done:
    print(json.dumps([done.code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""

KEY = "3f2a91c04b7e"
"""The key of an artifact in the examples."""

INSTEAD = {
    "/data/models": "models",
    ".yaml": ".json",
    "--class mypackage.configs:TrainConfig": "",
    "files lenet5:v3 model.onnx --output model.onnx": "files lenet5:v3 --json",
}
"""Parts of examples, and what is typed instead: a folder of this test's, a format and a check that need no package."""

BESIDE = (
    "registry --help",
    "registry ls lenet5 --json",
    "registry show lenet5:v2",
    "registry alias",
    "registry rm lenet5:v1 --yes",
    "registry gc",
    "registry config show lenet5",
)
"""Command lines whose ways differ from those of the examples."""


def lines() -> Iterator[str]:
    """The examples of every light command, and of every command in a light group."""
    for path, command in commands():
        name = path.split()[1:2]
        if name and COMMANDS[name[0]].is_light:
            for example in examples(command):
                for part, other in INSTEAD.items():
                    example = example.replace(part, other)
                yield example


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry and files in which the examples work."""
    folder = tmp_path_factory.mktemp("golden")
    registry = Registry(folder / ".registry")
    for epoch in (1, 5, 10):
        with registry.run("lenet5", config={"optimizer": {"lr": 0.1 * epoch}}, monitor="accuracy") as run:
            measured = {"accuracy": epoch / 20, "val/loss": 1 / epoch}
            run.save(model=torch.nn.Linear(1, epoch), epoch=epoch, loss=1 / epoch, metrics=measured)
        for model in ("lenet6", "lenet6-scratch", "lenet6-finetuned"):
            tree = {"model": {"w": torch.full((1,), float(epoch)), "frozen": torch.zeros(2)}}
            made = {"frozen": {"model": ["frozen"]}}
            registry.save(model, tree, epoch=epoch, metrics={"accuracy": epoch / 30}, provenance=made)
    registry.set_alias("lenet5:v3", "production")
    registry.set_tag("lenet5:v3", "paper")
    registry.cached(lambda size: [size])(3)
    registry.catalog.close()
    (folder / "torch-registry").mkdir()
    (folder / "torch-registry" / "remotes.toml").write_text('[remotes]\nteam = "s3://models/team"\n')
    (folder / "configs").mkdir()
    for name in ("configs/a.json", "configs/b.json", "configs/lenet5.json", "train.json"):
        (folder / name).write_text('{"optimizer": {"lr": 0.1}}')
    return folder


@pytest.mark.parametrize("line", sorted({*lines(), *BESIDE}))
def test_a_light_command_loads_nothing_heavy(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "here"))
    shutil.copytree(golden, tmp_path / "here")
    if KEY in line:
        (artifact,) = Registry(tmp_path / "here" / ".registry").artifacts.find()
        line = line.replace(KEY, artifact.key)
    words = [sys.executable, "-c", PROGRAM, *words_of(line)[1:]]
    done = subprocess.run(words, cwd=tmp_path / "here", capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    assert set(modules) & HEAVY == set()


@pytest.mark.parametrize("line", ["--help", "ls", "ls lenet5", "show lenet5", "status"])
def test_the_commands_that_are_typed_most_load_no_drawing_no_upkeep_and_no_openssl(
    golden: Path, line: str
) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "registry.cli", *line.split()]
    done = subprocess.run(words, cwd=golden, capture_output=True, text=True, check=True)
    loaded = {text.rpartition("|")[2].strip() for text in done.stderr.splitlines()}
    needless = {
        "_hashlib",
        "registry.reports.blocks",
        "registry.upkeep.garbage",
        "registry.upkeep.verification",
    }
    assert "click" in loaded
    assert loaded & needless == set()
    if line == "--help":
        assert not {name for name in loaded if name.startswith("registry.catalog")}


@pytest.mark.parametrize(("loads", "rests"), [("json", "True"), ("torch", "False")])
def test_the_collector_works_while_a_command_runs_and_rests_as_a_light_one_ends(
    loads: str, rests: str
) -> None:
    program = (
        f"import gc, {loads}, registry.cli.app as module, registry.cli as cli\n"
        "module.app = lambda: print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "cli.main()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True", rests]
    assert done.stderr == ""


def test_ctrl_c_while_a_command_loads_is_one_line() -> None:
    program = (
        "import sys, registry.cli as cli\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing is half done\n")


@pytest.mark.parametrize(
    ("app", "ended"),
    [
        ("raise KeyboardInterrupt", (130, "", "interrupted; nothing is half done\n")),
        ("atexit.register(os.kill, os.getpid(), signal.SIGINT)", (-signal.SIGINT, "", "")),
    ],
)
def test_ctrl_c_before_and_behind_a_command_is_no_traceback(app: str, ended: tuple[int, str, str]) -> None:
    program = (
        "import atexit, os, signal, registry.cli.app as module, registry.cli as cli\n"
        f"def app(): {app}\n"
        "module.app = app\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == ended


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, registry; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & (HEAVY | {"sqlite3", "click"}) == set()
