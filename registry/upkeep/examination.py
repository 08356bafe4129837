"""Examination: quick checks of a registry and of what it runs on, each with what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from registry.catalog.database import NAME
from registry.catalog.runs import Runs
from registry.catalog.schema import UNUSED
from registry.home import OUTBOX, Home
from registry.log import settings
from registry.release import VERSION
from registry.store import durable, places
from registry.store.errors import RegistryError, storage_errors

State = Literal["good", "note", "bad"]

_LOCKS = "/proc/locks"
"""Where Linux says who holds which lock."""

_FEW_BYTES, _TOO_FEW_BYTES = 2 * 10**9, 100 * 10**6
"""Free space below which it is told, and below which a save is likely to fail."""

_MOST_COMPARED = 2_000
"""Versions up to which the catalog is compared with the log. More would take seconds."""

_MOST_NAMED = 3
"""Runs, versions and processes that a line names."""


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        topic: what was checked, in a word or two.
        state: `good`; `note`, which may be as it should be; or `bad`.
        text: what was found.
        advice: what to do; empty for nothing.
    """

    topic: str
    state: State
    text: str
    advice: str = ""


def examine(place: Path | str | None) -> list[Finding]:
    """Look at a registry and at what it runs on, without reading what is stored; `verify` does that.

    Nothing that is wrong with the registry raises an error: it becomes a finding.

    Args:
        place: a folder or a URL, as `Home` takes it.
    """
    found = list(_software())
    homes: list[Home] = []

    def opened() -> Iterator[Finding]:
        home = Home(place, create=False)
        home.catalog.query("SELECT 1 FROM versions LIMIT 1")
        homes.append(home)
        shared = " shared" if home.remote else ""
        yield Finding("registry", "good", f"{home.place},{shared} format {settings.read_format(home.root)}")

    found += _checked("registry", opened)
    if homes:
        home = homes[0]
        for topic, check in _CHECKS.items():
            found += _checked(topic, lambda check=check: check(home))  # type: ignore[misc]
    return found


