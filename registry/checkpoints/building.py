"""Building: the network of a checkpoint, made by its registered builder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from registry.checkpoints.checkpoint import Checkpoint
from registry.live.builders import builder, on_meta
from registry.store.errors import Incompatible, Invalid, naming
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.home import Home


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
            f"gives no plain values; {advice}"
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
            f"{error}; {checkpoint.name} does not record how its network was made, and the builder {quoted(made.name)} "
            f"makes another by default: {advice}"
        ) from None
    return network.eval()
