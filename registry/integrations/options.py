"""Options: what users give an integration beside what its framework hands over, checked before the training begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from registry.registry import Registry
from registry.store.errors import Invalid
from registry.store.text import quoted


def registry_of(given: Registry | None) -> Registry:
    """The registry that a user gave, or the default one.

    Raises:
        Invalid: if it is something else, such as a path.
    """
    if given is not None and not isinstance(given, Registry):
        raise Invalid(f"registry is {quoted(str(given))}, expected a Registry, such as Registry('models')")
    return given or Registry()


def check_options(options: Mapping[str, Any], *, own: frozenset[str]) -> None:
    """See that options are such as `Registry.run` takes.

    Args:
        own: those that the integration gives itself.

    Raises:
        Invalid: naming one that is none.
    """
    known = set(inspect.signature(Registry.run).parameters) - {"self", *own}
    for name in options:
        if name not in known:
            raise Invalid(f"{name} is no option", f"there are {', '.join(sorted(known))}")
