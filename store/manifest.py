"""Manifests: the document that lists a checkpoint's components, as trees of plain values with tensor positions.

This module reads and writes the JSON and needs no torch; `registry.store.tree` turns the components' documents
into live trees.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from registry.store.digest import digest, is_digest
from registry.store.dtypes import ELEMENT_TYPES, byte_count
from registry.store.errors import Corrupt, NotFound, Unsupported
from registry.store.text import quoted

FORMAT = 1
MAX_SIZE = 256 << 20
_TOO_LARGE = 1 << 63
_TAG_OF_SLOT = ("$tensor", "$array", "$bytes")


class TensorInfo(NamedTuple):
    """What a manifest says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return byte_count(self.dtype, self.shape)


class Listed(NamedTuple):
    """A name of a state tree and the tensor that it stands for.

    Attributes:
        info: of the whole tensor; the digest of one in shards is that of the list of them.
        shards: offsets and position of each part, if it was stored in parts by several processes; else its position
            alone, without offsets.
    """

    path: str
    info: TensorInfo
    shards: tuple[tuple[tuple[int, ...] | None, int], ...]

    @property
    def is_whole(self) -> bool:
        """Whether it was stored as one, and not in shards."""
        return self.shards[0][0] is None


@dataclass(frozen=True)
class Manifest:
    """The components of a checkpoint or artifact, and the record that its owner keeps with them."""

    record: Mapping[str, Any]
    components: Mapping[str, Any]
    tensors: Sequence[TensorInfo]

    @functools.cached_property
    def slots(self) -> Sequence[tuple[str, int]]:
        """The `component/name` path and the position of every tensor; a tied one comes under each name.

        A tensor in shards comes once for each of them.
        """
        return list(slots_of(self.components))

    @functools.cached_property
    def listed(self) -> Sequence[Listed]:
        """Every name, with the tensor that it stands for."""
        return list(self.entries(self.components))

    @functools.cached_property
    def named(self) -> Mapping[str, Listed | None]:
        """What each path stands for; None for a path that stands for several tensors."""
        found: dict[str, Listed | None] = {}
        for one in self.listed:
            other = found.setdefault(one.path, one)
            if other is not None and other.shards != one.shards:
                found[one.path] = None
        return found

    @functools.cached_property
    def contents(self) -> Mapping[str, Mapping[str, int]]:
        """Names, elements and bytes of tensors in each component; a tied tensor counts once."""
        found = {}
        for name, document in self.components.items():
            nodes = list(_references(document))
            slots = {slot for node in nodes for slot in _slots(name, node)}
            kinds = Counter(self.tensors[slot][:2] for slot in slots)
            counts = [
                (times, math.prod(shape), ELEMENT_TYPES[dtype].size)
                for (dtype, shape), times in kinds.items()
            ]
            elements = sum(times * count for times, count, _ in counts)
            size = sum(times * count * width for times, count, width in counts)
            found[name] = {"tensors": len(nodes), "elements": elements, "bytes": size}
        return found

    def entries(self, components: Mapping[str, Any]) -> Iterator[Listed]:
        """The names in some of the components' documents."""
        for path, node in _tensors_of(components):
            if "$shards" in node:
                yield _in_shards(path, node, self.tensors)
            else:
                slot = next(iter(node.values()))
                yield Listed(path, self.tensors[slot], ((None, slot),))

    def render(self) -> bytes:
        """The manifest's bytes.

        Raises:
            Unsupported: if the record holds anything but plain values.
        """
        document = {
            "format": FORMAT,
            "record": record_document(self.record),
            "components": self.components,
            "tensors": self.tensors,
        }
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()

    def reduced(self, names: Collection[str], record: Mapping[str, Any]) -> Manifest:
        """A manifest of some of the components alone, with another record."""
        places: dict[int, int] = {}
        components = {
            name: renumbered(self.components[name], lambda slot: places.setdefault(slot, len(places)))
            for name in names
        }
        return Manifest(record, components, [self.tensors[slot] for slot in places])

    def chosen(self, only: str | Sequence[str] | None) -> Mapping[str, Any]:
        """The components' documents, cut down to what a pattern or several of them name; as they are for None.

        Raises:
            NotFound: if a pattern selects nothing.
        """
        if only is None:
            return self.components
        patterns = [only] if isinstance(only, str) else list(only)
        names = [path for path, _ in self.slots]
        for pattern in patterns:
            if not self.select([pattern]):
                near = difflib.get_close_matches(pattern, [*self.components, *names], n=1, cutoff=0.4)
                hint = f"did you mean {quoted(near[0])}?" if near else ""
                if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    hint = "the items of a list or tuple are selected together, by its own name"
                raise NotFound(f"nothing matches {quoted(pattern)}", hint)
        return self.select(patterns)

    def select(self, patterns: Sequence[str]) -> dict[str, Any]:
        """The components' documents cut down to what the patterns name (see `Store.get`)."""
        try:
            chosen = {name: _select(tree, name, patterns) for name, tree in self.components.items()}
        except RecursionError:
            raise Corrupt("the manifest is nested too deep") from None
        except (ValueError, TypeError) as error:
            raise Corrupt(f"the manifest holds a malformed dict: {error}") from None
        return {name: kept for name, kept in chosen.items() if kept is not _NOTHING}


