"""Sides: the named tensors of a checkpoint, a file, or a live network, without reading a value until one is asked for."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.formats import INDEX, SUFFIXES
from registry.files.reading import read_checkpoint_file
from registry.home import Home
from registry.live import components
from registry.store.digest import digest as digest_of
from registry.store.digest import tensor_digest
from registry.store.errors import Invalid, NotFound, RegistryError, Unsupported
from registry.store.text import printable, quoted
from registry.store.tree import Leaf, tensor_paths

STATE_DICT = "a state dict"
TORCHVISION = "torchvision:"
_FILES = (*SUFFIXES, INDEX)

Source = Any
"""A reference, a path to a file, `torchvision:NAME`, a live network, or a pair of a network and a reference."""


class Entry(NamedTuple):
    """One name of a state dict.

    Attributes:
        kind: `parameter` or `buffer`; None where a file does not say.
        tie: equal for names that share memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str | None
    tie: object

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Side:
    """One of the two sides of a diff, or the source of a transfer.

    Attributes:
        label: what to call it.
        entries: by name, in the order of the state dict.
        module: the live network, if it is one.
        checkpoint: the version in the registry, if it is one.
        notes: what is worth saying about how it was read.
        derived: names of a live network that are none of its parameters and buffers, but made by its `state_dict()`.
    """

    def __init__(
        self,
        label: str,
        entries: Iterable[Entry],
        tensor: Callable[[str], torch.Tensor] | None,
        *,
        module: nn.Module | None = None,
        checkpoint: Checkpoint | None = None,
        digests: Mapping[str, str] | None = None,
        shards: Mapping[str, str] | None = None,
        metadata: Any = None,
        notes: Iterable[str] = (),
        derived: Iterable[str] = (),
    ) -> None:
        self.label = label
        self.entries = {entry.name: entry for entry in entries}
        self.module = module
        self.checkpoint = checkpoint
        self.notes = tuple(notes)
        self.derived = frozenset(derived)
        self.metadata = metadata
        self._tensor = tensor
        self._digests = dict(digests or {})
        self._shards = dict(shards or {})

    @property
    def has_values(self) -> bool:
        """Whether there are values to compare or copy; a network on the meta device has none."""
        return self._tensor is not None

    @property
    def elements(self) -> int:
        return sum(entry.elements for entry in self.entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a name; on the CPU for stored ones."""
        if self._tensor is None:
            raise Invalid(f"{self.label} is on the meta device and has no values")
        return self._tensor(name)

    def digest(self, name: str) -> str | None:
        """The digest of a name's values, computed at most once; None where there are no values."""
        if name not in self._digests and self.has_values:
            entry = self.entries[name]
            leaf = Leaf.of(self.tensor(name).detach())
            self._digests[name] = tensor_digest(entry.dtype, entry.shape, leaf.buffer())
        return self._digests.get(name)

    def equals(self, name: str, other: Side, its_name: str) -> bool | None:
        """Whether two names of equal dtype and shape have the same values, bit for bit; None where one has none.

        Digests that are known spare the reading; where neither side has one, the bits are compared.
        """
        if not (self.has_values and other.has_values):
            return None
        if name in self._shards and self._shards[name] == other._shards.get(its_name):
            return True
        if name in self._digests or its_name in other._digests:
            return self.digest(name) == other.digest(its_name)
        return torch.equal(components.bits(self.tensor(name)), components.bits(other.tensor(its_name)))

    @functools.cached_property
    def structure(self) -> str:
        """A digest of names, dtypes and shapes."""
        lines = (f"{entry.name} {entry.dtype} {list(entry.shape)}\n" for entry in self.entries.values())
        return digest_of("".join(sorted(lines)).encode())

    @functools.cached_property
    def content(self) -> str | None:
        """A digest of names and values; None for a live network, which may change at any time."""
        if not self.has_values or (self.module is not None and self.checkpoint is None):
            return None
        return digest_of("".join(f"{name} {self.digest(name)}\n" for name in sorted(self.entries)).encode())

    @functools.cached_property
    def network(self) -> nn.Module | None:
        """The live network, or the one that a checkpoint's registered builder makes, without values."""
        if self.module is not None or self.checkpoint is None:
            return self.module
        from registry.live import builders

        about = self.checkpoint.provenance
        if "builder" not in about:
            return None
        try:
            make = builders.builder(about["builder"])
            return on_meta(lambda: make.build(about.get("network")))
        except RegistryError:  # its builder is not known here, or takes another configuration by now
            return None

    @property
    def config(self) -> Mapping[str, Any]:
        return (self.checkpoint.config if self.checkpoint else components_config(self.module)) or {}

    @property
    def metrics(self) -> Mapping[str, float]:
        return dict(self.checkpoint.metrics) if self.checkpoint else {}


def components_config(module: nn.Module | None) -> dict[str, Any] | None:
    """The configuration of a live network, if it has one."""
    from registry.live.builders import config_of

    return config_of(module) if module is not None else None


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
        stored = side_of(source[1], registry, component=component)
        kinds = _live(source[0]).entries
        entries = [
            entry._replace(kind=kinds[name].kind) if name in kinds else entry
            for name, entry in stored.entries.items()
        ]
        return Side(
            stored.label,
            entries,
            stored.tensor,
            module=source[0],
            checkpoint=stored.checkpoint,
            digests=stored._digests,
            metadata=stored.metadata,
            notes=stored.notes,
        )
    if isinstance(source, Mapping):
        return _tree(STATE_DICT, source)
    if isinstance(source, os.PathLike):
        return _file(Path(source), component)
    if not isinstance(source, str):
        raise Invalid(
            f"a {type(source).__qualname__} is nothing to compare or load; give a reference, a file, "
            "torchvision:NAME, or a network"
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


def _built(name: str) -> Side | None:
    """A network that is registered under a name, as it would be built; on the meta device, without values."""
    from registry.live import builders

    if name not in builders.names():
        return None
    side = _live(on_meta(lambda: builders.builder(name).build(None)))
    side.label = name
    return side


def _stored(home: Home, reference: str, component: str) -> Side:
    checkpoint = Checkpoint.named(home, reference)
    if component not in checkpoint.components:
        raise components.missing(component, checkpoint.name, checkpoint.components)
    manifest = home.store.manifest(checkpoint.id)
    buffers = set(checkpoint.provenance.get("buffers", {}).get(component, ()))
    known = "buffers" in checkpoint.provenance
    entries, digests = [], {}
    shards = {}
    for path, info, parts in manifest.entries({component: manifest.components[component]}):
        name = path.partition("/")[2]
        kind = ("buffer" if name in buffers else "parameter") if known else None
        entries.append(Entry(name, info.dtype, info.shape, kind, parts))
        if parts[0][0] is None:
            digests[name] = info.digest
        else:  # the digest of the values would need them
            shards[name] = info.digest
    if not entries:
        raise Invalid(f"{checkpoint.name} holds no tensors in {component}")

    @functools.cache
    def loaded() -> dict[str, torch.Tensor]:
        return _flat(checkpoint.load(component)[component])

    return Side(
        *(checkpoint.name, entries, lambda name: loaded()[name]),
        checkpoint=checkpoint,
        digests=digests,
        shards=shards,
    )


def _file(path: Path, component: str) -> Side:
    imported = read_checkpoint_file(path)
    if component not in imported.components:
        found = ", ".join(imported.components)
        raise NotFound(f"{path}: has no component {quoted(component)}; it has {found}")
    side = _tree(printable(str(path)), imported.components[component])
    layout = imported.source.get("layout", {})
    used = [key for key, part, *_ in layout.get("keys", []) if part == component]
    others = [name for name in imported.components if name != component]
    if used:
        rest = f"; also there: {', '.join(others)}" if others else ""
        side.notes = (f"{path.name}: the weights are under the key {quoted(str(used[0]))}{rest}",)
    return side


def _tree(label: str, tree: Any) -> Side:
    tensors = _flat(tree)
    if not tensors:
        raise Invalid(f"{label} holds no tensors")
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    return Side(label, entries, tensors.__getitem__, metadata=getattr(tree, "_metadata", None))


def _flat(tree: Any) -> dict[str, torch.Tensor]:
    """Tensors of a state dict by name; of a nested one by path."""
    return {path.partition("/")[2] or path: t for path, t in tensor_paths({"": tree}).items()}


def _live(module: nn.Module) -> Side:
    plain = components.plain_module(module)
    state = components.live_state(module)
    own = _own_tensors(plain)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    entries = [_live_entry(name, tensor) for name, tensor in tensors.items()]
    if not entries:
        raise Invalid(f"{type(plain).__qualname__} has no parameters")
    on_meta = any(tensor.is_meta for tensor in tensors.values())
    return Side(
        type(plain).__qualname__,
        entries,
        None if on_meta else tensors.__getitem__,
        module=plain,
        metadata=getattr(state, "_metadata", None),
        derived=[name for name, tensor in tensors.items() if id(tensor) not in own],
    )


def _own_tensors(module: nn.Module) -> set[int]:
    """Ids of the parameters and buffers of a network.

    Raises:
        Unsupported: if it is sharded by FSDP.
    """
    found: set[int] = set()
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise Unsupported("the network is sharded by FSDP; transfer and freeze before wrapping it")
        found.update(map(id, part._parameters.values()))
        found.update(map(id, part._buffers.values()))
    return found


def _live_entry(name: str, tensor: torch.Tensor) -> Entry:
    if is_lazy(tensor):
        raise Unsupported(f"{name} is not initialised yet; run one batch through the network first")
    is_parameter = isinstance(tensor, nn.Parameter)
    if (not is_parameter and type(tensor) is not torch.Tensor) or hasattr(tensor, "device_mesh"):
        raise Unsupported(
            f"{name} is a {type(tensor).__qualname__}; transfer and freeze before the network is sharded"
        )
    kind = "parameter" if is_parameter else "buffer"
    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), kind, id(tensor))


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else id(tensor)
    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), None, where)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network without memory for its parameters, however large it is."""
    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:  # its constructor computes with tensors, as RegNet's does
        with _EmptyOnMeta():
            return make()


class _EmptyOnMeta(TorchFunctionMode):
    """Puts memory that is not initialised, as layers ask for, on the meta device, and nothing else."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is torch.empty:
            given["device"] = "meta"
        return function(*args, **given)


def torchvision_name(source: str) -> str:
    """The network that `torchvision:NAME` names.

    Raises:
        NotFound: suggesting the nearest.
    """
    import torchvision

    name, known = source.removeprefix(TORCHVISION), torchvision.models.list_models()
    if name.lower() not in known:  # as torchvision itself looks them up
        near = difflib.get_close_matches(name, known, 1)
        raise NotFound(
            f"torchvision has no model {quoted(name)}{f'; did you mean {near[0]}?' if near else ''}"
        )
    return name


def _torchvision(source: str) -> Side:
    import torchvision

    name = torchvision_name(source)
    side = _live(on_meta(lambda: torchvision.models.get_model(name, weights=None)))
    side.label = source
    return side


__all__ = ["Entry", "Side", "Source", "side_of"]
