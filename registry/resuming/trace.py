"""Traces: what a process did, step by step, and what differs between two of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

KINDS = {
    "parameter": "parameters",
    "optimizer": "optimizer state",
    "schedule": "learning rates",
    "other": "other networks",
    "batch": "batches",
    "random": "random numbers",
    "buffer": "buffers",
    "gradient": "gradients",
}
"""What an observation has, and how it is called. What comes earlier explains what comes later."""


@dataclass(frozen=True)
class Batch:
    """What a network was called with.

    Attributes:
        digest: of all of it.
        rows: the digest of each sample of its first tensor.
    """

    digest: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Observation:
    """A training just before an optimizer step, or at its end.

    Attributes:
        seen: digests by kind and name, such as `parameter/Net/fc.weight`.
        batches: what went into networks since the step before.
        has_loader: whether a `DataLoader` was made so far.
    """

    seen: Mapping[str, str]
    batches: tuple[Batch, ...] = ()
    has_loader: bool = False

    def differences(self, other: Observation, *, is_first: bool = False) -> dict[str, list[str]]:
        """What differs in another observation: names by kind, in the order of `KINDS`.

        Args:
            is_first: the other one is the first after a resume, which may be inside a window of accumulated gradients.
        """
        names = [name for name in {**self.seen, **other.seen} if self.seen.get(name) != other.seen.get(name)]
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for name in names:
            kind, _, rest = name.partition("/")
            # A network that is alive in one process alone may be waiting to be collected, and a generator that the
            # training in one go has not used does not matter.
            if (kind != "other" or name in other.seen) and (
                kind not in ("other", "random") or name in self.seen
            ):
                found[kind].append(rest)
        if not (is_first and other.batches and self.batches[-len(other.batches) :] == other.batches):
            found["batch"] = list(_different_batches(self.batches, other.batches))
        return {kind: different for kind, different in found.items() if different}


@dataclass(frozen=True)
class Trace:
    """What a process did.

    Attributes:
        steps: an observation before each optimizer step.
        end: how it ended; None if it was killed.
    """

    steps: Sequence[Observation] = field(default_factory=list)
    end: Observation | None = None

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a trace; a line that the process did not complete is left out, and a missing file is an empty trace."""
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        documents = [json.loads(line) for line in lines]
        seen = [
            Observation(
                seen=one["seen"],
                batches=tuple(Batch(batch["digest"], tuple(batch["rows"])) for batch in one["batches"]),
                has_loader=one["loader"],
            )
            for one in documents
        ]
        if documents and documents[-1]["end"]:
            return cls(seen[:-1], seen[-1])
        return cls(seen)

    def without(self, names: Collection[str]) -> Trace:
        """The trace with some names left out."""

        def left(one: Observation) -> Observation:
            return replace(one, seen={name: value for name, value in one.seen.items() if name not in names})

        return Trace(list(map(left, self.steps)), left(self.end) if self.end else None) if names else self

    def resumed_at(self, first: Observation, limit: int) -> int | None:
        """After how many steps of this trace another process went on.

        Args:
            first: the first observation of that process.
            limit: it went on after at most so many steps.

        Returns:
            0 if it began anew; None if its parameters are those of no step.
        """
        candidates = self.steps[: limit + 1]
        start = candidates[0].seen
        moving = [
            name
            for name in start
            if name.startswith("parameter/") and any(one.seen.get(name) != start[name] for one in candidates)
        ]

        def score(step: int) -> tuple[int, int, int]:
            seen = candidates[step].seen
            return (
                sum(seen.get(name) == first.seen.get(name) for name in moving),
                sum(seen.get(name) == digest for name, digest in first.seen.items()),
                step,
            )

        best = max(range(len(candidates)), key=score)
        return best if score(best)[0] else None


def first_difference(
    expected: Sequence[Trace], found: Sequence[Trace], *, after: int = 0, until: int | None = None
) -> tuple[int, dict[int, dict[str, list[str]]]] | None:
    """The first step before which two trainings differ, and what differs then in each of their processes.

    Args:
        after: the second training begins after so many steps of the first.
        until: steps of the first training to look at; by default all, and the end.

    Returns:
        The number of the step, from 1 on, where one more than the last stands for the end; None if all is equal.
    """
    total = len(expected[0].steps)
    for step in range(after + 1, (until or total) + 1):
        differs = {}
        for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            if step - after > len(theirs.steps):
                return None if until else (step, {})
            one = ours.steps[step - 1].differences(theirs.steps[step - after - 1], is_first=step == after + 1)
            if one:
                differs[rank] = one
        if differs:
            return step, differs
    if until:
        return None
    if any(len(theirs.steps) + after > total for theirs in found):
        return total + 1, {}
    ends = {
        rank: one
        for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True))
        if ours.end and theirs.end and (one := ours.end.differences(theirs.end))
    }
    return (total + 1, ends) if ends else None


def unseeded(expected: Sequence[Trace], found: Sequence[Trace]) -> frozenset[str]:
    """The random number generators that differ before the first step of two runs of a script."""
    return frozenset(
        f"random/{name}"
        for ours, theirs in zip(expected, found, strict=True)
        for name in ours.steps[0].differences(theirs.steps[0]).get("random", ())
    )


def first_steps(expected: Sequence[Trace], found: Sequence[Trace], after: int) -> dict[str, int | None]:
    """For each kind the first step before which it differs in any process; None if it never does."""
    steps: dict[str, int | None] = dict.fromkeys(KINDS)
    for ours, theirs in zip(expected, found, strict=True):
        pairs = list(zip(ours.steps[after:], theirs.steps, strict=False))
        if ours.end and theirs.end and len(ours.steps) == len(theirs.steps) + after:
            pairs.append((ours.end, theirs.end))
        for offset, (one, other) in enumerate(pairs):
            for kind in one.differences(other, is_first=not offset):
                before = steps[kind]
                steps[kind] = min(after + offset + 1, before or after + offset + 1)
    return steps


def _different_batches(expected: Sequence[Batch], found: Sequence[Batch]) -> Iterator[str]:
    count = max(len(expected), len(found))
    for place in range(count):
        if expected[place : place + 1] != found[place : place + 1]:
            yield f"batch {place + 1} of {count}"
