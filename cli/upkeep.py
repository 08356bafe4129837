"""Keeping house: verify, gc, compact, repair, rebuild."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.cli.options import ReferenceType, command, seconds
from registry.cli.output import GC_FREES, counted, print_json, progress_bar, say, size, warn
from registry.cli.suggestions import WrongUse

if TYPE_CHECKING:
    from registry.registry import Registry
    from registry.upkeep.compaction import Compacted


@command(
    "verify", "registry verify\nregistry verify lenet5@best\nregistry verify --frozen lenet6:v1 lenet6@latest"
)
@click.argument("references", nargs=-1, type=ReferenceType(), metavar="[REFERENCE]...")
@click.option(
    "--frozen",
    is_flag=True,
    help="Check instead, by digest, that what is frozen in the second of two versions is the same in the first.",
)
def verify(references: tuple[str, ...], frozen: bool, registry: Registry, as_json: bool) -> int:
    """Compare every stored byte with its digest.

    With REFERENCEs, the command reads only the bytes that they need. The exit status is 1 if anything is not as it was
    saved, and the log does not put it back at once. What is damaged comes back from a second copy with registry repair. When something saves a damaged tensor again,
    it is written again, too, and the versions that hold it are whole.

    With --frozen the exit status is 1 if a frozen tensor moved. Buffers of frozen layers that were not held may move; the
    command names those that did.
    """
    if frozen:
        if len(references) != 2:
            raise WrongUse("--frozen compares two versions", "name both: registry verify --frozen A B")
        return _verify_frozen(registry, *references, as_json=as_json)
    with progress_bar("verifying") as report:
        found = registry.verify(references, progress=report)
    if as_json:
        print_json(asdict(found))
        return int(bool(found.problems))
    for problem in found.problems:
        used = f" (needed by {', '.join(problem.checkpoints)})" if problem.checkpoints else ""
        warn(f"{problem.message}{used}")
    artifacts = f"{counted(found.artifacts, 'artifact')}, " if found.artifacts else ""
    for mended in found.mended:
        say(mended.message)
    checked = (
        f"{counted(found.checkpoints, 'version')}, {artifacts}{counted(found.tensors, 'stored tensor')}, "
        f"{size(found.bytes)} in {counted(found.packs, 'pack')}"
    )
    say(f"{checked}: {counted(len(found.problems), 'problem') if found.problems else 'OK'}")
    if found.problems:
        say("a second copy, such as a backup, puts back what it has: registry repair --from PLACE")
    return int(bool(found.problems))


@command("verify-frozen", "registry verify-frozen lenet6:v1 lenet6@best")
@click.argument("a", type=ReferenceType())
@click.argument("b", type=ReferenceType())
def verify_frozen(a: str, b: str, registry: Registry, as_json: bool) -> int:
    """Check that what was frozen did not move; the same as registry verify --frozen."""
    return _verify_frozen(registry, a, b, as_json=as_json)


def _verify_frozen(registry: Registry, a: str, b: str, *, as_json: bool) -> int:
    """Say whether a tensor moved that was frozen when B was saved. Returns the exit status."""
    # Lazy: start-up.
    from registry.transfer.frozen import check_frozen

    left, right = registry[a], registry[b]
    found = check_frozen(left, right)
    count = len(found.frozen)
    if as_json:
        went_on = list(found.went_on)
        print_json(
            {"a": left.name, "b": right.name, "frozen": count, "moved": found.moved, "went_on": went_on}
        )
        return 1 if found.moved else 0
    for name, why in found.went_on.items():
        say(f"{name} moved: {why}")
    for name, why in found.moved.items():
        say(f"{name}: {why}")
    if found.moved:
        say(f"{len(found.moved)} of {count} frozen tensors moved between {left.name} and {right.name}")
    else:
        say(f"all {count} frozen tensors are equal in {left.name} and {right.name}, bit for bit")
    return 1 if found.moved else 0


@command("gc", "registry gc --dry-run\nregistry gc --grace 14d")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would be removed.")
@click.option(
    "--grace",
    default="1h",
    show_default=True,
    callback=seconds,
    metavar="TIME",
    help="How long a file stays after nothing needs it any more, such as 0, 30m, 1h or 14d.",
)
def gc(dry_run: bool, grace: float, registry: Registry, as_json: bool) -> None:
    """Free the space of what no version needs.

    A file that nothing needs any more stays for the time of --grace, because a process may still read it. A file that
    is needed is never removed, whatever runs at the same time. That holds with --grace 0 too.
    """

    def tell(path: Path, count: int) -> None:
        say(f"{'would remove' if dry_run else 'removing'} {path.relative_to(registry.root)}  {size(count)}")

    found = registry.collect_garbage(grace=grace, dry_run=dry_run, tell=None if as_json else tell)
    if as_json:
        print_json({**asdict(found), "dry_run": dry_run})
        return
    parts = [
        counted(found.packs, "pack"),
        counted(found.manifests, "manifest"),
        counted(found.temporary, "temporary file"),
    ]
    say(f"{'would free' if dry_run else 'freed'} {size(found.bytes)}: {', '.join(parts)}")
    if found.waiting:
        minutes = f"{found.wait_seconds / 60:.0f} min"
        say(f"{counted(found.waiting, 'file')}, {size(found.waiting_bytes)}, wait for up to {minutes}")


@command(
    "compact",
    "registry compact lenet5\nregistry compact --similar --dry-run\nregistry compact --plain lenet5",
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--similar", is_flag=True, help="Also store differences from near tensors of other models.")
@click.option(
    "--alone", is_flag=True, help="Also code by itself what has nothing near, such as first versions."
)
@click.option("--plain", is_flag=True, help="Undo it: store versions as they are again.")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would be rewritten.")
def compact(
    models: tuple[str, ...],
    similar: bool,
    alone: bool,
    plain: bool,
    dry_run: bool,
    registry: Registry,
    as_json: bool,
) -> int:
    """Store older versions as differences, bit for bit.

    The command compacts each MODEL, or all models. The newest version, the versions with an alias and about one in
    forty stay as they are. The others become differences, most of them from a near one, where that saves a tenth. No
    more than four rest on one another. Packs of which most is not needed any more become smaller, too. Loading turns
    differences back and checks every digest. If a model cannot be compacted, the command names it and compacts the
    others. The exit status is then 1.

    With --similar it compares models by some of their values, whatever their names: imported fine-tunes of one network
    become differences from it. A model's only version is coded as well then. With --alone the newest versions, and what
    others rest on, are coded by themselves: floats of 2 bytes to two thirds, those of 4 bytes to five sixths. Loading
    what is coded takes longer. Versions with an alias stay as they are.
    """
    if plain and (similar or alone):
        raise WrongUse("--plain undoes what --similar and --alone do", "give one or the other")
    with progress_bar("expanding" if plain else "compacting") as report:
        if plain:
            found = registry.expand(models, dry_run=dry_run, progress=report)
        else:
            found = registry.compact(models, similar=similar, alone=alone, dry_run=dry_run, progress=report)
    if as_json:
        rows = [{**one._asdict(), "measured": dict(one.measured)} for one in found]
        print_json({"dry_run": dry_run, "models": rows})
        return int(any(one.problem for one in found))
    for one in found:
        if one.problem:
            warn(f"error: {one.model}: {one.problem}")
            if not one.packs:
                continue
        say(f"{one.model}: {_compacted(one, is_plain=plain)}")
        for name, near in sorted(one.measured.items()):
            say(f"  {name} {'would rest' if dry_run else 'rests'} on {near} (measured)")
    if any(one.after for one in found):
        say(GC_FREES)
    return int(any(one.problem for one in found))


def _compacted(one: Compacted, *, is_plain: bool) -> str:
    """What became of a model."""
    if not one.packs:
        return f"nothing to {'turn back' if is_plain else 'compact'}"
    packs = f"{counted(one.versions, 'version')} in {counted(one.packs, 'pack')}"
    if not one.versions:
        packs = f"{counted(one.packs, 'pack')} of which most is not needed"
    if one.after is None:
        return f"{packs}, {size(one.before)}, would become {'whole again' if is_plain else 'smaller'}"
    rewritten = f"{packs}, {size(one.before)} became {size(one.after)}"
    return rewritten if is_plain else f"{rewritten} ({one.before / max(one.after, 1):.1f} times smaller)"


@command(
    "repair",
    "registry repair --from /backup/models --dry-run\nregistry repair --from s3://models/team",
)
@click.option(
    "--from",
    "place",
    required=True,
    metavar="PLACE",
    help="The second copy: a folder, a URL, or a name of registry remote.",
)
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would be put back.")
def repair(place: str, dry_run: bool, registry: Registry, as_json: bool) -> int:
    """Put back what is damaged or missing from a second copy.

    A second copy is a backup, a registry that versions were copied to or from, or a computer's folder for a shared
    registry. Every byte of the packs is read. Only bytes whose digest is that of what is missing are taken, and nothing is
    removed. Entries of the log come only from a copy of the same log. The exit status is 1 if something is left that
    PLACE does not have either.
    """
    with progress_bar("repairing") as report:
        found = registry.repair(place, dry_run=dry_run, progress=report)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(found)})
        return int(bool(found.problems))
    for problem in found.problems:
        used = f" (needed by {', '.join(problem.checkpoints)})" if problem.checkpoints else ""
        warn(f"{problem.message}{used}")
    parts = [
        counted(found.entries, "entry of the log", "entries of the log"),
        counted(found.manifests, "manifest"),
        counted(found.packs, "pack"),
        f"{counted(found.tensors, 'tensor')} in new packs",
    ]
    numbers = (found.entries, found.manifests, found.packs, found.tensors)
    done = ", ".join(part for part, number in zip(parts, numbers, strict=True) if number)
    if done:
        say(f"{'would put back' if dry_run else 'put back'} {size(found.bytes)}: {done}")
    else:
        say("nothing was put back" if found.problems else "nothing is damaged")
    return int(bool(found.problems))


@command("rebuild", "registry rebuild\nregistry rebuild --adopt")
@click.option("--adopt", is_flag=True, help="Take in versions that the log does not name.")
def rebuild(adopt: bool, registry: Registry, as_json: bool) -> int:
    """Make the catalog anew from the log.

    Use it if the catalog is damaged, or after verify found damage in the log. If one of the two copies of the log has
    lost something, it comes from the other copy. The command names what both copies have lost. --adopt accepts that
    loss, and takes in the versions that no entry of the log names. The exit status is 1 if something could not be
    brought back.
    """
    with progress_bar("rebuilding") as report:
        found = registry.rebuild(adopt=adopt, progress=report)
    if as_json:
        print_json(asdict(found))
        return int(bool(found.damaged))
    for line in found.damaged:
        warn(line)
    if found.set_aside:
        say(f"the unreadable catalog is kept as {found.set_aside}")
    if found.healed:
        say(
            f"put back from their second copy: {counted(found.healed, 'entry or manifest', 'entries and manifests')}"
        )
    for name in found.adopted:
        model = name.partition(":")[0]
        say(
            f"adopted {name}"
            + (f", which is the latest version of {model} now" if name in found.latest else "")
        )
    if found.unnamed:
        shown = ", ".join(one[:12] for one in found.unnamed[:3])
        more = f" and {len(found.unnamed) - 3} more" if len(found.unnamed) > 3 else ""
        say(
            f"no entry of the log names {shown}{more}. An interrupted save leaves such a version; "
            "--adopt takes it in"
        )
    say(
        f"rebuilt: {counted(found.models, 'model')}, {counted(found.versions, 'version')}, "
        f"{counted(found.packs, 'pack')}"
    )
    return int(bool(found.damaged))
