"""States: what a Trainer of transformers and Accelerate keep beside the parameters in the folders that they resume from.

Both ways: from the files of a folder to components, and back. The components have the names that
`registry.integrations` gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.live import rng

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint

ACCELERATOR = "accelerator"
"""The component that has what Accelerate counts itself."""

Read = Callable[[str], Any]
"""Gives what a file of `torch.save` in the folder holds; None if it cannot be read."""


@dataclass(frozen=True)
class Trainer:
    """A kind of folders that training goes on from.

    Attributes:
        name: what the record of a version calls it.
        files: the files of each component: the first one, and how further ones are called.
        random: the file of the random numbers of a process that trains alone, and those of several.
        generators: from what such a file holds to what `registry.live.rng.capture` gives, and back; that takes
            whether several processes trained.
        counts: the keys beside the random numbers that make up the component `accelerator`.
    """

    name: str
    files: Mapping[str, tuple[str, str]]
    random: tuple[str, str]
    generators: tuple[Callable[[Any], dict[str, Any]], Callable[[Mapping[str, Any], bool], dict[str, Any]]]
    counts: tuple[str, ...] = ()


TRAINERS = {
    row.name: row
    for row in (
        Trainer(
            name="transformers",
            files={
                "optimizer": ("optimizer.pt", ""),
                "scheduler": ("scheduler.pt", ""),
                "scaler": ("scaler.pt", ""),
            },
            random=("rng_state.pth", "rng_state_{}.pth"),
            generators=(rng.of_transformers, rng.as_transformers),
        ),
        Trainer(
            name="accelerate",
            files={
                "optimizer": ("optimizer.bin", "optimizer_{}.bin"),
                "scheduler": ("scheduler.bin", "scheduler_{}.bin"),
                "scaler": ("scaler.pt", ""),
                "registered": ("custom_checkpoint_0.pkl", "custom_checkpoint_{}.pkl"),
            },
            random=("random_states_0.pkl", "random_states_{}.pkl"),
            generators=(rng.of_accelerate, rng.as_accelerate),
            counts=("step",),
        ),
    )
}
"""The kinds of folders, by name."""


def trainer_of(names: Collection[str]) -> Trainer | None:
    """The kind of a folder, by the names in it; None if training does not go on from it."""
    if "trainer_state.json" in names:
        return TRAINERS["transformers"]
    return TRAINERS["accelerate"] if "random_states_0.pkl" in names else None


def read_states(trainer: Trainer, names: Collection[str], read: Read) -> tuple[dict[str, Any], set[str], int]:
    """The components beside the networks.

    Args:
        names: of the files in the folder.

    Returns:
        The components, the names of the files that they came from, and how many processes saved them.
    """
    components: dict[str, Any] = {}
    used: set[str] = set()
    for component, (first, further) in trainer.files.items():
        there = list(itertools.takewhile(names.__contains__, _numbered(first, further)))
        parts = [read(name) for name in there]
        if not there or any(part is None for part in parts):
            continue
        components |= named(component, parts)
        used |= set(there)
    alone, several = trainer.random
    there = list(itertools.takewhile(names.__contains__, map(several.format, itertools.count())))
    there = there or [name for name in (alone,) if name in names]
    found = [read(name) for name in there]
    try:
        states = [trainer.generators[0](one) for one in found]
        counts = {key: found[0][key] for key in trainer.counts if states}
    except (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError, RuntimeError):
        # Random numbers of devices that are not known here. Their files are kept as they are.
        states = []
    if states:
        components["rng"] = states[0]
        if len(states) > 1:
            components["ranks"] = {str(rank): {"rng": one} for rank, one in enumerate(states) if rank}
        if counts:
            components[ACCELERATOR] = counts
        used |= set(there)
    return components, used, max(len(states), 1)


def states_of(trainer: Trainer, checkpoint: Checkpoint, *, verify: bool) -> Iterator[tuple[str, Any]]:
    """The name and the tree of each file that `read_states` reads."""
    for component, (first, further) in trainer.files.items():
        one, several = component, component if component == "registered" else f"{component}s"
        if several in checkpoint.components:
            parts = checkpoint.state_dict(several, verify=verify)
        elif one in checkpoint.components:
            parts = [checkpoint.state_dict(one, verify=verify)]
        else:
            continue
        yield from zip(_numbered(first, further), parts, strict=False)
    if "rng" not in checkpoint.components:
        return
    states = [checkpoint.state_dict("rng", verify=verify)]
    if "ranks" in checkpoint.components:
        ranks = checkpoint.state_dict("ranks", verify=verify)
        states += [ranks[str(rank)]["rng"] for rank in range(1, len(ranks) + 1)]
    counts = {key: checkpoint.state_dict(ACCELERATOR, verify=verify)[key] for key in trainer.counts}
    alone, several = trainer.random
    for rank, state in enumerate(states):
        name = several.format(rank) if len(states) > 1 else alone
        yield name, {**counts, **trainer.generators[1](state, len(states) > 1)}


def named(component: str, parts: list[Any]) -> dict[str, Any]:
    """Parts as a component: a single one by itself, several as a list; what a user registered is always a list."""
    if component == "registered":
        return {component: parts}
    return {component: parts[0]} if len(parts) == 1 else {f"{component}s": parts}


def _numbered(first: str, further: str) -> Iterator[str]:
    yield first
    if further:
        yield from map(further.format, itertools.count(1))
