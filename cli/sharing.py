"""Between registries and computers: push, pull, follow."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from registry.cli.options import ReferenceType, command, seconds
from registry.cli.output import as_word, counted, print_json, progress_bar, say, size
from registry.store.errors import Invalid, NotFound

if TYPE_CHECKING:
    from registry.catalog.versions import Version
    from registry.registry import Registry
    from registry.upkeep.copying import Copied

_PLACE = "The other registry: a folder, a URL, or a name of registry remote."


@command(
    "push",
    "registry push lenet5@best --to s3://models/team\nregistry push --all --to file:///srv/models",
)
@click.argument("references", nargs=-1, type=ReferenceType(), metavar="[REFERENCE]...")
@click.option("--to", "place", required=True, metavar="PLACE", help=_PLACE)
@click.option("--all", "everything", is_flag=True, help="Copy all versions.")
def push(
    references: tuple[str, ...], place: str, everything: bool, registry: Registry, as_json: bool
) -> None:
    """Copy versions to another registry.

    Only tensors that it lacks are copied, and each is checked on the way. A version keeps its id, tags, notes and attached
    files, and gets the next number of its model there. What is there already stays as it is, so an interrupted push is
    repeated.
    """
    _check(references, everything)
    _copy(registry, _other(place), references, as_json)


@command(
    "pull",
    "registry pull lenet5@best --from s3://models/team\nregistry pull --all --from file:///srv/models",
)
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
@click.option("--from", "place", required=True, metavar="PLACE", help=_PLACE)
@click.option("--all", "everything", is_flag=True, help="Copy all versions.")
def pull(
    references: tuple[str, ...], place: str, everything: bool, registry: Registry, as_json: bool
) -> None:
    """Copy versions from another registry.

    It is the other direction of push.
    """
    _check(references, everything)
    _copy(_other(place), registry, references, as_json)


@command(
    "copy",
    "registry copy .registry s3://models/team\nregistry copy s3://models/team file:///srv/backup lenet5@best",
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
def copy(source: str, target: str, references: tuple[str, ...], as_json: bool) -> None:
    """Copy versions from any registry to any other.

    FROM and TO are folders, URLs, or names of registry remote. All versions are copied unless some are named. See registry push.
    """
    _copy(_other(source), _other(target), references, as_json)


@command(
    "follow",
    "registry follow net@production --exec 'systemctl reload net'\nregistry follow net@best --exec 'cp-to-device {}' --once",
)
@click.argument("reference", type=ReferenceType())
@click.option(
    "--exec", "program", metavar="COMMAND", help="A command to run for each version; {} stands for its name."
)
@click.option(
    "--every", default="5s", show_default=True, callback=seconds, metavar="TIME", help="How often to look."
)
@click.option("--once", is_flag=True, help="Stop behind the first version.")
def follow(
    reference: str, program: str | None, every: float, once: bool, registry: Registry, as_json: bool
) -> int:
    """Wait for each version that a reference comes to name.

    The present version comes first. COMMAND runs without a shell, with the variables REGISTRY_CHECKPOINT and
    REGISTRY_CHECKPOINT_ID. If it fails, the command ends with its exit status. Ctrl-C ends it.
    """
    words = shlex.split(program) if program else []
    for checkpoint in registry.follow(reference, every=every):
        if as_json:
            print_json({"name": checkpoint.name, "id": checkpoint.id})
        else:
            say(checkpoint.name)
        if words:
            environment = {
                **os.environ,
                "REGISTRY_CHECKPOINT": checkpoint.name,
                "REGISTRY_CHECKPOINT_ID": checkpoint.id,
            }
            filled = [word.replace("{}", checkpoint.name) for word in words]
            try:
                status = subprocess.run(filled, env=environment).returncode
            except OSError as error:
                raise Invalid(f"{filled[0]}: {error.strerror}", "give a command that can be run") from None
            if status:
                return status
        if once:
            return 0
    return 0


@command("outbox", "registry outbox\nregistry outbox --drop lenet5:pending-1")
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
@click.option("--drop", is_flag=True, help="Give up the versions that are named.")
@click.option("--all", "everything", is_flag=True, help="With --drop: give up all of them.")
def outbox(references: tuple[str, ...], drop: bool, everything: bool, root: str | None, as_json: bool) -> int:
    """Share what was saved while a bucket was away.

    What still waits is listed, and the exit status is 1 then. Every command on a shared registry tries to share it first,
    and so does each save. Until then such a version is on this computer alone, and is called lenet5:pending-1.
    """
    # Lazy: start-up.
    from registry.registry import Registry

    registry = Registry(root, create=False)
    if registry.remote is None:
        raise Invalid(f"{registry.place} is a folder, and only a shared registry has an outbox")
    if not drop and (references or everything):
        raise Invalid("without --drop all versions are shared", "give no names")
    if drop and bool(references) == everything:
        raise Invalid("name the versions to give up, such as lenet5:pending-1, or give --all")
    dropped = registry.outbox.drop(references) if drop else []
    shared: list[Copied] = []
    try:
        shared = [] if drop else registry.outbox.share()
    finally:
        # Above all where the bucket is away.
        _print_outbox(registry.outbox.versions(), shared, dropped, as_json=as_json)
    return 1 if registry.outbox and not drop else 0


def _print_outbox(
    waiting: Sequence[Version], shared: Sequence[Copied], dropped: Sequence[Version], *, as_json: bool
) -> None:
    if as_json:
        print_json(
            {
                "shared": [copied._asdict() for copied in shared],
                "dropped": [version.name for version in dropped],
                "pending": [version.name for version in waiting],
            }
        )
        return
    for copied in shared:
        say(f"{copied.source} is {copied.target} now")
    for version in dropped:
        say(f"{version.name} is given up")
    for version in waiting:
        say(f"{version.name}  {version.id[:12]}  {version.created}")
    if not (shared or dropped or waiting):
        say("nothing waits to be shared")


def _other(place: str) -> Registry:
    """The registry at the other end.

    Args:
        place: a folder, a URL or a name.

    Raises:
        NotFound: if there is none.
    """
    # Lazy: start-up.
    from registry.registry import Registry
    from registry.remote.names import named_places, place_of

    found = place_of(place)
    try:
        return Registry(found, create=False)
    except NotFound:
        named = named_places().get(place, found)
        meant = f"; {place} also names {named}, but a folder goes before a name" if named != found else ""
        raise NotFound(
            f"there is no registry at {found}",
            f"make one with: registry --root {as_word(found)} init{meant}",
        ) from None


def _check(references: tuple[str, ...], everything: bool) -> None:
    if bool(references) == everything:
        raise Invalid("name the versions, such as lenet5@best, or give --all for all of them")


def _copy(source: Registry, target: Registry, references: tuple[str, ...], as_json: bool) -> None:
    with progress_bar("copying") as report:
        found = source.copy_to(target, references, progress=report)
    if as_json:
        print_json([copied._asdict() for copied in found])
        return
    for copied in found:
        what = size(copied.size) if copied.is_new else "there already"
        say(f"{copied.source} → {copied.target}  {what}")
    say(f"{counted(sum(copied.is_new for copied in found), 'version')} copied to {target.place}")
