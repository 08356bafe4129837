"""Measuring side by side: the peers take turns in one run, and what counts is the ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Contender = tuple[Callable[[], object], Callable[[], object]]
"""What prepares a round (not timed), and what is timed."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report: the measured value beside the goal that it must not exceed."""

    what: str
    value: float
    goal: float | None
    detail: str
    unit: str = "x"

    @property
    def holds(self) -> bool:
        return self.goal is None or self.value <= self.goal


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, float]:
    """The best seconds of each contender, measured in turns after one round to warm up.

    The best, as other users of a machine and its disk can only add to a time, and add much.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, (prepare, run) in contenders.items():
            prepare()
            start = time.perf_counter()
            kept = run()
            elapsed = time.perf_counter() - start
            del kept
            if i:
                times[name].append(elapsed)
    return {name: min(values) for name, values in times.items()}
