"""The state of every random number generator that training draws from, as a tree that the store keeps."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from registry.store.errors import Invalid


def capture() -> dict[str, Any]:
    """The generators of Python, NumPy and torch, and of the accelerators that are in use."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "state": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys, np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def check(state: Any) -> Mapping[str, Any]:
    """See that a state has the form that `capture` gives it.

    Raises:
        Invalid: if it has not.
    """
    if not isinstance(state, Mapping) or not {"python", "numpy", "torch"} <= state.keys():
        raise Invalid(
            "rng is no state of the random number generators; give what registry.live.rng.capture() returns"
        )
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Set the generators to a captured state; devices that are not here are passed over."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]),
    )
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(one.clone(), device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].clone())
