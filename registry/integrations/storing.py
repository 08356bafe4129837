"""Storing: what frameworks hand over may hold any object, which must not end a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from registry.configs.plain import plain_table
from registry.store.errors import Invalid, Unsupported
from registry.store.tree import encode

_logger = logging.getLogger(__name__)


def recordable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as plain values; any other object becomes the name of its class, and the log names it.

    >>> recordable({"width": 8, "activation": print})
    {'width': 8, 'activation': 'builtin_function_or_method'}
    """
    odd: dict[str, str] = {}
    found = _converted(table, lambda item: plain_table(item, "config"), odd, named=True)
    if odd:
        _logger.warning("hyperparameters recorded by the name of their class alone: %s", ", ".join(odd))
    return found


def storable(table: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the objects that cannot be stored, in tables of it too; the log names what is left out."""

    def checked(item: dict[Any, Any]) -> dict[Any, Any]:
        encode({"state": item})
        return item

    odd: dict[str, str] = {}
    found = _converted(table, checked, odd, named=False)
    if odd:
        left_out = ", ".join(f"{path} (a {kind})" for path, kind in odd.items())
        _logger.warning("not saved, as it cannot be stored: %s", left_out)
    return found


def _converted(
    table: Mapping[Any, Any],
    convert: Callable[[dict[Any, Any]], dict[Any, Any]],
    odd: dict[str, str],
    *,
    named: bool,
    path: str = "",
) -> dict[Any, Any]:
    """A table whose items are converted one by one.

    Args:
        convert: takes a table of one item, and refuses one that it cannot take.
        odd: gets the paths and classes of what was refused.
        named: whether the name of its class stands for what was refused; otherwise it is left out.
    """
    found: dict[Any, Any] = {}
    for key, value in table.items():
        place = f"{path}{key}"
        try:
            found |= convert({key: value})
        except (Invalid, Unsupported):
            if isinstance(value, Mapping):
                found[key] = _converted(value, convert, odd, named=named, path=f"{place}.")
                continue
            odd[place] = type(value).__qualname__
            if named:
                found[str(key)] = odd[place]
    return found
