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
    is_cuda_used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    state = _captured(
        random.getstate(),
        np.random.get_state(legacy=True),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if is_cuda_used else None,
    )
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
            "rng is no state of the random number generators", "give what registry.live.rng.capture() returns"
        )
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Set the generators to a captured state; devices that are not here are passed over."""
    random.setstate(_python(state))
    np.random.set_state(_numpy(state))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(one.clone(), device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].clone())


def of_transformers(state: Any) -> dict[str, Any]:
    """What a Trainer of transformers keeps of one process in `rng_state.pth`, in the form of `capture`.

    Raises:
        KeyError, TypeError, ValueError: if it has another form, or random numbers of devices that are not known here.
    """
    rest = {key: value for key, value in state.items() if key not in ("python", "numpy", "cpu", "cuda")}
    if rest:
        raise ValueError(f"random numbers of {', '.join(map(str, rest))}")
    cuda = state.get("cuda")
    return _captured(
        state["python"], state["numpy"], state["cpu"], [cuda] if isinstance(cuda, torch.Tensor) else cuda
    )


def as_transformers(state: Mapping[str, Any], several: bool) -> dict[str, Any]:
    """A captured state as `rng_state.pth` has it.

    Args:
        several: whether several processes trained; a process that trains alone keeps one device.
    """
    found = {"python": _python(state), "numpy": _numpy(state), "cpu": state["torch"]}
    if cuda := state.get("cuda"):
        found["cuda"] = list(cuda) if several else cuda[0]
    return found


def of_accelerate(state: Any) -> dict[str, Any]:
    """What Accelerate keeps of one process in `random_states_0.pkl`, in the form of `capture`; raises likewise."""
    known = ("step", "random_state", "numpy_random_seed", "torch_manual_seed", "torch_cuda_manual_seed")
    rest = {key: value for key, value in state.items() if key not in known}
    if rest:
        raise ValueError(f"random numbers of {', '.join(map(str, rest))}")
    return _captured(
        state["random_state"],
        state["numpy_random_seed"],
        state["torch_manual_seed"],
        state.get("torch_cuda_manual_seed"),
    )


def as_accelerate(state: Mapping[str, Any], several: bool) -> dict[str, Any]:
    """A captured state as `random_states_0.pkl` has it."""
    found = {
        "random_state": _python(state),
        "numpy_random_seed": _numpy(state),
        "torch_manual_seed": state["torch"],
    }
    if cuda := state.get("cuda"):
        found["torch_cuda_manual_seed"] = list(cuda)
    return found


def _captured(python: Any, numpy: Any, cpu: Any, cuda: Any) -> dict[str, Any]:
    version, internal, gauss = python
    kind, keys, position, has_gauss, cached = numpy
    if not isinstance(cpu, torch.Tensor):
        raise TypeError("no state of torch's generator")
    found = {
        "python": {
            "version": version,
            "state": torch.from_numpy(np.array(internal, np.int64)),
            "gauss": gauss,
        },
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": cpu,
    }
    return found | ({"cuda": list(cuda)} if cuda else {})


def _python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    python = state["python"]
    return python["version"], tuple(python["state"].tolist()), python["gauss"]


def _numpy(state: Mapping[str, Any]) -> tuple[Any, ...]:
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    return numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]
