"""Results: what a cached function returns, as a tree that the store keeps, and back.

Long lists of strings, numbers or tensors become a few tensors, so that a million strings are neither a million nodes in
a manifest nor a million objects to hash.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel
from torch.utils.data import TensorDataset

from registry.store.errors import Conflict, Corrupt, NotFound, Unsupported
from registry.store.text import quoted

_LONG = 16
"""Items from which on a list becomes a few tensors."""

_SEPARATORS = ("\n", "\0", "\x1f", "\u241e")
"""What may stand between joined strings; the first that none of them holds is taken."""

_INT64 = range(-(2**63), 2**63)
Class = TypeVar("Class", bound=type)

_classes: dict[str, type] = {}


def register_result(cls: Class) -> Class:
    """Let a dataclass or a pydantic model be (a part of) what cached functions return; usable as a decorator.

    It is stored field by field under its qualified name, and made again by its own constructor (a pydantic model is
    validated). Nothing that a stored file names is imported: the program that reads must have registered it as well.

    Raises:
        Unsupported: if it is neither.
        Conflict: if another class of the same qualified name is registered.
    """
    if not (dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel)):
        raise Unsupported(f"{cls.__qualname__} is neither a dataclass nor a pydantic model")
    name = f"{cls.__module__}.{cls.__qualname__}"
    known = _classes.get(name)
    if known is not None and _fields(known) != _fields(cls):
        raise Conflict(f"another class {name} with other fields is registered already")
    _classes[name] = cls
    return cls


def pack(value: Any, path: str = "the result") -> Any:
    """Turn a result into a tree that the store can hold.

    Args:
        path: what to call the result in an error.

    Raises:
        Unsupported: naming the part that cannot be stored, and what to return instead.
    """
    kind = type(value)
    if kind in (list, tuple):
        return _pack_list(value, kind.__name__, path)
    if kind is dict:
        return _pack_dict(value, path)
    if kind is TensorDataset:
        return {"$dataset": [pack(t, f"{path}.tensors[{i}]") for i, t in enumerate(value.tensors)]}
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _classes:
        fields = {field: pack(getattr(value, field), f"{path}.{field}") for field in _fields(kind)}
        return {"$object": name, "fields": fields}
    if dataclasses.is_dataclass(kind) or isinstance(value, BaseModel):
        raise Unsupported(f"{path} is a {kind.__qualname__}", "register it: @register_result above the class")
    if kind in _REFUSED or isinstance(value, torch.utils.data.Dataset):
        raise Unsupported(
            f"{path} is a {kind.__qualname__}", _REFUSED.get(kind, "return its tensors instead")
        )
    # The store takes its own kinds of trees, and refuses the rest by path and type.
    return value


def unpack(tree: Any) -> Any:
    """What `pack` was given; tensors are views of the tree's own.

    Raises:
        NotFound: if a class is not registered.
        Corrupt: if the tree is malformed.
    """
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(map(unpack, tree))
    if type(tree) is not dict:
        return tree
    tag = next(iter(tree), None)
    if not isinstance(tag, str) or not tag.startswith("$"):
        return {key: unpack(item) for key, item in tree.items()}
    try:
        return _UNPACKERS[tag](tree)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise Corrupt(f"a cached result is malformed at {quoted(tag)}: {error}") from None


def _fields(cls: type) -> list[str]:
    if issubclass(cls, BaseModel):
        return list(cls.model_fields)
    return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


_REFUSED: dict[type, str] = {
    set: "return a sorted list instead",
    frozenset: "return a sorted list instead",
    range: "return a list instead",
    map: "return a list instead",
    filter: "return a list instead",
    zip: "return a list instead",
    type(_ for _ in ()): "return a list instead",
}


def _pack_list(value: Sequence[Any], kind: str, path: str) -> Any:
    if len(value) >= _LONG and len(types := set(map(type, value))) == 1:
        (only,) = types
        found = _PACKERS[only](value) if only in _PACKERS else None
        if found is not None:
            return {**found, "kind": kind, "count": len(value)}
    items = [pack(item, f"{path}[{i}]") for i, item in enumerate(value)]
    return items if kind == "list" else tuple(items)


def _pack_strings(value: Sequence[str]) -> dict[str, Any] | None:
    for separator in _SEPARATORS:
        text = separator.join(value)
        if text.count(separator) == len(value) - 1:
            data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
            return {"$strings": data, "separator": separator}
    return None


def _pack_ints(value: Sequence[int]) -> dict[str, Any] | None:
    return {"$numbers": np.array(value, np.int64)} if min(value) in _INT64 and max(value) in _INT64 else None


def _pack_tensors(value: Sequence[torch.Tensor]) -> dict[str, Any] | None:
    """Small tensors of one dtype in one row, and their shapes."""
    first = value[0]
    alike = all(
        t.dtype is first.dtype
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not t.requires_grad
        for t in value
    )
    if not alike or first.is_quantized or sum(t.numel() for t in value) > len(value) << 16:
        return None
    return _row([t.shape for t in value], torch.cat([t.reshape(-1) for t in value]))


def _pack_arrays(value: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any] | None:
    first = value[0]
    if first.dtype.kind not in "biufc" or any(a.dtype != first.dtype for a in value):
        return None
    if sum(a.size for a in value) > len(value) << 16:
        return None
    found = _row([a.shape for a in value], np.concatenate([a.reshape(-1) for a in value]))
    return {"$arrays": found.pop("$tensors"), **found}


def _row(shapes: Sequence[Sequence[int]], row: Any) -> dict[str, Any]:
    """The elements of several tensors in a row, with the shape that all have, or the rank and the sizes of each."""
    if len(set(shapes)) == 1:
        return {"$tensors": row, "shape": list(shapes[0])}
    ranks = np.array([len(shape) for shape in shapes], np.int64)
    return {
        "$tensors": row,
        "ranks": ranks,
        "sizes": np.array([s for shape in shapes for s in shape], np.int64),
    }


_PACKERS: dict[type, Callable[[Any], dict[str, Any] | None]] = {
    str: _pack_strings,
    int: _pack_ints,
    float: lambda value: {"$numbers": np.array(value, np.float64)},
    bool: lambda value: {"$numbers": np.array(value, np.bool_)},
    torch.Tensor: _pack_tensors,
    np.ndarray: _pack_arrays,
}


def _pack_dict(value: Mapping[Any, Any], path: str) -> Any:
    plain = len(value) < _LONG and not any(isinstance(key, str) and key.startswith("$") for key in value)
    if plain:
        return {key: pack(item, f"{path}[{key!r}]") for key, item in value.items()}
    keys = _pack_list(list(value), "list", f"the keys of {path}")
    values = list(value.values())
    if len(values) >= _LONG and type(values[0]) in _PACKERS and len(set(map(type, values))) == 1:
        packed = _pack_list(values, "list", path)
    else:
        packed = [pack(item, f"{path}[{key!r}]") for key, item in value.items()]
    return {"$dict": [keys, packed]}


def _list(items: Sequence[Any], tree: Mapping[str, Any]) -> Any:
    """The items as the list or tuple that was packed."""
    if len(items) != tree["count"]:
        raise ValueError(f"{len(items)} items instead of {tree['count']}")
    return list(items) if tree["kind"] == "list" else tuple(items)


def _unpack_strings(tree: Mapping[str, Any]) -> Any:
    text = tree["$strings"].tobytes().decode("utf-8", "surrogatepass")
    return _list(text.split(tree["separator"]), tree)


def _unpack_tensors(tree: Mapping[str, Any]) -> Any:
    row = tree["$tensors"]
    if "shape" in tree:
        return _list(row.reshape(tree["count"], *tree["shape"]).unbind(0), tree)
    shapes = _shapes(tree)
    parts = row.split([math.prod(shape) for shape in shapes])
    if all(len(shape) == 1 for shape in shapes):
        return _list(parts, tree)
    return _list([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], tree)


def _unpack_arrays(tree: Mapping[str, Any]) -> Any:
    row = tree["$arrays"]
    if tree.get("shape"):
        return _list(list(row.reshape(tree["count"], *tree["shape"])), tree)
    shapes = _shapes(tree) if "ranks" in tree else [()] * tree["count"]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return _list([part.reshape(s) for part, s in zip(np.split(row, ends), shapes, strict=True)], tree)


def _shapes(tree: Mapping[str, Any]) -> list[tuple[int, ...]]:
    ranks, sizes = tree["ranks"], tree["sizes"].tolist()
    if len(ranks) and (ranks == ranks[0]).all():
        rank = int(ranks[0])
        return list(zip(*(sizes[i::rank] for i in range(rank)), strict=True)) if rank else [()] * len(ranks)
    following = iter(sizes)
    return [tuple(next(following) for _ in range(rank)) for rank in ranks.tolist()]


def _unpack_dict(tree: Mapping[str, Any]) -> Any:
    keys, values = map(unpack, tree["$dict"])
    return dict(zip(keys, values, strict=True))


def _unpack_object(tree: Mapping[str, Any]) -> Any:
    cls = _classes.get(tree["$object"])
    if cls is None:
        raise NotFound(f"the class {tree['$object']} is not registered", "put @register_result above it")
    return cls(**unpack(tree["fields"]))


_UNPACKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "$strings": _unpack_strings,
    "$numbers": lambda tree: _list(tree["$numbers"].tolist(), tree),
    "$tensors": _unpack_tensors,
    "$arrays": _unpack_arrays,
    "$dataset": lambda tree: TensorDataset(*map(unpack, tree["$dataset"])),
    "$dict": _unpack_dict,
    "$object": _unpack_object,
}
