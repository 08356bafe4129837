"""Measuring side by side: the contenders take turns in one run, and what counts is the ratio."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy

T = TypeVar("T")
Contender = tuple[Callable[[], object], Callable[[], object]]
"""What prepares a round (not timed), and what is timed."""

Times = dict[str, list[float]]
"""Seconds of each contender, round by round."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a measurement may take.

    Attributes:
        rounds: how often each contender takes its turn, after one to warm up.
        quick: use small states and few points, for a look within minutes.
    """

    rounds: int = 7
    quick: bool = False

    def twice(self) -> Scale:
        """With twice the rounds, for what is short and noisy."""
        return Scale(2 * self.rounds, self.quick)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report: a median beside the goal that it must not exceed, and where the middle half lies."""

    what: str
    value: float
    goal: float | None
    detail: str
    unit: str = "x"
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        return self.goal is None or self.value <= self.goal


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds as work grows: of one operation, against a number of `unit`.

    Attributes:
        fixed, each: the line through the points: seconds that no work takes, and seconds for each one more.
        power: the exponent between the last two points; 1 is proportional, 0 is constant.
    """

    what: str
    unit: str
    points: Sequence[tuple[float, float]]

    @property
    def fixed(self) -> float:
        return max(0.0, self._line()[1])

    @property
    def each(self) -> float:
        return max(0.0, self._line()[0])

    @property
    def power(self) -> float:
        (n, t), (more, longer) = self.points[-2:]
        return math.log(longer / t) / math.log(more / n)

    def _line(self) -> tuple[float, float]:
        sizes, seconds = zip(*self.points, strict=True)
        slope, start = numpy.polyfit(sizes, seconds, 1, w=1 / numpy.array(seconds))
        return float(slope), float(start)


@dataclass(frozen=True, slots=True)
class Table:
    """A comparison that is not a list of ratios."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Section:
    """What one group of measurements found."""

    results: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> Times:
    """Seconds of each contender, measured in turns after one round to warm up; each round another one begins."""
    times: Times = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name in rotated([*contenders], i):
            prepare, run = contenders[name]
            prepare()
            start = time.perf_counter()
            kept = run()
            elapsed = time.perf_counter() - start
            del kept
            if i:
                times[name].append(elapsed)
    return times


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The same items from another one on: what one leaves behind (memory, a busy disk) does not always meet the same."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def ratio(
    what: str, times: Mapping[str, Sequence[float]], ours: str, peer: str, goal: float | None, name: str = ""
) -> Result:
    """The median of the ratios of each round: what slows a machine for a while slows both."""
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    low, high = middle_half(ratios)
    mine, other = statistics.median(times[ours]), statistics.median(times[peer])
    detail = f"{spoken(mine)} against {spoken(other)} of {name or peer}"
    return Result(what, statistics.median(ratios), goal, detail, low=low, high=high)


def absolute(what: str, seconds: Sequence[float], goal: float | None, detail: str = "") -> Result:
    """The median of seconds."""
    low, high = middle_half(seconds)
    median = statistics.median(seconds)
    return Result(what, median, goal, detail or spoken(median), "s", low, high)


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def spoken(seconds: float) -> str:
    """`12 ms`, `1.3 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"
    return f"{seconds:.1f} s"
