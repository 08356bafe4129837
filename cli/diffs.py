"""Comparing: diff, compare."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from registry.cli.completing import completes, metrics
from registry.cli.options import ReferenceType, command, registry_if_any
from registry.cli.output import complain_of, encodable, print_json, say, warn, width_of_terminal
from registry.cli.tables import columns_of, print_table
from registry.reports import html, markdown, text
from registry.store.durable import write_file
from registry.store.errors import RegistryError
from registry.transfer import curves

if TYPE_CHECKING:
    from registry.registry import Registry
    from registry.reports.blocks import Block
    from registry.transfer.report import DiffReport


@command(
    "diff",
    "registry diff lenet5@best lenet6 --values\nregistry diff a.safetensors b.pt --format html -o diff.html",
)
@click.argument("a", type=ReferenceType())
@click.argument("b", type=ReferenceType())
@click.option("--values", is_flag=True, help="Also measure how far the tensors moved.")
@click.option("--tensors", "is_deep", is_flag=True, help="Show each tensor below its module.")
@click.option(
    "--rename", "rules", multiple=True, metavar="OLD=NEW", help="Rename tensors of A: 'backbone.*=*'."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out tensors whose names match.")
@click.option("--plan", "file", type=click.Path(), metavar="FILE", help="Also show a plan from A to B.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "md", "html"]),
    default="text",
    show_default=True,
    help="The form of the report.",
)
@click.option("--output", "-o", type=click.Path(), metavar="FILE", help="Write to a file.")
@click.option("--open", "opens", is_flag=True, help="Open the HTML report in the browser.")
def diff(
    a: str,
    b: str,
    values: bool,
    is_deep: bool,
    rules: tuple[str, ...],
    exclude: tuple[str, ...],
    file: str | None,
    form: Literal["text", "json", "md", "html"],
    output: str | None,
    opens: bool,
    root: str | None,
    as_json: bool,
) -> int:
    """Compare two models' tensors by name, shape and value.

    A and B are each a reference, a file, torchvision:NAME, or the name of a network. The exit status is 0 if they are
    identical, 1 if they differ, and 2 if one cannot be read.
    """
    # Lazy: loads torch.
    from registry.transfer.diffing import diff as report_of
    from registry.transfer.plan import TransferPlan

    try:
        plan = TransferPlan.load(file) if file else None
        report = report_of(
            a, b, registry=registry_if_any(root), values=values, rename=rules, exclude=exclude, plan=plan
        )
        if file:
            report = report.model_copy(update={"command": f"{report.command} {shlex.join(['--plan', file])}"})
        if opens:
            _open(html.render(report.blocks()), output)
        else:
            width = None if output else width_of_terminal()
            _write(_rendered(report, "json" if as_json else form, is_deep=is_deep, width=width), output)
    except RegistryError as error:
        complain_of(error)
        return 2
    return 0 if report.is_same else 1


def _rendered(report: DiffReport, form: str, *, is_deep: bool, width: int | None) -> str:
    """A report as text, Markdown, HTML or JSON.

    Args:
        width: that of the terminal, if the text goes to one.
    """
    if form == "json":
        return report.model_dump_json(by_alias=True, indent=2) + "\n"
    return _drawn(report.blocks(is_deep=is_deep), form, width)


def _drawn(blocks: Sequence[Block], form: str, width: int | None = None) -> str:
    """Blocks in one of the forms that `--format` takes."""
    if form == "md":
        return markdown.render(blocks)
    return html.render(blocks) if form == "html" else text.render(blocks, width) + "\n"


@command(
    "compare",
    "registry compare lenet6-scratch lenet6-finetuned --at 1,5,10\n"
    "registry compare lenet5/run-1 lenet5/run-2 --metric loss\n"
    "registry compare lenet5 lenet6 --format html -o compare.html",
)
@click.argument("models", nargs=-1, required=True, type=ReferenceType(), metavar="MODEL...")
@click.option(
    "--metric",
    shell_complete=completes(metrics),
    help="A metric, or loss. [default: what most of their runs follow]",
)
@click.option("--at", "epochs", metavar="EPOCHS", help="Only these epochs, such as 1,5,10.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "md", "html"]),
    default="text",
    show_default=True,
    help="The form of the report.",
)
@click.option("--output", "-o", type=click.Path(), metavar="FILE", help="Write to a file.")
def compare(
    models: tuple[str, ...],
    metric: str | None,
    epochs: str | None,
    form: str,
    output: str | None,
    registry: Registry,
    as_json: bool,
) -> None:
    """Compare a metric of models, runs or versions by epoch.

    Each MODEL is the name of a model (all its versions), the name of a run such as lenet5/run-2, or a reference (one
    version).
    """
    at = _epochs(epochs)
    metric = metric or registry.runs.headline(curves.models_of(registry, models)) or "loss"
    found = curves.curves(registry, models, metric)
    if as_json:
        chosen = {
            curve.name: {epoch: value for epoch, value in curve.values.items() if not at or epoch in at}
            for curve in found
        }
        print_json({"metric": metric, "models": chosen})
    elif form == "text" and output is None:
        columns, rows = curves.table(found, at)
        print_table(columns_of(columns), rows)
    else:
        _write(_drawn(curves.blocks(found, metric, at), form), output)


def _epochs(text: str | None) -> list[int]:
    """Read epochs such as 1,5,10.

    Raises:
        click.BadParameter: for anything else.
    """
    try:
        return [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of epochs such as 1,5,10", param_hint="--at"
        ) from None


def _open(page: str, output: str | None) -> None:
    """Write a page, to a file of its own unless one is given, and open it in the browser."""
    # Lazy: start-up.
    import tempfile
    import webbrowser

    path = Path(output or Path(tempfile.mkdtemp(prefix="registry-diff-"), "diff.html"))
    write_file(path, page.encode())
    if not webbrowser.open(path.absolute().as_uri()):
        warn("no browser could be opened; open the file yourself")
    say(f"wrote {path}")


def _write(text: str, output: str | None) -> None:
    """Print a text, or write it to a file."""
    if output is None:
        click.echo(encodable(text), nl=False)
        return
    write_file(Path(output), text.encode())
    say(f"wrote {output}")
