"""Causes: what usually makes a resumed training differ, and what each cause is known by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from registry.resuming.trace import Batch, Trace

Differences = Mapping[int, Mapping[str, list[str]]]
"""What differs before a step: for each process the names, by kind."""


class Cause(NamedTuple):
    """A usual cause of a difference.

    Attributes:
        name: what it is called.
        advice: what to do about it.
        component: a pattern for names and classes of the component that the checkpoint needs against it.
    """

    name: str
    advice: str
    component: str = ""


CAUSES = {
    "start": Cause(
        "an unseeded start",
        "Set the seed before the networks are made: torch.manual_seed(0), and random.seed(0) and "
        "numpy.random.seed(0) if these are drawn from.",
    ),
    "time": Cause(
        "values that depend on the time, or on a generator without a seed",
        "The random numbers of torch, NumPy and Python are equal. Look for the clock, os.urandom, default_rng() without "
        "a seed, and the order of files or of sets.",
    ),
    "kernels": Cause(
        "nondeterministic kernels",
        "Equal batches and parameters gave other gradients. Call torch.use_deterministic_algorithms(True). If this "
        "changes nothing, look for a loss that depends on the time.",
    ),
    "parameters": Cause(
        "parameters that are not saved",
        "Save and restore every network that is trained.",
        r"model|net",
    ),
    "optimizer": Cause(
        "an optimizer that is not saved", "Save and restore each optimizer as a component.", r"optim|adam|sgd"
    ),
    "scheduler": Cause(
        "a scheduler that is not saved",
        "Save and restore the scheduler as a component, after it was made.",
        r"sched|lr\b|LR$",
    ),
    "ema": Cause(
        "an EMA, or another copy of the network, that is not saved",
        "Save and restore the copy as a component: run.save(model=model, ema=ema, ...).",
        r"ema|averag|teacher|target",
    ),
    "loader": Cause(
        "a loader without a state",
        "Wrap it: loader = ResumableLoader(loader), and save and restore it as a component.",
        r"loader",
    ),
    "order": Cause(
        "the data order of a later epoch",
        "The order comes from something that is not restored: a generator or a sampler of your own, or the number of the "
        "epoch for set_epoch.",
    ),
    "random": Cause(
        "random numbers that are not restored",
        "Restore them after everything is made: checkpoint.restore(..., rng=True). Draw none between that and the first "
        "batch.",
    ),
    "generator": Cause(
        "a draw from a generator that is not captured",
        "The random numbers of torch, NumPy and Python are equal. A torch.Generator, default_rng() or random.Random() of "
        "your own has to be saved too; so has a counter that the loss depends on.",
    ),
    "window": Cause(
        "an unfinished window of accumulated gradients",
        "Save the gradients as a component, gradients=Gradients(model), with the place in the window; or save only where "
        "a window ends.",
        r"gradients",
    ),
    "rank": Cause(
        "dropout on another rank",
        "Each process needs random numbers of its own back: all of them call run.save and restore, and as many processes "
        "resume.",
    ),
    "buffer": Cause(
        "a buffer that is not saved",
        "Register it with persistent=True, or save what it is computed from; a plain tensor needs register_buffer.",
    ),
    "position": Cause(
        "the position in the training",
        "The number of the epoch or of the step is not restored, or something was drawn or trained between the restore "
        "and the first batch.",
    ),
}
"""The usual causes."""


@dataclass(frozen=True)
class Saved:
    """What the version that was resumed has.

    Attributes:
        name: the version, such as `net:v3`.
        components: the class of each component by name; empty where it is not known.
    """

    name: str
    components: Mapping[str, str]

    def has(self, cause: Cause) -> bool:
        """Whether it has a component that a cause speaks of."""
        pattern = re.compile(cause.component, re.IGNORECASE)
        return any(pattern.search(f"{name} {kind}") for name, kind in self.components.items())


def cause_of(step: int, differs: Differences, expected: Trace, found: Trace, *, after: int) -> Cause:
    """The usual cause of a difference between a resumed training and one in one go.

    Args:
        step: the step before which they differ, from 1 on.
        differs: what differs, for each process.
        expected, found: the traces of the first process that differs.
        after: the training was resumed after so many steps.
    """
    rank = min(differs, default=0)
    own = set(differs.get(rank, ()))
    if not own:
        return CAUSES["position"]
    if any("random" in other for one, other in differs.items() if one) and "random" not in differs.get(0, ()):
        return CAUSES["rank"]
    for kind, key in (("parameter", "parameters"), ("optimizer", "optimizer"), ("schedule", "scheduler")):
        if kind in own:
            return CAUSES[key if step == after + 1 or kind == "schedule" else "kernels"]
    if "other" in own:
        return CAUSES["ema"]
    if step > len(expected.steps):
        return CAUSES["random" if "random" in own else "buffer"]
    return _of_a_step(own, expected, found, step=step, after=after)


def cause_of_no_repeat(step: int, differs: Differences) -> Cause:
    """The usual cause why a script does not do the same when it is run again."""
    own = set(differs.get(min(differs, default=0), ()))
    if own & {"random", "parameter", "other"}:
        return CAUSES["start"]
    return CAUSES["kernels" if own <= {"gradient", "optimizer", "buffer"} else "time"]


def _of_a_step(own: set[str], expected: Trace, found: Trace, *, step: int, after: int) -> Cause:
    """The cause where the state that goes into a step is equal, and what the step makes of it is not."""
    ours, theirs = expected.steps[step - 1], found.steps[step - after - 1]
    is_first = step == after + 1
    if is_first and _is_torn(ours.batches, theirs.batches):
        return CAUSES["window"]
    if "batch" in own:
        known = {row for one in expected.steps for batch in one.batches for row in batch.rows}
        is_reordered = any(
            batch not in ours.batches and set(batch.rows) <= known for batch in theirs.batches if batch.rows
        )
        if is_reordered and (ours.has_loader or "random" not in own):
            return CAUSES["loader" if is_first else "order"]
        return CAUSES["random" if "random" in own else "generator"]
    if "random" in own:
        return CAUSES["random" if is_first else "position"]
    if "buffer" in own:
        return CAUSES["buffer"]
    return CAUSES["generator"]


def _is_torn(expected: tuple[Batch, ...], found: tuple[Batch, ...]) -> bool:
    """Whether a training went on inside a window of gradients, of which the batches before are lost."""
    return any(one in found[:1] for one in expected[1:])
