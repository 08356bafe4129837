"""Does a training script resume exactly: check-resume."""

from __future__ import annotations

import shlex
from typing import Any

import click

from registry.cli.options import command
from registry.cli.output import complain_of, encodable, print_json, warn
from registry.store.errors import RegistryError


@command(
    "check-resume",
    "registry check-resume train.py --at 17\nregistry check-resume train.py --resume-with --resume -- --epochs 3",
)
@click.argument("script", type=click.Path(), metavar="SCRIPT")
@click.argument("arguments", nargs=-1, metavar="[-- ARGS...]")
@click.option(
    "--at",
    type=click.IntRange(1),
    metavar="STEP",
    help="Kill it after this many optimizer steps. [default: two thirds of the training]",
)
@click.option(
    "--resume-with",
    default="",
    metavar="ARGS",
    help="Further arguments for the process that resumes, such as --resume.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Train in N processes, under torchrun.",
)
@click.option("--copy", is_flag=True, help="Begin with a copy of the registry, not with an empty one.")
def check_resume(
    script: str,
    arguments: tuple[str, ...],
    at: int | None,
    resume_with: str,
    processes: int,
    copy: bool,
    root: str | None,
    as_json: bool,
) -> int:
    """Check that a training script resumes bit for bit.

    The script runs in one go, then killed at a step, then resumed in a new process. The command compares batches,
    parameters, buffers, gradients, optimizer states, learning rates and random numbers at each step. It names the first
    that differs, and the usual cause. Your own registry is not touched: the script works in a scratch one.

    The exit status is 0 if all is equal, 1 if something differs, and 2 if the script cannot be checked: it does not
    repeat itself, saves nothing before the step, ends before it, or does not resume.
    """
    # Lazy: start-up.
    from registry.resuming.checking import check_resume as check

    given: dict[str, Any] = {"processes": processes, "root": root, "copy": copy}
    try:
        found = check(
            script,
            *arguments,
            at=at,
            resume_with=shlex.split(resume_with),
            tell=(lambda text: None) if as_json else warn,
            **given,
        )
    except RegistryError as error:
        complain_of(error)
        return 2
    if as_json:
        print_json(found.document())
    else:
        click.echo(encodable(str(found)))
    return 0 if found.exact else 1 if found.repeats else 2
