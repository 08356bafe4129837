"""Saving while others read: a write-ahead log against a rollback journal.

The catalog uses a write-ahead log on local file systems, and a rollback journal elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.catalogs import save
from benchmarks.measure import Contender, Scale, Section, Table, ratio, spoken, take_turns
from registry import Registry
from registry.catalog import database
from registry.store.errors import RegistryError

READERS = 20
"""Processes that read all the time."""

VERSIONS = 200
"""Versions of each registry at first."""

SAVES = 5
"""Saves beside the readers in each round."""

HELD = 0.5
"""Seconds that a reader stays in the middle of its reading."""

_MODES = {"write-ahead log": True, "rollback journal": False}


def measure(folder: Path, scale: Scale) -> Section:
    """Measure a save alone, beside one open reader, and beside many processes that keep reading."""
    registries = {
        name: _filled(folder / name.replace(" ", "-"), is_local) for name, is_local in _MODES.items()
    }
    other = _filled(folder / "other", True)
    count = iter(range(VERSIONS, 1 << 30))

    def saving(name: str, prepare: Callable[[], object] = lambda: None) -> Contender:
        return (prepare, lambda: save(registries[name], next(count)))

    alone = take_turns({name: saving(name) for name in _MODES}, scale.rounds * 10)
    held = take_turns({n: saving(n, lambda n=n: _hold(registries[n].root)) for n in _MODES}, scale.rounds)  # type: ignore[misc]
    # The reader that holds on uses plain SQLite. If it closed a catalog as the last one, the catalog would look damaged.
    time.sleep(2 * HELD)
    log, journal = _MODES
    results = [
        ratio("a small save, nobody reads", alone, ours=log, peer=journal, goal=1.25),
        ratio(f"a save beside a reader that holds on for {HELD} s", held, ours=log, peer=journal, goal=0.5),
    ]
    rows = [[name, spoken(median(alone[name])), spoken(median(held[name])), "", "", ""] for name in _MODES]
    for row, (name, is_local) in zip(rows, _MODES.items(), strict=True):
        times: dict[str, list[float]] = {"theirs": [], "another": []}
        failed, longest = 0, 0.0
        # A process that forks closes its catalogs first, and opens them again at its next save.
        with _as_if(is_local):
            for _ in range(scale.rounds):
                for whose, root, local in (
                    ("theirs", registries[name].root, is_local),
                    ("another", other.root, True),
                ):
                    with _processes(root, local):
                        for _ in range(SAVES):
                            began = time.perf_counter()
                            try:
                                save(registries[name], next(count))
                            except RegistryError:
                                failed += whose == "theirs"
                            times[whose].append(time.perf_counter() - began)
        longest = max(times["theirs"])
        row[3:] = spoken(median(times["theirs"])), spoken(longest), f"{failed} of {len(times['theirs'])}"
        what = f"a save beside {READERS} readers, {name}"
        goal = 1.5 if is_local else None
        results.append(
            ratio(what, times, ours="theirs", peer="another", goal=goal, name="readers of another registry")
        )
    columns = [
        "catalog",
        "alone",
        "beside one that holds on",
        f"beside {READERS} readers",
        "the longest",
        "failed",
    ]
    return Section(results, tables=[Table("one save", columns, rows)])


def _filled(root: Path, is_local: bool) -> Registry:
    with _as_if(is_local):
        registry = Registry(root)
        for i in range(VERSIONS):
            save(registry, i)
    return registry


@contextlib.contextmanager
def _as_if(is_local: bool) -> Iterator[None]:
    """Choose the journal of the catalog, which asks whether the file system is local to this machine."""
    ask: Callable[[Path], bool] = database.is_local
    database.is_local = lambda _: is_local
    try:
        yield
    finally:
        database.is_local = ask


def _hold(root: Path) -> None:
    """Let another thread begin to read, and stay in the middle of it for a while."""
    begun = threading.Event()

    def read() -> None:
        with contextlib.closing(sqlite3.connect(root / database.NAME, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT COUNT(*) FROM versions").fetchone()
            begun.set()
            time.sleep(HELD)
            connection.execute("COMMIT")

    threading.Thread(target=read).start()
    begun.wait()


@contextlib.contextmanager
def _processes(root: Path, is_local: bool) -> Iterator[None]:
    """Run processes that list, resolve and load, one after the other, until the block ends."""
    stop_reading, stop = os.pipe()
    told_reading, told = os.pipe()
    children = []
    for _ in range(READERS):
        pid = os.fork()
        if not pid:
            os.close(stop)
            _read_until(stop_reading, told, root=root, is_local=is_local)
        children.append(pid)
    os.close(told)
    os.close(stop_reading)
    with os.fdopen(told_reading) as lines:
        for _ in range(READERS):
            lines.readline()
        try:
            yield
        finally:
            os.close(stop)
            statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError("a reader failed")


def _read_until(stop: int, told: int, root: Path, is_local: bool) -> None:
    """Read until the other end of a pipe is closed, and end the process."""
    status = 1
    try:
        with _as_if(is_local):
            os.set_blocking(stop, False)
            registry = Registry(root, create=False)
            registry["net"].load()
            os.write(told, b"ready\n")
            count = 0
            while True:
                try:
                    os.read(stop, 1)
                    break
                except BlockingIOError:
                    registry.names()
                    registry[f"net:v{1 + count % VERSIONS}"].load()
                    count += 1
            status = 0
    finally:
        os._exit(status)
