"""Building: the network of a checkpoint, made by its registered builder; the names that its parameters have in files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from registry.checkpoints.checkpoint import Checkpoint
from registry.live.builders import builder, on_meta
from registry.store.errors import Incompatible, Invalid, RegistryError, naming
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.home import Home

_logger = logging.getLogger(__name__)


def build(home: Home, reference: str, *, component: str = "model") -> nn.Module:
    """The network of a checkpoint, with its parameters and buffers, in evaluation mode.

    Its builder must be registered (see `registry.register_model`); no code that a file names is run.

    Args:
        component: the component that has the network's state.

    Raises:
        NotFound: if there is no such checkpoint, or its builder is not registered.
        Invalid: if the checkpoint does not record the configuration that its builder needs.
        Incompatible: if the builder's network does not fit the stored state.
    """
    checkpoint = Checkpoint.named(home, reference)
    about = checkpoint.provenance
    made = builder(about.get("builder", checkpoint.model))
    advice = (
        f"build the network yourself, then registry[{str(checkpoint.name)!r}].restore({component}=network)"
    )
    if kind := about.get("unrecorded"):
        raise Invalid(
            f"{checkpoint.name} does not record its network's configuration, a {quoted(kind)}: it is not a Config, and "
            "gives no plain values",
            advice,
        )
    if made.load is not None:
        state = checkpoint.state_dict(component, copy=True)
        with naming(checkpoint.name):
            return made.load(on_meta(lambda: made.build(about.get("network"))), state).eval()
    network = made.build(about.get("network"))
    live: dict[str, Any] = {component: network}
    try:
        checkpoint.restore(rng=False, **live)
    except Incompatible as error:
        if about.get("network"):
            raise
        raise Incompatible(
            f"{error.message}; {checkpoint.name} does not record how its network was made, and the builder "
            f"{quoted(made.name)} makes another by default",
            advice,
        ) from None
    return network.eval()


def under_names_on_disk(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """A state of the checkpoint's network under the names that files of such networks have.

    Where the network cannot be built here, the names stay as they are, and a warning says so.

    Args:
        state: under the names of the live network.
    """
    about = checkpoint.provenance
    # Only the networks of transformers have other names in files.
    if about.get("builder") != "transformers":
        return state
    try:
        made = builder("transformers")
        network = on_meta(lambda: made.build(about.get("network")))
        return state if made.on_disk is None else made.on_disk(network, state)
    except RegistryError as error:
        _logger.warning(
            "%s: its parameters keep the names that they have in the live network, as it cannot be built here: %s",
            checkpoint.name,
            error,
        )
        return state
