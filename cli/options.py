"""What commands share: the options `--root`, `--json` and `--debug`, references, and `name=value` pairs."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from registry.cli.completing import completes, networks, runs
from registry.cli.output import warn
from registry.cli.tables import TableView
from registry.store.errors import NotFound

if TYPE_CHECKING:
    from registry.registry import Registry

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _set_color(ctx: click.Context, param: click.Parameter, choice: str | None) -> None:
    """Let all output follow an option `--color`, or else the environment variables NO_COLOR and FORCE_COLOR."""
    if choice is not None:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
    if choice in ("always", "never"):
        # What others draw looks there.
        os.environ["FORCE_COLOR" if choice == "always" else "NO_COLOR"] = "1"
    ctx.color = False if os.environ.get("NO_COLOR") else True if os.environ.get("FORCE_COLOR") else None


_COLOR: dict[str, Any] = {
    "type": click.Choice(["auto", "always", "never"]),
    "callback": _set_color,
    "expose_value": False,
    "help": "When to colour what is printed. [default: auto, which heeds NO_COLOR and FORCE_COLOR]",
}

color = click.option("--color", **_COLOR)
"""Declares the option that says when to use colours."""


def command(name: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command whose help ends in an example.

    A parameter `registry` of the function receives the opened registry. A parameter `root` receives the registry's
    folder, `as_json` the option `--json`, and `view` the options of a table.
    """

    def declare(function: Callable[..., Any]) -> click.Command:
        takes = inspect.signature(function).parameters

        @functools.wraps(function)
        def run(root: str | None, debug: bool, **given: Any) -> Any:
            if "registry" in takes:
                given["registry"] = open_registry(root)
            elif "root" in takes:
                given["root"] = _root(root)
            if "view" in takes:
                given["view"] = TableView(given.pop("wide"), given.pop("columns"), given.pop("is_quiet"))
            return function(**given)

        options = [
            click.option("--color", **_COLOR, hidden=True),
            click.option("--debug", is_flag=True, help="Show a traceback when this fails."),
            click.option("--root", metavar="DIR", help="The registry's folder."),
        ]
        if "as_json" in takes:
            options.append(click.option("--json", "as_json", is_flag=True, help="Print one JSON document."))
        if "view" in takes:
            options += _OF_TABLES
        declared = functools.reduce(lambda inner, option: option(inner), options, run)
        made = click.command(name, epilog=example_text(example))(declared)
        common = [option for option in made.params if option.name in ("as_json", "root", "debug")]
        made.params = [option for option in made.params if option not in common] + common
        return made

    return declare


def _words(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Read a list such as `epoch,loss`."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


_OF_TABLES = (
    click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Print the first column alone."),
    click.option("--columns", callback=_words, metavar="A,B", help="Show these columns alone."),
    click.option("--wide", is_flag=True, help="Show all columns, even if they do not fit."),
)
"""Declare the options that say what to show of a table."""


def example_text(example: str) -> str:
    """Format an example for the end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines())


def _root(root: str | None) -> str | None:
    context = click.get_current_context()
    return root or context.find_root().obj


def open_registry(root: str | None = None) -> Registry:
    """Open the registry that the options name. It must exist.

    Raises:
        NotFound: if it does not exist. The message says how to make one.
    """
    # Lazy: start-up.
    from registry.registry import Registry

    registry = Registry(_root(root), create=False)
    if registry.remote is not None:
        share_pending(registry)
    return registry


def share_pending(registry: Registry) -> None:
    """Share what was saved while a shared registry could not be reached, and say what became of it."""
    for copied in registry.outbox.share_if_possible():
        warn(f"{copied.source} is {copied.target} now")
    if waiting := registry.outbox.versions():
        names = f"{waiting[0].name} waits" if len(waiting) == 1 else f"{len(waiting)} versions wait"
        warn(f"{names} to be shared; see registry outbox")


def registry_if_any(root: str | None) -> Registry | None:
    """Open the registry in a folder; None if there is none. Comparing two files needs no registry."""
    # Lazy: start-up.
    from registry.registry import Registry

    try:
        return Registry(root, create=False)
    except NotFound:
        return None


direction = click.option(
    "--smallest/--largest",
    default=None,
    help="Which value is the best. By default the metric's name decides: the smallest loss, error or perplexity, "
    "the largest accuracy, F1 or AUC.",
)
"""Declares the options that say which value of a metric is the best, for the parameter `smallest`."""


renames = click.option(
    "--rename",
    "rules",
    multiple=True,
    metavar="OLD=NEW",
    help="Rename tensors of the source: 'backbone.*=*'.",
)
"""Declares the option for rules of renaming, for the parameter `rules`."""

casts = click.option("--allow-cast", is_flag=True, help="Load tensors of another dtype.")
"""Declares the option that allows a change of dtype, for the parameter `allow_cast`."""


class Group(click.Group):
    """A group of commands that suggests one for a word that is none."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names.

        Raises:
            click.UsageError: if there is none.
        """
        if not ctx.resilient_parsing and args[0][:1] != "-" and self.get_command(ctx, args[0]) is None:
            # Lazy: start-up.
            from registry.cli.suggestions import no_such_command

            raise no_such_command(args[0], self.list_commands(ctx), ctx)
        return super().resolve_command(ctx, args)


class ReferenceType(click.ParamType[str, str]):
    """A reference to a checkpoint. The shell completes it from the catalog."""

    name = "reference"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The references that begin with the typed text; none if the catalog cannot be read."""
        return completes(lambda registry, _: registry.names(incomplete))(ctx, param, incomplete)


class RunType(ReferenceType):
    """A reference, or the name of a run. The shell completes both."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """References, and the names of runs."""
        return completes(lambda registry, _: registry.names(incomplete), runs)(ctx, param, incomplete)


class NetworkType(ReferenceType):
    """A reference, or the name of a network. The shell completes both."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """References, and the networks of installed packages."""
        return completes(lambda registry, _: registry.names(incomplete), networks)(ctx, param, incomplete)


def pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Read repeated `name=value` options.

    Raises:
        click.BadParameter: for an option without an equals sign, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} has no equals sign, as name=value has")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice")
        found[name] = value
    return found


def seconds(ctx: click.Context, param: click.Parameter, text: str) -> float:
    """Read a duration such as 90, 30m, 1h or 14d, as seconds.

    Raises:
        click.BadParameter: for anything else.
    """
    match = re.match(r"(\d+(?:\.\d+)?)([smhd]?)\Z", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a duration such as 0, 30m, 1h or 14d")
    return float(match[1]) * _UNITS[match[2]]


def byte_count(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Read an amount of bytes such as 500MB or 5GB; None for None.

    Raises:
        click.BadParameter: for anything else, and for zero.
    """
    if text is None:
        return None
    match = re.match(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?B|)\Z", text, re.ASCII | re.IGNORECASE)
    found = int(float(match[1]) * _SIZES[match[2].upper()]) if match else 0
    if not found:
        raise click.BadParameter(f"{text!r} is not an amount such as 500MB or 5GB")
    return found
