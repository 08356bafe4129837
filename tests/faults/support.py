"""What tests share: states that can be told apart, child processes, and the check that a registry is whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from registry import Registry
from registry.catalog import schema
from registry.catalog.invariants import invariants
from registry.catalog.versions import Version, find_versions
from registry.store import durable
from registry.upkeep.garbage import GRACE, collect_garbage

Tree = dict[str, Any]


def state(number: int) -> Tree:
    """A small training state of its own for each number, which shares a tensor with all others."""
    return {
        "model": {"shared": torch.arange(2_000.0), "own": torch.full((50, 30), float(number))},
        "optimizer": {"lr": 0.1, "steps": [number], "moment": torch.full((7,), -float(number)).bfloat16()},
    }


def is_state(components: Tree, number: int) -> bool:
    """Whether loaded components are `state(number)`, bit for bit."""
    expected = state(number)
    tensors = [("model", "shared"), ("model", "own"), ("optimizer", "moment")]
    return (
        components["optimizer"]["lr"] == 0.1
        and components["optimizer"]["steps"] == [number]
        and all(torch.equal(components[a][b], expected[a][b]) for a, b in tensors)
    )


def save(registry: Registry, number: int, model: str = "net") -> str:
    return registry.save(model, state(number), epoch=number, metrics={"number": float(number)}).name


def all_versions(registry: Registry) -> list[Version]:
    return find_versions(registry.catalog, "1 = 1")


def dump(registry: Registry) -> dict[str, list[str]]:
    """Everything that follows from the log in the catalog's tables, in a form that can be compared."""
    tables = {table: registry.catalog.query(f"SELECT * FROM {table}") for table in schema.DERIVED}
    return {table: sorted(json.dumps(row) for row in rows) for table, rows in tables.items()}


def collect(registry: Registry, **options: Any) -> Any:
    """`collect_garbage`, which takes the time too."""
    return collect_garbage(registry.catalog, registry.store, **options)


def broken_rules(registry: Registry) -> list[str]:
    """The invariants that do not hold, and where the catalog is not what follows from the log."""
    return [*invariants(registry.catalog.query, registry.store), *registry.catalog.problems()]


def files(root: Path) -> dict[str, bytes]:
    """Every file of a folder but the catalog's, with its bytes."""
    found = (path for path in root.rglob("*") if path.is_file() and "catalog" not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(found)}


def check_whole(root: Path, saved: Mapping[str, int], maybe: Mapping[str, int] | None = None) -> None:
    """Assert that a registry holds what was saved, perhaps what was being saved, and nothing half.

    Args:
        saved: the number of the state of every version that must be there.
        maybe: likewise, for versions that may be there whole.
    """
    allowed = {**(maybe or {}), **saved}
    registry = Registry(root, create=False)

    def check() -> None:
        present = {version.name for version in all_versions(registry)}
        assert set(saved) <= present <= set(allowed)
        for name in present:
            assert is_state(registry[name].load(), allowed[name]), name

    check()
    assert broken_rules(registry) == []
    assert [problem.message for problem in registry.verify().problems] == []
    collect(registry, grace=0, now=time.time() + 2 * GRACE)  # When no save is going on any more.
    check()
    assert broken_rules(registry) == []
    if registry.catalog.ledger().pack_count:  # A log that never named any lets gc remove nothing.
        packs = {digest for (digest,) in registry.catalog.query("SELECT digest FROM packs")}
        assert set(registry.store.pack_digests()) == packs
        assert set(registry.store) == {id for (id,) in registry.catalog.query("SELECT id FROM manifests")}
    assert list(registry.store.tmp.iterdir()) == []
    before = dump(registry)
    registry.catalog.close()
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    registry.rebuild()
    assert dump(registry) == before
    check()
    registry.catalog.close()


def is_in_a_commit(root: Path) -> bool:
    """Whether somebody keeps other writers out at this moment."""
    with open(root / "journal" / "lock", "rb") as file:
        return durable.try_lock(file.fileno()) is False


class Stepwise(durable.Disk):
    """A disk that calls `at` before and after each durable step, which may kill the process or raise."""

    def __init__(self, at: Callable[[int, str, Path], None]) -> None:
        self.count = 0
        self._at = at

    def _step(self, path: Path, run: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        self._at(self.count, "before", path)
        if half is not None:
            before = self.count
            result = half()
            self._at(before, "half", path)
            if isinstance(result, int):
                self.count += 1
                return result
        result = run()
        self._at(self.count, "after", path)
        self.count += 1
        return result

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        half = super().write
        if len(data) < 2:
            return int(self._step(path, lambda: half(fd, path, data)))
        return int(self._step(path, lambda: 0, lambda: half(fd, path, data[: len(data) // 2])))

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        return int(self._step(path, lambda: super(Stepwise, self).write_at(fd, path, data, offset)))

    def sync(self, fd: int, path: Path) -> None:
        self._step(path, lambda: super(Stepwise, self).sync(fd, path))

    def sync_folder(self, path: Path, folder: int) -> None:
        self._step(path, lambda: super(Stepwise, self).sync_folder(path, folder))

    def rename(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        run = super().rename
        self._step(target, lambda: run(source, target, source_folder, target_folder))

    def unlink(self, path: Path, folder: int) -> None:
        self._step(path, lambda: super(Stepwise, self).unlink(path, folder))

    def mkdir(self, path: Path, folder: int) -> None:
        self._step(path, lambda: super(Stepwise, self).mkdir(path, folder))

    def truncate(self, fd: int, path: Path, size: int) -> None:
        self._step(path, lambda: super(Stepwise, self).truncate(fd, path, size))


def in_steps(
    root: Path, change: Callable[[Registry], object], at: Callable[[int, str, Path], None]
) -> Stepwise:
    """Run a change of a registry, which is opened for it, on a disk that calls `at` at each durable step."""
    plain = durable.disk
    durable.disk = steps = Stepwise(at)
    try:
        registry = Registry(root, create=False)
        change(registry)
        registry.catalog.close()
    finally:
        durable.disk = plain
    return steps


def kill_me() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def fork(run: Callable[[], object]) -> int:
    """Start a child process that runs a function and ends with 0, or 1 and a traceback."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)  # Its threads stayed in the parent.
        durable.disk.safe_folders.clear()  # What the parent has made durable is not known to another program.
        run()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int) -> int:
    """The exit status of a child; the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(run: Callable[[], object]) -> int:
    return wait(fork(run))


def copy(root: Path, target: Path) -> Path:
    """A fresh copy of a registry's folder."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(root, target)
    return target


def may_be_an_old_log(registry: Registry) -> bool:
    """Whether the log names nothing while there are files of several saves: then gc keeps what it finds."""
    text = "".join(path.read_text(errors="replace") for path in sorted(registry.root.glob("journal/*.log")))
    found = max(len(list(registry.store)), len(list(registry.store.pack_digests())))
    return '"manifest' not in text and '"pack' not in text and found > 1
