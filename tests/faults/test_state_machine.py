"""Whatever people do to a registry, in whatever order, and whoever is killed: it holds what the model of it holds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import soak
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import Machine, SharedMachine

from registry.remote import shared_log

STEMS = {"test_state_machine": Machine, "test_shared_machine": SharedMachine}
"""Names for the seeds that fail, and what runs."""
BATCHES = 3
"""Batches of machines with a seed of their own that a run of the suite takes."""
MACHINES = 6
"""Machines in a batch."""
STEPS = 25
"""Operations of a machine at most."""


def run_machines(kind: type[Machine], number: int) -> None:
    """Run a batch of machines that follows from a seed."""
    chosen = settings(
        max_examples=MACHINES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(kind), settings=chosen)


def batches(stem: str) -> Iterator[int]:
    """The seeds that failed once, then fresh ones: a few in the suite, under `make soak` until the time is up."""
    if "SOAK_SECONDS" in os.environ or "SOAK_SEED" in os.environ:
        yield from soak.seeds(stem, 60)
        return
    yield from soak.kept(stem)
    yield from (random.SystemRandom().randrange(1 << 40) for _ in range(BATCHES))


@pytest.mark.slow
@pytest.mark.damages  # folders of hosts cannot be opened without the bucket
@pytest.mark.parametrize("stem", [*STEMS])
def test_a_registry_holds_what_its_model_holds(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if STEMS[stem] is SharedMachine and "SOAK_SECONDS" not in os.environ and "SOAK_SEED" not in os.environ:
        pytest.skip("takes minutes; make soak runs it")
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    # A host of a shared registry is known by it.
    monkeypatch.setenv("XDG_DATA_HOME", "")
    for number in batches(stem):
        before = Machine.machines, Machine.steps, Machine.kills, Machine.interrupted
        with soak.replayable(stem, number):
            run_machines(STEMS[stem], number)
        after = Machine.machines, Machine.steps, Machine.kills, Machine.interrupted
        machines, steps, kills, interrupted = (b - a for a, b in zip(before, after, strict=True))
        soak.count(stem, machines=machines, steps=steps, kills=kills, interrupted=interrupted)
