"""Seeds decide what several programs do, in which order, and when the machine stops; nothing acknowledged is lost.

`python tests/faults/simulator.py SEED` replays a seed. It runs in a process of its own, as the order of a set of
strings is part of what a seed decides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak

STEM = "test_simulator"


def simulator(*arguments: object, budget: float | None = None) -> list[dict[str, Any]]:
    """The outcomes that the simulator prints, one for each seed."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("simulator.py")), *map(str, arguments)]
    if budget is not None:
        environment["SOAK_SECONDS"] = str(soak.seconds(budget))
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stdout[-4_000:] + child.stderr[-8_000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize("part", [0, 1])
def test_nothing_acknowledged_is_lost_whatever_the_order_and_whenever_the_machine_stops(part: int) -> None:
    check(simulator("--soak", STEM, budget=15.0))


@pytest.mark.parametrize("hosts", [2, 3])
def test_nothing_acknowledged_is_lost_by_hosts_that_share_a_registry(hosts: int) -> None:
    check(simulator("--soak", f"test_shared_simulator_{hosts}", "--hosts", hosts, budget=10.0))


def check(found: list[dict[str, Any]]) -> None:
    assert sum(outcome["operations"] for outcome in found) > 0
    assert sum(outcome["crashes"] for outcome in found) > 0


@pytest.mark.parametrize("hosts", [0, 2])
def test_a_seed_says_everything(hosts: int) -> None:
    first, second = (simulator(11, "--operations", 120, "--hosts", hosts) for _ in range(2))
    assert first == second
    assert len(first[0]["trace"]) > (10 if hosts else 50)
