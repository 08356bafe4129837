"""Many processes at once: no lost version, no dangling tensor, whatever gc does meanwhile, without file locks."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Stepwise,
    all_versions,
    check_whole,
    collect,
    copy,
    fork,
    in_child,
    is_state,
    kill_me,
    save,
    state,
    wait,
)

from registry import Registry
from registry.store import durable
from registry.store.store import Store

PROCESSES, SAVES = 8, 5


def savers(root: Path, model_of: Callable[[int], str]) -> dict[str, int]:
    """Let processes save and load, and gc run, all at once; what they saved."""
    stop_reading, stop = os.pipe()
    results_reading, results = os.pipe()

    def collect() -> None:
        os.set_blocking(stop_reading, False)
        registry = Registry(root)
        while True:
            registry.collect_garbage(grace=0)
            try:
                if os.read(stop_reading, 1):
                    return
            except BlockingIOError:
                pass

    def work(process: int) -> None:
        registry = Registry(root)
        for i in range(SAVES):
            number = 100 * process + i if i % 2 else i  # every other state is saved by all of them
            name = save(registry, number, model_of(process))
            assert is_state(registry[name].load(), number)
            assert is_state(registry[name].load(copy=True), number)
            os.write(results, f"{name} {number}\n".encode())

    collectors = [fork(collect) for _ in range(2)]
    workers = [fork(lambda process=process: work(process)) for process in range(PROCESSES)]
    statuses = [wait(pid) for pid in workers]
    os.write(stop, b"xx")
    assert [wait(pid) for pid in [*collectors]] == [0, 0]
    assert statuses == [0] * PROCESSES
    for descriptor in (stop, stop_reading, results):
        os.close(descriptor)
    with os.fdopen(results_reading) as lines:
        return {name: int(number) for name, number in map(str.split, lines)}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where flock silently does nothing, on some network file systems."""
    import fcntl

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, lambda *_: None)


@pytest.mark.parametrize("models", [1, PROCESSES])
def test_processes_save_and_load_while_gc_runs(tmp_path: Path, models: int, no_locks: None) -> None:
    root = tmp_path / "r"
    Registry(root).catalog.close()
    saved = savers(root, lambda process: f"net{process % models}")
    assert len(saved) == PROCESSES * SAVES
    by_model: dict[str, list[int]] = {}
    for name in saved:
        model, _, version = name.partition(":v")
        by_model.setdefault(model, []).append(int(version))
    assert len(by_model) == models
    for versions in by_model.values():
        assert sorted(versions) == list(range(1, len(versions) + 1))
    check_whole(root, saved)


def test_processes_make_a_registry_at_once(tmp_path: Path) -> None:
    root = tmp_path / "r"
    children = [fork(lambda number=number: save(Registry(root), number)) for number in range(PROCESSES)]
    assert [wait(pid) for pid in children] == [0] * PROCESSES
    registry = Registry(root)
    assert sorted(version.version for version in all_versions(registry)) == list(range(1, PROCESSES + 1))


