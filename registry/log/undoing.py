"""Undoing: changes of dicts in memory that can be taken back together."""

from __future__ import annotations

from typing import Any

_MISSING: Any = object()


class Undo:
    """Changes dicts, and knows what they held before."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[Any, Any], Any, Any]] = []

    def begin(self) -> None:
        """Keep the changes so far: `take_back` undoes only later ones."""
        self._before.clear()

    def set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Set the value under a key."""
        self._before.append((table, key, table.get(key, _MISSING)))
        table[key] = value

    def drop(self, table: dict[Any, Any], key: Any) -> None:
        """Take a key away, if it is there."""
        self._before.append((table, key, table.get(key, _MISSING)))
        table.pop(key, None)

    def set_unless_empty(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Set the value under a key; an empty one takes the key away."""
        if value:
            self.set(table, key, value)
        else:
            self.drop(table, key)

    def take_back(self) -> None:
        """Undo the changes since `begin`, the last one first."""
        for table, key, value in reversed(self._before):
            if value is _MISSING:
                table.pop(key, None)
            else:
                table[key] = value
