"""SIGKILL at every durable step: what was acknowledged is whole, what was interrupted is whole or absent."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Stepwise, all_versions, check_whole, copy, fork, in_child, kill_me, save, state, wait

from registry import Registry
from registry.store import durable
from registry.store.errors import NotFound

Change = Callable[[Registry], object]

CHANGES: dict[str, tuple[Change, dict[str, int], dict[str, int]]] = {
    "save": (lambda r: save(r, 3), {"net:v1": 1, "net:v2": 2}, {"net:v3": 3}),
    "save to a new model": (lambda r: save(r, 3, "other"), {"net:v1": 1, "net:v2": 2}, {"other:v1": 3}),
    "save what is there": (lambda r: save(r, 2), {"net:v1": 1, "net:v2": 2}, {"net:v3": 2}),
    "alias": (lambda r: r.set_alias("net:v1", "good"), {"net:v1": 1, "net:v2": 2}, {}),
    "rm": (lambda r: r.remove(["net:v2"]), {"net:v1": 1}, {"net:v2": 2}),
    "gc": (lambda r: r.collect_garbage(grace=0), {"net:v1": 1, "net:v2": 2}, {}),
    "rm and gc": (lambda r: (r.remove(["net:v2"]), r.collect_garbage(grace=0)), {"net:v1": 1}, {"net:v2": 2}),
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions, and an orphan of each kind for gc."""
    root = tmp_path_factory.mktemp("golden") / "r"
    registry = Registry(root)
    for number in (1, 2):
        save(registry, number)
    registry.store.put(state(9), {"kind": "orphan"})
    (root / "tmp" / f"{durable.host()}-999999999-0").write_bytes(b"left behind")
    registry.catalog.close()
    return root


@pytest.fixture
def chance() -> random.Random:
    """Another one in each run; a failing test shows its seed."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)


def killed_at(change: Change, root: Path, step: int, moment: str) -> int:
    """Run a change in a child that kills itself at a step; its exit status."""

    def at(count: int, when: str, path: Path) -> None:
        if (count, when) == (step, moment):
            kill_me()

    def run() -> None:
        durable.disk = Stepwise(at)
        change(Registry(root, create=False))

    return in_child(run)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_killed_at_any_of_our_steps(golden: Path, tmp_path: Path, name: str) -> None:
    change, saved, maybe = CHANGES[name]
    for step in range(1_000):
        for moment in ("before", "half"):
            root = copy(golden, tmp_path / "r")
            status = killed_at(change, root, step, moment)
            if status == 0:  # there is no such step, or it cannot be done by half
                break
            assert status == -signal.SIGKILL
            check_whole(root, saved, maybe)
        if (status, moment) == (0, "before"):
            break
    assert 1 < step < 999


@pytest.mark.parametrize("name", ["save", "alias", "rm and gc"])
def test_a_change_killed_half_way_is_simply_repeated(golden: Path, tmp_path: Path, name: str) -> None:
    change, *_ = CHANGES[name]
    for step in range(0, 1_000, 2):
        root = copy(golden, tmp_path / "r")
        if killed_at(change, root, step, "after") == 0:
            break
        try:
            change(Registry(root, create=False))
        except NotFound:
            assert name == "rm and gc"  # the version was removed before the kill
    else:
        pytest.fail("the change never ended")


def test_making_a_registry_killed_at_any_step_is_simply_repeated(tmp_path: Path) -> None:
    for step in range(1_000):
        root = tmp_path / str(step)

        def run(root: Path = root, step: int = step) -> None:
            durable.disk = Stepwise(lambda count, when, path: kill_me() if count == step else None)
            Registry(root)

        status = in_child(run)
        registry = Registry(root)
        save(registry, 1)
        registry.catalog.close()
        check_whole(root, {"net:v1": 1})
        if status == 0:
            break
    assert 5 < step < 999


def traced(change: Change, root: Path, inject: str) -> tuple[int, str]:
    """Run a change in a child under strace, which injects a fault into the calls on the catalog's files."""

    def run() -> None:
        registry = Registry(root, create=False)
        registry.catalog.connection()
        os.kill(os.getpid(), signal.SIGSTOP)
        change(registry)
        registry.catalog.close()

    pid = fork(run)
    os.waitpid(pid, os.WUNTRACED)
    names = [str(root / f"catalog.sqlite{suffix}") for suffix in ("", "-wal", "-shm")]
    paths = [argument for name in names for argument in ("-P", name)]
    calls = "pwrite64,write,fdatasync,fsync,unlink,ftruncate"
    command = [
        "strace",
        "-f",
        "-e",
        f"trace={calls}",
        *(["-e", f"inject={inject}"] if inject else []),
        *paths,
    ]
    with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        text = tracer.stderr.read()
    return wait(pid), text


