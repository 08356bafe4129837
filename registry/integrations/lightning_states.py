"""The checkpoint dict of Lightning: its lists, its paths, and whether two are of the same moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.layouts import LIGHTNING, lightning_tree
from registry.integrations import check_release, pointers
from registry.integrations.scrubbing import scrubbed, unscrubbed
from registry.integrations.storing import recordable
from registry.store.errors import Incompatible

check_release("lightning")

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


def items_of(checkpoint: Checkpoint, name: str) -> tuple[str, list[Any]]:
    """The component that has the states of some objects, of which a single one is no list, and these states."""
    if name in checkpoint.components:
        return name, [checkpoint.state_dict(name)]
    several = f"{name}s"
    return several, list(checkpoint.state_dict(several)) if several in checkpoint.components else []


def is_live(live: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the very parameters and buffers of a live one, and no others."""

    def place(value: Any) -> Any:
        return (value.data_ptr(), value.shape, value.dtype) if isinstance(value, torch.Tensor) else None

    return list(live) == list(state) and all(place(live[name]) == place(state[name]) for name in live)


def dict_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint dict of a version, with marks in the place of paths.

    Raises:
        Incompatible: if Lightning did not save it.
    """
    if LIGHTNING not in checkpoint.components:
        raise Incompatible(
            f"{checkpoint.name} was not saved by Lightning",
            f"take its parameters alone: registry[{checkpoint.name!r}].restore(model=net)",
        )
    return lightning_tree(checkpoint.load())


def without_paths(rest: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """A checkpoint dict with plain hyperparameters, and without paths of this machine in what callbacks keep."""
    found = {key: value for key, value in rest.items() if key != "hparams_type"}
    if "hyper_parameters" in found:
        found["hyper_parameters"] = recordable(found["hyper_parameters"])
    if "callbacks" in found:
        states = found["callbacks"].items()
        found["callbacks"] = {key: scrubbed(state, _folders(trainer, key)) for key, state in states}
    return found


def with_paths(found: Mapping[str, Any], trainer: Trainer, *, last: str) -> dict[str, Any]:
    """A checkpoint dict with the paths of this machine.

    Args:
        last: the id of its version. A `ModelCheckpoint` learns that its `last.ckpt` is this one, as `save_last` makes no
            version that would say so.
    """
    states: dict[str, Any] = {}
    for key, state in found.get("callbacks", {}).items():
        folders = _folders(trainer, key)
        states[key] = unscrubbed(state, folders)
        if "checkpoints" in folders and "last_model_path" in state:
            for path, version_id in pointers.in_folder(folders["checkpoints"]).items():
                is_last = os.path.basename(path).startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST)
                if is_last and version_id == last:
                    states[key]["last_model_path"] = path
    return {**found, **({"callbacks": states} if states else {})}


def is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two dicts are of the same moment of a training: nothing was trained and no number drawn between them."""
    if "ranks" not in before or "ranks" not in now:
        return False
    drawn = [[one["rng"]["torch"] for one in moment["ranks"]] for moment in (before, now)]
    return all(before[key] == now[key] for key in ("global_step", "epoch", "loops")) and all(
        torch.equal(one, other) for one, other in zip(*drawn, strict=True)
    )


def _folders(trainer: Trainer, key: str) -> dict[str, str]:
    """The folders whose paths the state of a callback may have."""
    found = {"root": trainer.default_root_dir}
    for one in trainer.callbacks:
        if one.state_key == key and isinstance(getattr(one, "dirpath", None), str):
            found["checkpoints"] = one.dirpath
    return found
