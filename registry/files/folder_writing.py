"""Writing folders: what `from_pretrained` opens, and what a Trainer and Accelerate resume from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from registry.checkpoints.building import under_names_on_disk
from registry.files.outgoing import OutgoingFolder
from registry.files.safetensors_files import flat, metadata_of, write_tensors
from registry.files.shards import INDEXES, SAFETENSORS
from registry.files.states import ACCELERATOR, TRAINERS, Trainer, states_of, trainer_of
from registry.files.torch_files import write_torch_file
from registry.progress import Progress, silent
from registry.store.errors import Invalid, NotFound, Unsupported
from registry.store.text import quoted
from registry.store.tree import Leaf

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint

SHARD = 5_000_000_000
"""Bytes of tensors that one file holds at most, unless the user says otherwise."""

_NETWORKS = ("model", "models", "adapter")
"""Components that hold parameters; the first that a checkpoint has is written."""

_ADAPTER = "adapter_model"
"""What the file of an adapter of PEFT is called before the suffix."""

_SUFFIX = re.compile(r"(\.safetensors|\.bin)(\.index\.json)?\Z")

Shard = dict[str, Leaf]


def export_folder(
    checkpoint: Checkpoint,
    folder: Path | str,
    *,
    component: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int = SHARD,
    verify: bool = True,
    progress: Progress = silent,
) -> Path:
    """Write a checkpoint to a folder of its own, whole or not at all: parameters as safetensors, and its files.

    The folder holds what `from_pretrained` of transformers, PEFT and diffusers opens, and timm by `local-dir:`. Parameters
    of a network of transformers have the names that `save_pretrained` writes; others those that they were saved with. What
    was imported has the names that it had in its file. An adapter of PEFT has its `adapter_config.json` beside it.

    Args:
        folder: must not exist, or be empty.
        component: write the parameters of this component; by default those of the network, or of all networks.
        state: write these parameters of the live network in the place of those of `model`.
        max_shard_size: bytes of tensors in one file; larger networks become several files, with an index. An adapter is one
            file.
        verify: check the digests of what is read.
        progress: called with the bytes that are written, and of all.

    Returns:
        `folder`, as a Path.

    Raises:
        Conflict: if there is a folder that is not empty, or something else.
        NotFound: if the checkpoint has no parameters, or the folder above does not exist.
        Unsupported: if safetensors cannot hold a value, naming it.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the system refuses; nothing is left behind.
    """
    return _write(
        checkpoint,
        Path(folder),
        component=component,
        state=state,
        trainer=None,
        max_shard_size=max_shard_size,
        verify=verify,
        progress=progress,
    )


def checkout(
    checkpoint: Checkpoint, folder: Path | str, *, verify: bool = True, progress: Progress = silent
) -> Path:
    """Write a checkpoint that came from a Trainer or from Accelerate as a folder that they resume from.

    It was imported from such a folder, has a Trainer's `trainer_state.json` among its files, or was saved by `save_state`
    of `registry.integrations.accelerate`.

    `Trainer.train(resume_from_checkpoint=folder)` and `accelerator.load_state(folder)` go on from it, with the optimizer,
    scheduler, random numbers and its files.

    Args:
        folder: must not exist, or be empty.
        verify: check the digests of what is read.
        progress: called with the bytes that are written, and of all.

    Returns:
        `folder`, as a Path.

    Raises:
        Unsupported: if the checkpoint did not come from them, or has been thinned.
        Conflict, NotFound, Corrupt, StorageError: as `export_folder`.
    """
    source = checkpoint.record.get("source") or {}
    trainer = TRAINERS.get(str(source.get("folder"))) or trainer_of(checkpoint.files)
    if trainer is None and ACCELERATOR in checkpoint.components:
        trainer = TRAINERS["accelerate"]
    if trainer is None:
        raise Unsupported(
            f"{checkpoint.name} did not come from transformers' Trainer or from Accelerate",
            "resume it in its program with restore()",
        )
    if "thinned-from" in checkpoint.record:
        raise Unsupported(
            f"{checkpoint.name} has been thinned and has no optimizer any more", "take a version that has"
        )
    return _write(
        checkpoint,
        Path(folder),
        component=None,
        state=None,
        trainer=trainer,
        max_shard_size=SHARD,
        verify=verify,
        progress=progress,
    )


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    component: str | None,
    state: Mapping[str, torch.Tensor] | None,
    trainer: Trainer | None,
    max_shard_size: int,
    verify: bool,
    progress: Progress,
) -> Path:
    if type(max_shard_size) is not int or max_shard_size < 1:
        raise Invalid(
            f"max_shard_size is {quoted(str(max_shard_size))}, expected bytes, such as 5_000_000_000"
        )
    outgoing = OutgoingFolder(folder, progress=progress)
    name, tree = _network(checkpoint, component, state=state, verify=verify)
    is_live = state is not None or "source" not in checkpoint.record
    # A Trainer reads the names of the live network alone.
    if trainer is None and is_live and name == "model" and isinstance(tree, Mapping):
        tree = under_names_on_disk(checkpoint, tree)
    networks = list(_files_of(checkpoint, name, tree))
    metadata = metadata_of(checkpoint, component or "model")
    # Accelerate reads one file for each network, and PEFT one for an adapter.
    is_one_file = (
        len(networks) > 1
        or trainer is TRAINERS["accelerate"]
        or any(stem == _ADAPTER for stem, _ in networks)
    )
    limit = None if is_one_file else max_shard_size
    tensors = {
        name: shard for stem, leaves in networks for name, shard in _shards(stem, leaves, limit).items()
    }
    kept = dict(checkpoint.files)
    texts = _described(checkpoint, kept, tree) | {
        f"{stem}{INDEXES[0]}": _index(parts)
        for stem, _ in networks
        if (parts := {name: shard for name, shard in tensors.items() if name.startswith(f"{stem}-")})
    }
    kept = {name: data for name, data in kept.items() if name not in tensors and name not in texts}
    total = sum(leaf.size for shard in tensors.values() for leaf in shard.values())
    with outgoing.opened(total + sum(map(len, kept.values()))) as file:
        for name, shard in tensors.items():
            with file(name) as take:
                write_tensors(shard, metadata, take)
        for name, data in {**kept, **texts}.items():
            with file(name) as take:
                take(data)
        for name, tree in states_of(trainer, checkpoint, verify=verify) if trainer else ():
            with file(name) as take:
                write_torch_file(tree, take)
    return folder


def adapter_config(state: Any) -> Mapping[str, Any] | None:
    """The configuration of an adapter of PEFT that was saved in a program; None for any other state."""
    found = getattr(state, "_metadata", None)
    for key in ("", "config"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) and "peft_type" in found else None


def _network(
    checkpoint: Checkpoint, component: str | None, *, state: Mapping[str, torch.Tensor] | None, verify: bool
) -> tuple[str, Any]:
    """The component whose parameters are written, and its state.

    Args:
        state: parameters of the live network, in the place of those of `model`.
    """
    name = component or next((name for name in _NETWORKS if name in checkpoint.components), None)
    if name is None:
        raise NotFound(
            f"{checkpoint.name} has no component model",
            f"name one of {', '.join(checkpoint.components)} as component",
        )
    return name, checkpoint.state_dict(name, verify=verify) if state is None else state


def _files_of(checkpoint: Checkpoint, name: str, tree: Any) -> Iterator[tuple[str, Shard]]:
    """The tensors of each network of a component, with what its file is called before the suffix."""
    files = (checkpoint.record.get("source") or {}).get("weights")
    usual = _ADAPTER if name == "adapter" or adapter_config(tree) else "model"
    first = files[0] if isinstance(files, list) and files and isinstance(files[0], str) else usual
    stem = _SUFFIX.sub("", first) or usual
    stem = "model" if stem == "pytorch_model" else stem
    for i, part in enumerate(tree if isinstance(tree, list) else [tree]):
        yield f"{stem}_{i}" if i else stem, flat(part, name)


def _shards(stem: str, leaves: Shard, limit: int | None) -> dict[str, Shard]:
    """Tensors by the file that they go to; a single file if all fit into one. A tensor is never cut."""
    parts: list[Shard] = [{}]
    size = 0
    for name, leaf in leaves.items():
        if parts[-1] and limit is not None and size + leaf.size > limit:
            parts.append({})
            size = 0
        parts[-1][name] = leaf
        size += leaf.size
    if len(parts) == 1:
        return {f"{stem}{SAFETENSORS}": parts[0]}
    return {
        f"{stem}-{number:05}-of-{len(parts):05}{SAFETENSORS}": part for number, part in enumerate(parts, 1)
    }


def _index(shards: Mapping[str, Shard]) -> bytes:
    """The index of shards, as transformers writes it."""
    total = sum(leaf.size for shard in shards.values() for leaf in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2).encode() + b"\n"


def _described(checkpoint: Checkpoint, kept: Mapping[str, Any], tree: Any) -> dict[str, bytes]:
    """What describes a network that was saved in a program, by what was recorded of it.

    Of an adapter it is PEFT's `adapter_config.json`, of a network of transformers or timm its `config.json`.
    """
    config = adapter_config(tree)
    if config is not None:
        name, document = "adapter_config.json", dict(config)
    else:
        about = checkpoint.provenance
        network, builder = about.get("network") or {}, about.get("builder")
        if builder not in ("transformers", "timm"):
            return {}
        name, document = "config.json", dict(network)
        if builder == "transformers":
            document = {**network.get("config", {}), "architectures": [network.get("class")]}
    return {} if name in kept else {name: json.dumps(document, indent=2).encode() + b"\n"}