def _checked(topic: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds. What keeps it from looking is a finding, too."""
    found: list[Finding] = []
    try:
        with storage_errors(topic):
            found.extend(check())
    except RegistryError as error:
        what, advice = error.for_command_line()
        found.append(Finding(topic, "bad", what, advice))
    return found


def _software() -> Iterator[Finding]:
    yield Finding("torch-registry", "good", VERSION)
    python = f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}"
    how = "compiled" if find_spec("registry.store._split") else "by numpy, more slowly"
    yield Finding("python", "good", f"{python}, differences {how}")
    try:
        # It is not imported, which would take seconds.
        yield Finding("torch", "good", version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", "bad", "is not installed", "install it: https://pytorch.org/get-started")


def _log(home: Home) -> Iterator[Finding]:
    """Whether the log is whole, and the catalog what follows from it."""
    ((count,),) = home.catalog.query("SELECT COUNT(*) FROM versions")
    gaps = home.catalog.gaps()
    if gaps:
        more = f" and {len(gaps) - 1:,} more" if len(gaps) > 1 else ""
        advice = "put it back from a second copy with: registry repair --from PLACE"
        yield Finding("log", "bad", f"{gaps[0]}{more}", advice)
        return
    if count > _MOST_COMPARED:
        yield Finding("log", "good", f"{count:,} versions; registry verify compares log and catalog")
        return
    problems = home.catalog.problems()
    if problems:
        more = f" and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        yield Finding("log", "bad", f"{problems[0]}{more}", "registry verify shows all of it")
    else:
        yield Finding("log", "good", "log and catalog agree")


def _packs(home: Home) -> Iterator[Finding]:
    """Whether the packs that count are there in their full size. No byte of them is read; a bucket is not asked."""
    if home.remote is not None:
        return
    rows = home.catalog.query(f"SELECT digest, size, damaged FROM packs WHERE NOT (damaged = 1 AND {UNUSED})")
    damaged = sum(bool(known) for *_, known in rows)
    lost = [
        digest for digest, size, known in rows if not known and not home.store.pack_is_whole(digest, size)
    ]
    advice = "registry verify says what needs them; put them back with: registry repair --from PLACE"
    if lost:
        first = home.store.pack_path(lost[0]).relative_to(home.root)
        yield Finding(
            "packs", "bad", f"{len(lost):,} of {len(rows):,} are not there in full, such as {first}", advice
        )
    if damaged:
        yield Finding("packs", "bad", f"{damaged:,} of {len(rows):,} are known to be damaged", advice)
    if not (lost or damaged):
        yield Finding("packs", "good", f"{len(rows):,} in full size")


def _locks(home: Home) -> Iterator[Finding]:
    """Which other processes hold the log or the catalog now."""
    holders = _holders([home.catalog.journal.folder / "lock", home.root / NAME])
    if holders is None:
        yield Finding("locks", "note", "this system does not say who holds a lock")
    elif holders:
        named = ", ".join(map(_process, sorted(holders)[:_MOST_NAMED]))
        advice = "a change lasts moments; a process that stays here has hung"
        yield Finding("locks", "note", f"held by {named}", advice)
    else:
        yield Finding("locks", "good", "free")


def _holders(paths: list[Path]) -> set[int] | None:
    """The processes of this machine, other than this one, that keep writers out of some files; None if nobody can tell."""
    inodes = set()
    for path in paths:
        status = _status(path)
        if status is not None:
            inodes.add(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}")
    try:
        lines = Path(_LOCKS).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = set()
    for words in map(str.split, lines):
        # A process that waits has an arrow before the kind of lock.
        if len(words) >= 6 and words[1] != "->" and words[3] == "WRITE" and words[5] in inodes:
            found.add(int(words[4]))
    return found - {os.getpid(), -1}


def _process(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({name})"


def _space(home: Home) -> Iterator[Finding]:
    free = shutil.disk_usage(home.root).free
    text = f"{free / 10**9:,.1f} GB free"
    if free < _TOO_FEW_BYTES:
        yield Finding("space", "bad", text, "see what could go with: registry prune -n")
    elif free < _FEW_BYTES:
        yield Finding("space", "note", text, "see what could go with: registry prune -n")
    else:
        yield Finding("space", "good", text)


def _disk(home: Home) -> Iterator[Finding]:
    """Whether the file system does what is needed: locks that keep others out, and renames."""
    if not os.access(home.root, os.W_OK):
        yield Finding(
            "disk", "note", "the folder cannot be written by this user", "ask its owner for access to save"
        )
        return
    probe = durable.NewFile(home.root / "tmp")
    try:
        # It is locked while it is written.
        works = durable.locks_work(probe.path, inner=1)
    finally:
        probe.discard()
    if not works:
        text = "locks of files keep nobody out here"
        yield Finding("disk", "bad", text, "let one computer alone write, or share a bucket: docs/shared.md")
    elif not places.is_local(home.root):
        yield Finding(
            "disk", "note", "not known as a disk of this computer: the catalog is slower, and locks work"
        )
    else:
        yield Finding("disk", "good", "locks work")


def _leftovers(home: Home) -> Iterator[Finding]:
    """Temporary files that no process writes any more."""
    sizes = [status.st_size for _, status in durable.left_behind(home.root / "tmp")]
    count, size = len(sizes), sum(sizes)
    if count:
        files = "1 temporary file" if count == 1 else f"{count:,} temporary files"
        text = f"{files} of processes that are gone, {size / 10**6:,.1f} MB"
        yield Finding("leftovers", "note", text, "free it with: registry gc")
    else:
        yield Finding("leftovers", "good", "none")


def _runs(home: Home) -> Iterator[Finding]:
    runs = Runs(home.catalog, home.root)
    still_open = runs.open()
    lost = [info.name for info in still_open if runs.is_lost(info)]
    running = len(still_open) - len(lost)
    if lost:
        more = f" and {len(lost) - _MOST_NAMED:,} more" if len(lost) > _MOST_NAMED else ""
        text = f"the process is gone of {', '.join(lost[:_MOST_NAMED])}{more}"
        yield Finding("runs", "note", text, "registry status says what to go on from")
    else:
        yield Finding("runs", "good", f"{running:,} running" if running else "none is lost")


def _outbox(home: Home) -> Iterator[Finding]:
    """What waits to be shared; nothing for the registry of a folder."""
    if home.remote is None:
        return
    waiting = 0
    if settings.are_there(home.root / OUTBOX):
        ((waiting,),) = home.outbox_home.catalog.query("SELECT COUNT(*) FROM versions")
    if waiting:
        count = "1 version waits" if waiting == 1 else f"{waiting:,} versions wait"
        yield Finding("outbox", "note", f"{count} to be shared", "share it with: registry outbox")
    else:
        yield Finding("outbox", "good", "empty")


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=False)
    except OSError:
        return None


_CHECKS: dict[str, Callable[[Home], Iterator[Finding]]] = {
    "log": _log,
    "packs": _packs,
    "locks": _locks,
    "runs": _runs,
    "outbox": _outbox,
    "leftovers": _leftovers,
    "space": _space,
    "disk": _disk,
}
"""The checks of a registry that can be opened, in the order in which they are told."""