def parse(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        Corrupt: if it is not one.
        Unsupported: if a newer version of this package wrote it.
    """
    if len(data) > MAX_SIZE:
        raise Corrupt(f"the manifest has {len(data)} bytes; at most {MAX_SIZE} are read")
    try:
        document = json.loads(data)
    except RecursionError:
        raise Corrupt("the manifest is nested too deep") from None
    except ValueError as error:
        raise Corrupt(f"the manifest is not JSON: {error}") from None
    if not isinstance(document, dict) or type(document.get("format")) is not int or document["format"] < 1:
        raise Corrupt("the manifest has no format number")
    if document["format"] > FORMAT:
        raise Unsupported(
            f"the manifest has format {document['format']}, this version reads up to {FORMAT}",
            "upgrade with: pip install -U torch-registry",
        )
    record, components, tensors = (document.get(key) for key in ("record", "components", "tensors"))
    if not isinstance(record, dict) or not isinstance(components, dict) or not isinstance(tensors, list):
        raise Corrupt("the manifest lacks its record, components or tensors")
    try:
        manifest = Manifest(untagged(record), components, [_tensor_info(item) for item in tensors])
    except RecursionError:
        raise Corrupt("the manifest is nested too deep") from None
    for path, node in _tensors_of(components):
        for slot in _slots(path, node):
            if type(slot) is not int or not 0 <= slot < len(tensors):
                raise Corrupt(f"the manifest refers at {quoted(path)} to a tensor that it does not list")
        if "$shards" in node:
            _in_shards(path, node, manifest.tensors)
    return manifest


def record_document(record: Mapping[str, Any]) -> Any:
    """A record as JSON, which has no NaN or infinity.

    Raises:
        Unsupported: if it holds anything but plain values.
    """
    try:
        return _tagged(record, "record")
    except RecursionError:
        raise Unsupported("the record is nested too deep, or holds itself") from None


def _tagged(value: Any, path: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        return [_tagged(item, f"{path}/{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key[:1] != "$" for key in value):
        return {key: _tagged(item, f"{path}/{key}") for key, item in value.items()}
    raise Unsupported(f"{quoted(path)}: a record holds plain values only, not {type(value).__qualname__}")


def untagged(value: Any) -> Any:
    """A record from its JSON."""
    if isinstance(value, list):
        return [untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        try:
            return struct.unpack(">d", bytes.fromhex(value["$float"]))[0]
        except (struct.error, ValueError, TypeError):
            raise Corrupt("the manifest's record holds a malformed number") from None
    return {key: untagged(item) for key, item in value.items()}


def _tensor_info(item: Any) -> TensorInfo:
    if isinstance(item, list) and len(item) == 3:
        dtype, shape, digest = item
        if type(dtype) is str and dtype in ELEMENT_TYPES and is_digest(digest) and _is_shape(shape):
            return TensorInfo(dtype, tuple(shape), digest)
    raise Corrupt(f"the manifest lists a malformed tensor: {quoted(json.dumps(item))}")


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or len(shape) > 64:
        return False
    return all(type(n) is int and 0 <= n < _TOO_LARGE for n in shape)


def slots_of(components: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Path and position of every tensor in components' documents, and of every shard of one."""
    for path, node in _tensors_of(components):
        for slot in _slots(path, node):
            yield path, slot


def _tensors_of(components: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and node of everything in components' documents that refers to tensors."""
    stack = [*components.items()][::-1]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            if _is_reference(node):
                yield path, node
            else:
                stack += reversed([(f"{path}/{key}", child) for key, child in _children(node)])
        elif isinstance(node, list):
            stack += reversed([(f"{path}/{i}", child) for i, child in enumerate(node)])


def _references(document: Any) -> Iterator[dict[str, Any]]:
    """Every node of a document that refers to tensors, in no particular order."""
    stack = [document]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            if _is_reference(node):
                yield node
            elif next(iter(node), "").startswith("$"):
                stack += [child for _, child in _children(node)]
            else:
                stack += node.values()


def _is_reference(node: Mapping[str, Any]) -> bool:
    tag = next(iter(node), "")
    return (tag in _TAG_OF_SLOT and not isinstance(node[tag], str)) or tag == "$shards"


def _slots(path: str, node: Mapping[str, Any]) -> list[int]:
    tag = next(iter(node))
    if tag != "$shards":
        return [node[tag]]
    shape, shards = node.get("shape"), node[tag]
    well_formed = isinstance(shards, list) and len(shards) > 0 and _is_shape(shape)
    if well_formed and all(isinstance(shard, list) and len(shard) == 2 for shard in shards):
        return [slot for _, slot in shards]
    raise Corrupt(f"the manifest holds malformed shards at {quoted(path)}")


def _in_shards(path: str, node: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> Listed:
    """A tensor in shards. They must have one dtype, not overlap, and make up the whole tensor."""
    shape = tuple(node["shape"])
    shards = [(offsets, tensors[slot], slot) for offsets, slot in node["$shards"]]
    dtypes = {info.dtype for _, info, _ in shards}
    fits = len(dtypes) == 1 and all(
        _is_shape(offsets)
        and len(offsets) == len(info.shape) == len(shape)
        and all(o + n <= size for o, n, size in zip(offsets, info.shape, shape, strict=True))
        for offsets, info, _ in shards
    )
    if fits:
        filled = [(offsets, info.shape) for offsets, info, _ in shards if info.elements]
        fits = sum(info.elements for _, info, _ in shards) == math.prod(shape) and _are_apart(filled)
    if not fits:
        raise Corrupt(
            f"the manifest's shards at {quoted(path)} do not make up a tensor of shape {list(shape)}"
        )
    parts = tuple((tuple(offsets), slot) for offsets, _, slot in shards)
    digests = [[offsets, info.digest] for offsets, info, _ in shards]
    dtype = dtypes.pop()
    text = json.dumps([dtype, shape, digests], separators=(",", ":"))
    return Listed(path, TensorInfo(dtype, shape, digest(text.encode())), parts)


def _are_apart(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether no two of some boxes (offsets and sizes) share an element."""
    for i, (offsets, sizes) in enumerate(boxes):
        for other_offsets, other_sizes in boxes[:i]:
            pairs = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            if all(o < p + m and p < o + n for o, n, p, m in pairs):
                return False
    return True


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a node that holds others, whatever its tag."""
    if isinstance(node, list):
        return list(enumerate(node))
    if not isinstance(node, dict):
        return []
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return list(node.items())
    body = node[tag]
    if tag == "$dict" and isinstance(body, list):
        return [tuple(pair) for pair in body if isinstance(pair, list) and len(pair) == 2]
    if tag == "$ordered":
        metadata = [("_metadata", node["metadata"])] if "metadata" in node else []
        return _children(body) + metadata
    return _children(body) if tag in ("$counter", "$tuple") else []


def renumbered(node: Any, number: Callable[[int], int]) -> Any:
    """A document that refers to other positions.

    Args:
        number: gives the new position for an old one; called in the order of use.
    """
    if isinstance(node, list):
        return [renumbered(item, number) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if tag in _TAG_OF_SLOT and not isinstance(node[tag], str):
        return {tag: number(node[tag])}
    if tag == "$shards":
        return {tag: [[offsets, number(slot)] for offsets, slot in node[tag]], "shape": node["shape"]}
    return {key: renumbered(child, number) for key, child in node.items()}


_NOTHING: Any = object()


def _select(node: Any, path: str, patterns: Sequence[str]) -> Any:
    """A document cut down to what the patterns name; `_NOTHING` if they name nothing in it."""
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
        return node
    if not isinstance(node, dict):
        return _NOTHING
    tag = next(iter(node), "")
    if tag == "$dict":
        pairs = [[key, _select(child, f"{path}/{key}", patterns)] for key, child in node[tag]]
        pairs = [pair for pair in pairs if pair[1] is not _NOTHING]
        return {tag: pairs} if pairs else _NOTHING
    if tag in ("$ordered", "$counter"):
        body = _select(node[tag], path, patterns)
        return _NOTHING if body is _NOTHING else {**node, tag: body}
    if tag.startswith("$"):
        return _NOTHING
    kept = {key: _select(child, f"{path}/{key}", patterns) for key, child in node.items()}
    kept = {key: child for key, child in kept.items() if child is not _NOTHING}
    return kept or _NOTHING
