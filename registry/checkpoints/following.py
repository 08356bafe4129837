"""Following a reference: each version that an alias comes to name is put into a live network, as the difference to what it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from registry.checkpoints.checkpoint import Checkpoint
from registry.store.errors import Corrupt, NotFound, StorageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from registry.home import Home

_logger = logging.getLogger(__name__)

EVERY = 5.0
"""Seconds between two looks at what a reference names."""


def follow(
    home: Home,
    reference: str,
    *,
    into: nn.Module | Mapping[str, Any] | None = None,
    component: str = "model",
    every: float = EVERY,
) -> Iterator[Checkpoint]:
    """Each version that a reference comes to name, beginning with the present one; without end.

    Only tensors that differ from those of the version before are read. Every byte is checked before the first one is copied, so a
    version that is damaged, or is being collected, leaves the network as it was: a warning says so, and it is tried again.

    Args:
        reference: such as `net@production`. Until it names a version, nothing comes, and a warning says so.
        into: a network, or the live tensors of one by name, which each version is put into before it comes. None for none.
        component: the stored component that goes there.
        every: seconds between two looks.

    Raises:
        Incompatible: if the names, shapes or dtypes of a version do not fit; the network stays as it was.
        Invalid: if the reference is malformed.
    """
    live = _tensors(into)
    held: dict[str, str] = {}
    last = warned = ""
    while True:
        try:
            checkpoint = Checkpoint.named(home, reference)
            if checkpoint.id != last:
                held = _apply(checkpoint, component, live, held)
                last = checkpoint.id
                yield checkpoint
                continue
        except NotFound as error:
            # There is none yet, or it was removed at this moment.
            if not last and str(error) != warned:
                _logger.warning("%s; waiting until there is one", error)
            warned = str(error)
        except (Corrupt, StorageError) as error:
            if str(error) != warned:
                _logger.warning("%s; the version before stays, and this one is tried again", error)
            warned = str(error)
        time.sleep(every)


def _tensors(into: nn.Module | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The live tensors by name."""
    if into is None:
        return {}
    return into if isinstance(into, Mapping) else into.state_dict()


def _apply(
    checkpoint: Checkpoint, component: str, live: Mapping[str, Tensor], held: Mapping[str, str]
) -> dict[str, str]:
    """Put what differs into live tensors, and return the digests of what they hold then.

    Args:
        held: digests of what they hold now, by path.
    """
    if not live:
        return {}
    stored = {path: digest for path, _, _, digest in checkpoint.parameters()}
    # A name that is not stored is among them, and load_into says so.
    changed = {
        name: tensor
        for name, tensor in live.items()
        if (digest := stored.get(f"{component}/{name}")) is None or held.get(name) != digest
    }
    if changed:
        targets: dict[str, Any] = {component: changed}
        checkpoint.load_into(**targets)
    _logger.info("%s: %d of %d tensors were put in place", checkpoint.name, len(changed), len(live))
    return {name: stored[f"{component}/{name}"] for name in live}
