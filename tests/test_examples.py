"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_resnet18(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "resnet18.py"), "--samples", "16", "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "REGISTRY_ROOT": str(tmp_path / "r")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loaded 120 of 122 tensors, 99.97% of parameters from resnet18-source:v1") == 2
    assert "none of 120 frozen tensors has moved" in done.stdout
    assert done.stdout.splitlines()[-2].split() == [
        *("EPOCH", "resnet18-scratch", "resnet18-finetuned", "resnet18-frozen")
    ]
