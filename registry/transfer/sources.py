"""Sources: what a diff or a transfer can be given, and how a side is read from it."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.reading import read_checkpoint_file
from registry.home import Home
from registry.live import builders, components
from registry.live.builders import on_meta
from registry.store.errors import Invalid, NotFound, Unsupported
from registry.store.text import printable, quoted
from registry.store.tree import not_dense, tensor_paths
from registry.transfer.sides import Side, StateEntry

STATE_DICT = "a state dict"
"""The label of a side that is a state dict."""

TORCHVISION = "torchvision:"
"""What the name of a network of torchvision begins with."""

_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".index.json")
"""Endings of names of files."""

Source = Any
"""A reference, a path to a file, `torchvision:NAME`, a live network, or a pair of a network and a reference."""


def side_of(source: Source, registry: Home | None = None, *, component: str = "model") -> Side:
    """Read what a diff or a transfer needs of a source: no tensor yet.

    Args:
        source: see `Source`. A text that names a file is one; anything else is a reference, or else the name of a
            registered network.
        registry: where references are looked up; the default one unless given.
        component: which component of a checkpoint or a file.

    Raises:
        NotFound: if there is no such thing.
        Invalid, Unsupported: if it holds no tensors, or cannot be read safely.
    """
    if isinstance(source, Side):
        return source
    if isinstance(source, nn.Module):
        return _live(source)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], nn.Module):
        return side_of(source[1], registry, component=component).explained_by(source[0], _live(source[0]))
    if isinstance(source, Mapping):
        return _tree(STATE_DICT, source)
    if isinstance(source, os.PathLike):
        return _file(Path(source), component)
    if not isinstance(source, str):
        raise Invalid(
            f"a {type(source).__qualname__} cannot be compared or loaded",
            "give a reference, a file, torchvision:NAME, or a network",
        )
    if source.startswith(TORCHVISION):
        return _torchvision(source)
    if source.lower().endswith(_FILES) or os.path.sep in source or os.path.isdir(source):
        return _file(Path(source), component)
    try:
        if registry is None:
            registry = Home(create=False)
        return _stored(registry, source, component)
    except NotFound:
        built = _built(source)
        if built is None:
            raise
        return built


def torchvision_name(source: str) -> str:
    """The network that `torchvision:NAME` names.

    Raises:
        NotFound: suggesting the nearest.
    """
    # Lazy: loads torchvision.
    import torchvision

    name, known = source.removeprefix(TORCHVISION), torchvision.models.list_models()
    # Torchvision looks its names up in lower case.
    if name.lower() not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise NotFound(f"torchvision has no model {quoted(name)}", f"did you mean {near[0]}?" if near else "")
    return name


def _built(name: str) -> Side | None:
    """The side of a network that is registered under a name, built on the meta device; None if there is none."""
    if name not in builders.names():
        return None
    side = _live(on_meta(lambda: builders.builder(name).build(None)))
    side.label = name
    return side


def _stored(home: Home, reference: str, component: str) -> Side:
    """The side of a version in a registry."""
    checkpoint = Checkpoint.named(home, reference)
    if component not in checkpoint.components:
        raise components.missing(component, checkpoint.name, checkpoint.components)
    manifest = checkpoint.store.manifest(checkpoint.id)
    buffers = set(checkpoint.provenance.get("buffers", {}).get(component, ()))
    known = "buffers" in checkpoint.provenance
    entries, digests, shards = [], {}, {}
    for path, info, parts in manifest.entries({component: manifest.components[component]}):
        name = path.partition("/")[2]
        kind = ("buffer" if name in buffers else "parameter") if known else None
        entries.append(StateEntry(name, info.dtype, info.shape, kind=kind, tie=parts))
        if parts[0][0] is None:
            digests[name] = info.digest
        else:
            # The manifest has the digests of the shards alone. The digest of the whole tensor needs its bytes.
            shards[name] = info.digest
    if not entries:
        raise Invalid(f"{checkpoint.name} holds no tensors in {component}")

    @functools.cache
    def loaded() -> dict[str, torch.Tensor]:
        return _flat(checkpoint.load(component)[component])

    return Side(
        checkpoint.name,
        entries,
        lambda name: loaded()[name],
        checkpoint=checkpoint,
        digests=digests,
        shards=shards,
    )


def _file(path: Path, component: str) -> Side:
    """The side of a file of another program."""
    imported = read_checkpoint_file(path)
    if component not in imported.components:
        found = ", ".join(imported.components)
        raise NotFound(f"{path}: has no component {quoted(component)}", f"it has {found}")
    side = _tree(printable(str(path)), imported.components[component])
    layout = imported.source.get("layout", {})
    used = [key for key, part, *_ in layout.get("keys", []) if part == component]
    others = [name for name in imported.components if name != component]
    if used:
        rest = f"; the file also holds: {', '.join(others)}" if others else ""
        side.notes = (f"{path.name}: the tensors are under the key {quoted(str(used[0]))}{rest}",)
    return side


def _tree(label: str, tree: Any) -> Side:
    """The side of a state dict."""
    tensors = _flat(tree)
    if not tensors:
        raise Invalid(f"{label} holds no tensors")
    for name, tensor in tensors.items():
        _check_initialised(f"{name} of {label}", tensor)
        if reason := not_dense(tensor):
            raise Unsupported(f"{name} of {label} is {reason[0]}", *reason[1:])
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    has_values = not any(tensor.is_meta for tensor in tensors.values())
    return Side(
        label,
        entries,
        tensors.__getitem__ if has_values else None,
        metadata=getattr(tree, "_metadata", None),
    )


def _flat(tree: Any) -> dict[str, torch.Tensor]:
    """Tensors of a state dict by name; of a nested one by path."""
    return {path.partition("/")[2] or path: t for path, t in tensor_paths({"": tree}).items()}


def _live(module: nn.Module) -> Side:
    """The side of a live network."""
    plain = components.plain_module(module)
    state = components.live_state(module)
    own = _own_tensors(plain)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    entries = [_live_entry(name, tensor) for name, tensor in tensors.items()]
    if not entries:
        raise Invalid(f"{type(plain).__qualname__} has no parameters")
    has_values = not any(tensor.is_meta for tensor in tensors.values())
    return Side(
        type(plain).__qualname__,
        entries,
        tensors.__getitem__ if has_values else None,
        module=plain,
        metadata=getattr(state, "_metadata", None),
        derived=[name for name, tensor in tensors.items() if id(tensor) not in own],
    )


def _own_tensors(module: nn.Module) -> set[int]:
    """The `id` of each parameter and buffer of a network.

    Raises:
        Unsupported: if it is sharded by FSDP.
    """
    found: set[int] = set()
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise Unsupported("the network is sharded by FSDP", "transfer and freeze before wrapping it")
        found.update(map(id, part._parameters.values()))
        found.update(map(id, part._buffers.values()))
    return found


def _check_initialised(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise Unsupported(f"{name} is not initialised yet", "run one batch through the network first")


def _live_entry(name: str, tensor: torch.Tensor) -> StateEntry:
    """The entry of a tensor of a live network."""
    _check_initialised(name, tensor)
    is_parameter = isinstance(tensor, nn.Parameter)
    if (not is_parameter and type(tensor) is not torch.Tensor) or hasattr(tensor, "device_mesh"):
        raise Unsupported(
            f"{name} is a {type(tensor).__qualname__}", "transfer and freeze before the network is sharded"
        )
    kind = "parameter" if is_parameter else "buffer"
    return StateEntry(name, _name_of(tensor.dtype), tuple(tensor.shape), kind=kind, tie=id(tensor))


def _entry(name: str, tensor: torch.Tensor) -> StateEntry:
    """The entry of a tensor that is in no network; names that share memory have the same place."""
    has_place = tensor.numel() and not tensor.is_meta
    where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if has_place else id(tensor)
    return StateEntry(name, _name_of(tensor.dtype), tuple(tensor.shape), kind=None, tie=where)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def _torchvision(source: str) -> Side:
    """The side of a network of torchvision, on the meta device."""
    # Lazy: loads torchvision.
    import torchvision

    name = torchvision_name(source)
    side = _live(on_meta(lambda: torchvision.models.get_model(name, weights=None)))
    side.label = source
    return side
