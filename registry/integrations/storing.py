"""Storing: what frameworks hand over may hold any object, which must not end a training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from registry.configs.plain import lenient_table
from registry.store.errors import Invalid, Unsupported
from registry.store.tree import encode

_logger = logging.getLogger(__name__)


def recordable(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Hyperparameters as plain values; the log names those that became text, as nothing else stands for them.

    >>> recordable({"width": 8, "classes": {0: "cat"}, "activation": print})
    {'width': 8, 'classes': {'0': 'cat'}, 'activation': '<built-in function print>'}
    """
    found, as_text = lenient_table(table)
    if as_text:
        _logger.warning("hyperparameters recorded as text: %s", ", ".join(as_text))
    return found


def storable(table: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the objects that cannot be stored, in tables of it too; the log names what is left out."""
    odd: dict[str, str] = {}
    found = _stored(table, odd)
    if odd:
        left_out = ", ".join(f"{path} (a {kind})" for path, kind in odd.items())
        _logger.warning("not saved, as it cannot be stored: %s", left_out)
    return found


def _stored(table: Mapping[Any, Any], odd: dict[str, str], path: str = "") -> dict[Any, Any]:
    """The items of a table that can be stored.

    Args:
        odd: gets the paths and classes of the others.
    """
    found: dict[Any, Any] = {}
    for key, value in table.items():
        try:
            encode({"state": {key: value}})
            found[key] = value
        except (Invalid, Unsupported):
            if isinstance(value, Mapping):
                found[key] = _stored(value, odd, path=f"{path}{key}.")
            else:
                odd[f"{path}{key}"] = type(value).__qualname__
    return found
