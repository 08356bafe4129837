"""Programs that fork, and programs that go elsewhere, while they have a registry open."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from support import broken_rules, fork, save, wait

from registry import Registry
from registry.log import forking
from registry.store.errors import Conflict, Invalid, Unsupported


def test_a_child_that_is_forked_during_a_commit_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a DataLoader are forked at any moment of a save. This commit takes longer than a fork waits."""
    monkeypatch.setattr(forking, "_PATIENCE", 0.1)
    registry = Registry(tmp_path / "r")
    inside, go_on = threading.Event(), threading.Event()

    def compute(view: object) -> list[object]:
        inside.set()
        go_on.wait()
        return []

    committing = threading.Thread(target=lambda: registry.catalog.commit(compute))  # type: ignore[arg-type]
    committing.start()
    inside.wait()
    reading, writing = os.pipe()
    child = fork(lambda: os.read(reading, 1))
    try:
        go_on.set()
        committing.join()
        began = time.monotonic()
        assert save(registry, 1) == "net:v1"
        assert time.monotonic() - began < 30
        other = fork(lambda: save(Registry(tmp_path / "r"), 2))
        assert wait(other) == 0
    finally:
        os.write(writing, b"x")
        wait(child)
    assert broken_rules(registry) == []


def test_a_child_that_is_forked_beside_a_commit_saves(tmp_path: Path) -> None:
    """SQLite would have the child believe that it holds its parent's locks."""
    registry = Registry(tmp_path / "r")
    inside = threading.Event()

    def compute(view: object) -> list[object]:
        inside.set()
        time.sleep(0.5)
        return []

    committing = threading.Thread(target=lambda: registry.catalog.commit(compute))  # type: ignore[arg-type]
    committing.start()
    inside.wait()
    child = fork(lambda: save(Registry(tmp_path / "r"), 1))
    assert not committing.is_alive() or committing.join(5) is None
    assert wait(child) == 0
    assert save(registry, 2) == "net:v2"


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_child_keeps_no_lock_of_a_parent_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_waiting: bool
) -> None:
    """It is forked while another thread holds the lock, or waits for it and gets it later."""
    monkeypatch.setattr(forking, "_PATIENCE", 0.1)
    registry = Registry(tmp_path / "r")
    reading, writing = os.pipe()
    alive, dead = os.pipe()

    def parent() -> None:
        mine, inside, asked = Registry(tmp_path / "r"), threading.Event(), threading.Event()

        def compute(view: object) -> list[object]:
            inside.set()
            time.sleep(60)
            return []

        def commit() -> None:
            asked.set()
            mine.catalog.commit(compute)  # type: ignore[arg-type]

        with contextlib.ExitStack() as stack:
            if is_waiting:
                stack.enter_context(mine.catalog.journal.locked())
            threading.Thread(target=commit, daemon=True).start()
            asked.wait()
            time.sleep(0.2)
            pid = fork(lambda: os.read(alive, 1))
        inside.wait()
        os.write(writing, f"{pid}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(parent)) == -signal.SIGKILL
    child = int(os.read(reading, 20))
    try:
        began = time.monotonic()
        assert save(registry, 1) == "net:v1"
        assert time.monotonic() - began < 30
    finally:
        os.write(dead, b"x")
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_child_of_a_run_is_told_that_the_run_is_its_parents(tmp_path: Path) -> None:
    """It would wait for a save that goes on in the parent alone."""
    registry, net = Registry(tmp_path / "r"), torch.nn.Linear(2, 2)

    def child() -> None:
        for call in (run.wait, lambda: run.save(model=net)):
            with pytest.raises(Conflict, match=r"net/run-1 is the run of process \d+, which forked this one"):
                call()

    with registry.run("net") as run:
        run.save(model=net, wait=False)
        assert wait(fork(child)) == 0
    assert registry["net"].version == 1


def test_a_child_that_leaves_a_run_of_its_parent_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    net = torch.nn.Linear(2, 2)

    def child() -> None:
        run.__exit__(None, None, None)

    with registry.run("net") as run:
        run.save(model=net, wait=False)
        pid = fork(child)
        assert wait(pid) == 0
        assert registry.runs["net/run-1"].state == "running"
        run.save(model=net)
    assert registry.runs["net/run-1"].state == "finished"
    assert registry["net"].version == 2


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(there)
    save(Registry(".registry"), 9, "other")
    monkeypatch.chdir(here)
    registry = Registry(".registry")
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(1, 1))
        os.chdir(there)
        run.save(model=torch.nn.Linear(1, 1))
    assert registry["net"].version == 2
    assert list(Registry(there / ".registry")) == ["other"]
    with pytest.raises(Exception, match=r"^there is no registry at nowhere; make one"):
        Registry("nowhere", create=False)


@pytest.mark.parametrize("left", [0, 8, 4 * 999])
def test_a_tensor_whose_memory_was_cut_is_refused(tmp_path: Path, left: int) -> None:
    tensor = torch.zeros(1_000)
    tensor.untyped_storage().resize_(left)
    with pytest.raises(Unsupported, match="memory was freed or cut"):
        Registry(tmp_path / "r").save("net", {"model": {"w": tensor}})
    whole = torch.zeros(1_000)[5:].view(5, 199)[:, ::2]
    Registry(tmp_path / "r").save("net", {"model": {"w": whole}})


@pytest.mark.damages
@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "format = " + "9" * 10_000, "format = 2 x"])
def test_settings_of_any_kind_are_one_line(tmp_path: Path, text: str) -> None:
    root = tmp_path / "r"
    Registry(root)
    (root / "registry.toml").chmod(0o644)
    (root / "registry.toml").write_text(text)
    with pytest.raises(Invalid, match=r"it needs one line: format = 2$"):
        Registry(root)


@pytest.mark.parametrize(
    ("field", "value"),
    [("run", "x"), ("source", "abc"), ("provenance", {"kinds": 5}), ("provenance", {"network": [1]})],
)
def test_what_verify_would_call_malformed_is_not_saved(tmp_path: Path, field: str, value: object) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(Invalid, match=f"^{field}.* is not of the kind"):
        registry.save("net", {"model": {"w": torch.ones(1)}}, **{field: value})
    assert registry.names() == []


@pytest.mark.damages
def test_verify_tells_that_the_log_and_its_copy_are_gone(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    registry.catalog.close()
    for path in [*registry.root.glob("catalog.sqlite*"), *registry.root.glob("journal/*")]:
        path.unlink()
    problems = [problem.message for problem in Registry(registry.root).verify().problems]
    assert any("the log is gone" in problem and "rebuild --adopt" in problem for problem in problems), (
        problems
    )
