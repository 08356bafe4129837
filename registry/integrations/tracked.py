"""Tracked: what a tracker of experiments is told of a version. The content stays in the registry.

A tracker gets the address of a version, `torch-registry:` and the id, which `registry[...]` takes on any machine that has the
registry. No path of the registry's folder is told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from registry.checkpoints.checkpoint import Checkpoint
from registry.integrations.scrubbing import scrubbed
from registry.registry import Registry
from registry.store.errors import Invalid
from registry.store.text import printable

_logger = logging.getLogger(__name__)

SCHEME = "torch-registry:"
"""What an address begins with; the id of a version follows."""


def version_of(reference: str | Checkpoint, registry: Registry | None) -> Checkpoint:
    """The version that shall be told of.

    Args:
        registry: where a reference leads; the registry of this program, as for `Registry()`, unless given.

    Raises:
        Invalid: if it is neither a reference nor a version.
        NotFound, Conflict: as `Registry.__getitem__`.
    """
    if isinstance(reference, Checkpoint):
        return reference
    if not isinstance(reference, str):
        raise Invalid(
            f"expected a reference or a version, not {type(reference).__qualname__}",
            "after run.save(wait=False) give what run.wait() returns",
        )
    return (registry or Registry(create=False))[reference]


def address(checkpoint: Checkpoint) -> str:
    """Where a version is: an id, without the folder of a machine."""
    return SCHEME + checkpoint.id


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a tracker shows of a version, as JSON: numbers that JSON lacks become text, such as `nan`.

    Paths below the home folder and the working directory name these instead; see `scrubbing`.
    """
    found = {
        "id": checkpoint.id,
        "model": checkpoint.model,
        "version": checkpoint.version,
        "created": checkpoint.created,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "loss": checkpoint.loss,
        "metrics": checkpoint.metrics,
        "config": checkpoint.config,
        "run": checkpoint.run,
        "parent": checkpoint.parent,
        "lineage": checkpoint.lineage,
        "tags": checkpoint.tags,
    }
    shown = {key: value for key, value in found.items() if value is not None and value not in ({}, [], ())}
    return scrubbed(_as_json(shown), {})  # type: ignore[no-any-return]


def warn_of(checkpoint: Checkpoint, tracker: str, error: Exception) -> None:
    """Say that a tracker has failed. The version is stored, and training goes on."""
    _logger.warning(
        "%s is stored, but %s was not told of it (%s: %s); log it again later",
        checkpoint.name,
        tracker,
        type(error).__name__,
        printable(str(error).partition("\n")[0])[:300],
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