def catalog_steps(change: Change, root: Path) -> Iterator[tuple[str, int]]:
    """Each system call that SQLite makes on its files in a change: its name and its number among its like."""
    status, text = traced(change, root, "")
    assert status == 0
    seen: dict[str, int] = {}
    for call in re.findall(r"^(?:\[pid +\d+\] )?(\w+)\(", text, re.MULTILINE):
        seen[call] = seen.get(call, 0) + 1
        yield call, seen[call]


@pytest.mark.parametrize("name", ["save", "rm and gc"])
def test_a_change_killed_at_any_step_of_the_catalog(golden: Path, tmp_path: Path, name: str) -> None:
    change, saved, maybe = CHANGES[name]
    steps = list(catalog_steps(change, copy(golden, tmp_path / "r")))
    assert {call for call, _ in steps} >= {"pwrite64", "fdatasync", "unlink"}
    if len(steps) > 40:
        steps = random.Random(0).sample(steps, 40)
    for call, number in steps:
        root = copy(golden, tmp_path / "r")
        status, _ = traced(change, root, f"{call}:signal=SIGKILL:when={number}")
        assert status == -signal.SIGKILL, (call, number)
        check_whole(root, saved, maybe)


def test_saves_under_load_killed_at_random(tmp_path: Path, chance: random.Random) -> None:
    root = tmp_path / "r"
    Registry(root).catalog.close()
    acknowledged: dict[str, int] = {}
    for turn in range(6):
        last, first = chance.randrange(20, 400), 100 * turn
        reading, writing = os.pipe()

        def run(last: int = last, first: int = first, writing: int = writing) -> None:
            durable.disk = Stepwise(lambda count, when, path: kill_me() if count > last else None)
            registry = Registry(root, create=False)
            for number in range(first, first + 100):
                name = save(registry, number)
                os.write(writing, f"{name} {number}\n".encode())
                if number % 3 == 0:
                    registry.collect_garbage(grace=0)

        pid = fork(run)
        os.close(writing)
        with os.fdopen(reading) as lines:
            done = [line.split() for line in lines]
        assert wait(pid) == -signal.SIGKILL
        acknowledged |= {name: int(number) for name, number in done}
        interrupted = {f"net:v{len(acknowledged) + 1}": first + len(done)}
        check_whole(root, acknowledged, interrupted)
        registry = Registry(root, create=False)
        if {version.name for version in all_versions(registry)} & set(interrupted):
            acknowledged |= interrupted
        registry.catalog.close()
    assert len(acknowledged) > 3


def test_processes_killed_from_outside_at_any_time(tmp_path: Path, chance: random.Random) -> None:
    root = tmp_path / "r"
    Registry(root).catalog.close()
    acknowledged: dict[str, int] = {}
    for turn in range(5):
        reading, writing = os.pipe()

        def work(first: int, writing: int = writing) -> None:
            registry = Registry(root, create=False)
            for number in range(first, first + 1_000):
                os.write(writing, f"saving {number}\n".encode())
                os.write(writing, f"{save(registry, number, f'net{number % 2}')} {number}\n".encode())

        def collect() -> None:
            registry = Registry(root, create=False)
            while True:
                registry.collect_garbage(grace=0)

        children = [fork(lambda first=10_000 * turn + 1_000 * i: work(first)) for i in range(3)]
        children.append(fork(collect))
        os.close(writing)
        with os.fdopen(reading) as lines:
            told = [lines.readline() for _ in range(6)]  # saves are going on
            time.sleep(chance.uniform(0.0, 0.4))
            for child in children:
                os.kill(child, signal.SIGKILL)
            assert [wait(child) for child in children] == [-signal.SIGKILL] * len(children)
            told += lines
        begun = {int(number) for what, number in map(str.split, told) if what == "saving"}
        done = {name: int(number) for name, number in map(str.split, told) if name != "saving"}
        assert done
        acknowledged |= done
        registry = Registry(root, create=False)
        present = {version.name: version.epoch or 0 for version in all_versions(registry)}
        finished = {name: number for name, number in present.items() if name not in acknowledged}
        registry.catalog.close()
        assert set(finished.values()) <= begun - set(done.values())
        assert len(finished) <= 3
        acknowledged |= finished
        check_whole(root, acknowledged)
    assert len(acknowledged) > 5
