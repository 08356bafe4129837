"""Configuration files: config show, validate, diff."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.cli.options import Group, ReferenceType, command, example_text, open_registry
from registry.cli.output import print_json, say
from registry.configs.documents import SUFFIXES, assign, differences, flatten, read_document
from registry.store.errors import Invalid, NotFound
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.configs.config import Config


@click.group("config", cls=Group, epilog=example_text("registry config diff lenet5:v1 lenet5:v2"))
def config() -> None:
    """Show, check and compare configurations.

    A configuration is a JSON, YAML or TOML file, or the configuration that a version was saved with.
    """


@command("show", "registry config show configs/lenet5.json --set optimizer.lr=1e-3")
@click.argument("source", type=ReferenceType())
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a value.")
def show(source: str, assignments: tuple[str, ...], root: str | None, as_json: bool) -> None:
    """Print a configuration, one value a line.

    SOURCE is a JSON, YAML or TOML file, or a version.
    """
    document = assign(_document(source, root), assignments)
    if as_json:
        print_json(document)
        return
    for key, value in flatten(document).items():
        say(f"# {key} = {value}")


@command("validate", "registry config validate train.json --class mypackage.configs:TrainConfig")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True), metavar="FILE...")
@click.option(
    "--class", "target", metavar="MODULE:CLASS", help="Your Config class, to check the files against."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a value.")
def validate(files: tuple[str, ...], target: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Check configuration files.

    Each FILE must be well formed and give no key twice. With --class, its values must have the types of your class.
    --class imports your module, as running your program would.
    """
    cls = _config_class(target) if target else None
    checked = []
    for file in files:
        if cls:
            found = cls.from_file(Path(file)).override(*assignments)
            checked.append({"file": file, "class": target, "digest": found.digest()})
        else:
            assign(read_document(Path(file)), assignments)
            checked.append({"file": file, "class": None, "digest": None})
        if not as_json:
            say(f"{file}: valid" + (f"  {found.digest()[:12]}" if cls else ""))
    if as_json:
        print_json({"valid": checked})


@command("diff", "registry config diff configs/a.yaml configs/b.yaml")
@click.argument("left", type=ReferenceType())
@click.argument("right", type=ReferenceType())
def diff(left: str, right: str, root: str | None, as_json: bool) -> None:
    """Compare two configurations, value by value.

    LEFT and RIGHT are each a file or a version.
    """
    found = differences(_document(left, root), _document(right, root))
    if as_json:
        rows = [{"key": d.key, "kind": d.kind, "left": d.left, "right": d.right} for d in found]
        print_json({"left": left, "right": right, "differences": rows})
        return
    for difference in found:
        if difference.kind == "added":
            say(f"+ {difference.key} = {difference.right}")
        elif difference.kind == "removed":
            say(f"- {difference.key} = {difference.left}")
        else:
            say(f"~ {difference.key} = {difference.left} → {difference.right}")
    if not found:
        say("no difference")


for subcommand in (show, validate, diff):
    config.add_command(subcommand)


def _document(source: str, root: str | None) -> Mapping[str, Any]:
    """The configuration in a file, or the one recorded with a version."""
    path = Path(source)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return read_document(path)
    checkpoint = open_registry(root)[source]
    if checkpoint.config is None:
        raise NotFound(f"{checkpoint.name} was saved without a configuration")
    return checkpoint.config


def _config_class(target: str) -> type[Config]:
    """Import the class that `--class` names. Python also looks for its module in the working directory.

    Raises:
        NotFound: if there is no class of that name.
        Invalid: if the text is not MODULE:CLASS, or the class is not derived from `registry.Config`.
    """
    # Lazy: loads pydantic.
    from registry.configs.config import Config

    module, colon, name = target.partition(":")
    if not colon:
        raise Invalid(
            f"--class {quoted(target)}: write it as MODULE:CLASS, such as mypackage.configs:TrainConfig"
        )
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"--class {quoted(target)}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise Invalid(f"--class {quoted(target)} is not a class derived from registry.Config")
    return found