def test_a_save_that_is_overtaken_again_and_again_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gc without grace takes away what each save has just written, until the save keeps others out."""
    registry = Registry(tmp_path / "r")
    put = Store.put
    overtaken = []

    def overtake(store: Store, *given: Any, **named: Any) -> Any:
        stored = put(store, *given, **named)
        if not registry.catalog.connection().in_transaction:
            overtaken.append(collect(Registry(registry.root), grace=0, now=time.time() + 10))
        return stored

    monkeypatch.setattr(Store, "put", overtake)
    assert save(registry, 1) == "net:v1"
    assert len(overtaken) >= 3
    assert all(found.manifests == 1 for found in overtaken)
    check_whole(registry.root, {"net:v1": 1})


def stopped_at(root: Path, number: int, where: str) -> int:
    """A child that saves, and stops itself (SIGSTOP) after the step on the first path with `where` in it."""

    def at(count: int, when: str, path: Path) -> None:
        if when == "after" and where in str(path):
            os.kill(os.getpid(), signal.SIGSTOP)
            durable.disk = durable.Disk()

    def run() -> None:
        registry = Registry(root)
        durable.disk = Stepwise(at)
        save(registry, number)

    pid = fork(run)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


@pytest.mark.parametrize("where", ["/packs/", "/manifests/"])
def test_gc_between_the_files_and_the_commit_of_a_save_costs_nothing(tmp_path: Path, where: str) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    pid = stopped_at(root, 2, where)
    for _ in range(2):
        registry.collect_garbage(grace=0)
    assert list(root.glob("packs/*/*")) != []
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    registry.catalog.close()
    check_whole(root, {"net:v1": 1, "net:v2": 2})


def test_a_save_revives_what_gc_has_condemned(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    registry.remove(["net:v1"])
    collect(registry, grace=3_600)  # marked, and waiting
    assert save(registry, 1) == "net:v2"
    collect(registry, grace=3_600, now=time.time() + 1e6)
    assert is_state(registry["net:v2"].load(), 1)
    registry.catalog.close()
    check_whole(tmp_path / "r", {"net:v2": 1})


def test_gc_removes_what_a_save_relied_on_and_the_save_writes_it_again(tmp_path: Path) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.remove(["net:v1"])
    registry.catalog.close()
    pid = stopped_at(root, 1, "/manifests/")  # every tensor was there when it looked
    assert registry.collect_garbage(grace=0).packs == 1
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    registry.catalog.close()
    check_whole(root, {"net:v2": 1})


def test_gc_killed_at_any_step_loses_nothing_and_is_repeated(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "golden")
    for number in (1, 2, 3):
        save(registry, number)
    registry.remove(["net:v2", "net:v3"])
    registry.catalog.close()
    for step in range(100):
        root = copy(tmp_path / "golden", tmp_path / "r")

        def run(root: Path = root, step: int = step) -> None:
            durable.disk = Stepwise(lambda count, when, path: kill_me() if count == step else None)
            Registry(root).collect_garbage(grace=0)

        status = in_child(run)
        check_whole(root, {"net:v1": 1})
        if status == 0:
            break
    assert step > 3


@pytest.mark.parametrize("locks", [True, False])
def test_a_temporary_file_stays_while_its_writer_lives(
    tmp_path: Path, request: pytest.FixtureRequest, locks: bool
) -> None:
    """Whatever its name says; where locks do nothing, for as long as a file may be written at least."""
    if not locks:
        request.getfixturevalue("no_locks")
    registry = Registry(tmp_path / "r")
    tmp = registry.store.tmp
    live = durable.NewFile(tmp)
    dead = tmp / f"{durable.host()}-{os.getpid()}-1"
    for path in (dead, tmp / "odd"):
        path.write_bytes(b"x")
    hour_ago = time.time() - 4_000
    if not locks:
        assert registry.collect_garbage(grace=0).temporary == 0
        os.utime(dead, (hour_ago, hour_ago))
        assert registry.collect_garbage(grace=0).temporary == 1
        return
    os.utime(live.path, (hour_ago, hour_ago))
    assert registry.collect_garbage(grace=3_600).temporary == 0
    assert registry.collect_garbage(grace=0).temporary == 2
    assert [path.name for path in tmp.iterdir()] == [live.path.name]
    live.discard()


def test_a_writer_whose_temporary_file_is_gone_starts_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    taken: list[Path] = []

    def take(count: int, when: str, path: Path) -> None:
        if path.parent.name == "tmp" and when == "half" and path.parent.parent not in taken:
            taken.append(path.parent.parent)
            path.unlink()

    monkeypatch.setattr(durable, "disk", Stepwise(take))
    assert save(registry, 1) == "net:v1"
    assert taken
    check_whole(registry.root, {"net:v1": 1})


def test_a_registry_survives_fork_pickling_and_threads(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    assert in_child(lambda: save(registry, 2)) == 0
    assert is_state(registry["net:v2"].load(), 2)
    again = pickle.loads(pickle.dumps(registry))
    assert is_state(again["net:v2"].load(), 2)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            assert is_state(registry[save(registry, number)].load(), number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(version.version for version in all_versions(registry)) == list(range(1, 9))


def test_a_loaded_checkpoint_outlives_its_removal(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    loaded = registry["net:v1"].load()
    registry.remove(["net:v1"])
    registry.collect_garbage(grace=0)
    assert is_state(loaded, 1)


def test_values_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    tree = state(1)
    checkpoint = registry.save("net", tree)
    tree["model"]["own"].fill_(7)
    tree["optimizer"]["steps"].append(9)
    assert is_state(checkpoint.load(), 1)
    loaded = checkpoint.load()
    loaded["model"]["own"].add_(1)
    assert is_state(checkpoint.load(), 1)
    assert torch.equal(loaded["model"]["own"], torch.full((50, 30), 2.0))
