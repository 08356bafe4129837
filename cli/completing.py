"""What the shell completes beside commands and options: names from the catalog, and networks of installed packages."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from registry.registry import Registry

NETWORKS = "registry.models"
"""The group of entry points by which packages name their networks; see `registry.live.builders`."""

Names = Callable[["Registry", click.Context], Iterable[str]]
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completes(*sources: Names) -> Complete:
    """A function for `shell_complete`, which offers names that begin with the typed text; none if they cannot be read."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # Lazy: start-up.
        from registry.registry import Registry

        found: dict[str, None] = {}
        # A shell that completes must not print errors.
        with contextlib.suppress(Exception):
            root = ctx.params.get("root") or ctx.find_root().params.get("root")
            registry = Registry(root, create=False)
            for names in sources:
                found |= dict.fromkeys(names(registry, ctx))
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def metrics(registry: Registry, ctx: click.Context) -> list[str]:
    """The metrics of the model on the command line, or of all, and `loss`."""
    # Lazy: start-up.
    from registry.catalog.versions import metric_names
    from registry.log.metrics import called

    # An option without its value leaves the arguments as they were typed.
    model = re.split("[:@/]", ctx.args[0])[0] if ctx.args else None
    return [*map(called, metric_names(registry.catalog, model)), "loss"]


def tags(registry: Registry, ctx: click.Context) -> list[str]:
    """The tags that versions have."""
    # Lazy: start-up.
    from registry.catalog.versions import tag_names

    return tag_names(registry.catalog)


def runs(registry: Registry, ctx: click.Context) -> list[str]:
    """The names of runs, the newest first."""
    return list(registry.runs)


def components(registry: Registry, ctx: click.Context) -> list[str]:
    """The components of the version on the command line."""
    return list(registry.resolve(ctx.args[0]).record["components"])


def networks(registry: Registry, ctx: click.Context) -> list[str]:
    """The networks of installed packages, which are not loaded."""
    # Lazy: start-up.
    from importlib.metadata import entry_points

    return sorted(entry.name for entry in entry_points(group=NETWORKS))


def data_sets(registry: Registry, ctx: click.Context) -> list[str]:
    """The names that `--data` takes."""
    return ["digits", "fashion-mnist", "mnist", "cifar10", "folder"]
