"""Refusing a record that contradicts those before it."""

from __future__ import annotations

from registry.store.errors import RegistryError


class Refused(RegistryError):
    """A record contradicts what was recorded before it. Never reaches users as it is."""


def refuse_if(wrong: bool, problem: str) -> None:
    """Refuse a record that contradicts what was recorded before it.

    Raises:
        Refused: if it does.
    """
    if wrong:
        raise Refused(problem)
