"""Plain values: what hyperparameters are recorded as, whatever objects a program keeps them in."""

from __future__ import annotations

import collections
import dataclasses
import enum
import os
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from registry.store.errors import Invalid
from registry.store.text import quoted

_DEEPEST = 20
"""Levels of a framework's values that are taken apart."""

_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def plain_table(values: Any, what: str) -> dict[str, Any]:
    """A table of plain values: texts, numbers, True, False, None, lists and tables of these.

    A path, device, dtype, enum, scalar of NumPy or torch, dataclass, `argparse.Namespace` or pydantic model becomes the
    plain value that it stands for.

    Args:
        values: a mapping, or one of the objects that stand for one.
        what: what to call it in an error, such as `config`.

    Raises:
        Invalid: if a key or a value is something else, naming the first such key.
    """
    try:
        found = _plain(values, what)
    except RecursionError:
        raise Invalid(f"{what} is nested too deep, or holds itself") from None
    if not isinstance(found, dict):
        raise Invalid(f"{what} must be a table of names and values, not {type(values).__qualname__}")
    return found


def lenient_table(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """A table of plain values, and the names of those that became text because nothing else stands for them.

    It takes whatever a framework hands over, and refuses nothing. A set becomes a sorted list.

    >>> lenient_table({"targets": {"v", "q"}, "rate": 0.1, "loss": ...})
    ({'targets': ['q', 'v'], 'rate': 0.1, 'loss': 'Ellipsis'}, ['loss'])
    """
    as_text: list[str] = []
    return {
        str(key).lstrip("$"): _lenient(value, str(key), as_text) for key, value in values.items()
    }, as_text


def _lenient(value: Any, path: str, as_text: list[str], depth: int = 0) -> Any:
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {
                str(key).lstrip("$"): _lenient(item, f"{path}.{key}", as_text, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, set | frozenset):
            value = sorted(value, key=repr)
        if isinstance(value, list | tuple):
            return [_lenient(item, f"{path}[{i}]", as_text, depth + 1) for i, item in enumerate(value)]
        if (fields := _fields(value)) is not None:
            return _lenient(fields, path, as_text, depth + 1)
    try:
        return _plain(value, path)
    except (Invalid, RecursionError):
        as_text.append(path)
        # Such a thing tells people how it is at the moment, which would make each run another one, too.
        if hasattr(type(value), "_repr_mimebundle_"):
            return f"<{type(value).__qualname__}>"
        # Addresses would make each run another one.
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _plain(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, str, int, float):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, path)
    kind = type(value)
    if kind.__module__.partition(".")[0] in ("numpy", "torch"):
        return _of_library(value, path)
    for base, convert in _BASES:
        if isinstance(value, base):
            return convert(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(os.fspath(value))
    if isinstance(value, Mapping):
        found = {_key(key, path): _plain(item, f"{path}.{key}") for key, item in value.items()}
        if len(found) < len(value):
            raise Invalid(f"{quoted(path)} has two keys that are recorded as the same text", "rename one")
        return found
    if isinstance(value, list | tuple | collections.deque):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if (fields := _fields(value)) is not None:
        return _plain(fields, path)
    order = "; it has no order, give sorted(...)" if isinstance(value, set | frozenset) else ""
    raise Invalid(
        f"{quoted(path)} is a {kind.__qualname__}, which cannot be recorded", f"give plain values{order}"
    )


def _fields(value: Any) -> Any:
    """What a dataclass, a model of pydantic or a namespace holds, by name; None for anything else."""
    kind = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    # Of argparse only the name is known here: most programs need not load it.
    is_namespace = (kind.__module__, kind.__name__) == ("argparse", "Namespace")
    return vars(value) if is_namespace or isinstance(value, types.SimpleNamespace) else None


def _key(key: Any, path: str) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if not isinstance(key, str):
        raise Invalid(f"{quoted(path)} has the key {quoted(repr(key))}", "keys must be texts, give str(key)")
    if key.startswith("$"):
        raise Invalid(f"{quoted(path)} has the key {quoted(key)}; a key cannot begin with '$'")
    return str.__str__(key)


def _of_library(value: Any, path: str) -> Any:
    """A value of NumPy or torch: a scalar's number, and the name of a device or dtype."""
    kind = type(value)
    if isinstance(value, str):
        return str.__str__(value)
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        item = value.item()
        if type(item) in (bool, str, int, float):
            return item
    if kind.__name__ in ("device", "dtype", "layout", "memory_format") or kind.__name__.endswith("DType"):
        return str(value)
    if kind.__qualname__ == "Size":
        return [int(size) for size in value]
    raise Invalid(
        f"{quoted(path)} is a {kind.__qualname__}, which cannot be recorded",
        "give plain values, such as .tolist()",
    )
