"""Commands that only read what is recorded load nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from registry import Registry

HEAVY = {"torch", "torchvision", "tensorboard", "numpy", "pydantic", "safetensors", "yaml", "rich"}

PROGRAM = """
import json, sys
from registry.cli import main
try:
    main()
except SystemExit as done:
    print(json.dumps([done.code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "list",
        "list lenet5 --json",
        "list --sort accuracy",
        "show lenet5",
        "show lenet5:v2 --params",
        "status",
        "alias",
        "alias lenet5 x",
        "tag lenet5 x",
        "note lenet5 x",
        "rm lenet5:v1 --dry-run",
        "rm lenet5:v1 --yes",
        "gc --dry-run",
        "gc",
        "verify",
        "config show lenet5",
        "config diff lenet5:v1 lenet5:v2",
    ],
)
def test_a_command_loads_nothing_heavy(filled: Registry, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()], capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    assert set(modules) & HEAVY == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, registry; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & (HEAVY | {"sqlite3", "click"}) == set()
