"""SIGKILL at each system call of a save, for each integration: nothing that was acknowledged is lost, and training goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import soak
from support import broken_rules
from train_kills import RULES, TRAININGS, main

from registry import Registry
from registry.integrations import pointers

STOP = 4
"""The number of the save that is killed. It is the second one after which an older version goes."""

CALLS = (
    "openat,write,writev,pwrite64,pwritev,sendfile,copy_file_range,fallocate,ftruncate,fsync,fdatasync,rename,renameat,renameat2,"
    "link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
"""The system calls that change files."""

POINTS = 12
"""At how many calls of a save the suite kills, others each time; a soak kills at all of them."""


def started(name: str, root: Path, stop: int | None = None) -> tuple[BaseProcess, Connection]:
    """Start a training. A server has the frameworks loaded, and forks it."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONWARNINGS": "ignore",
    }
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([main.__module__])
    test, training = forking.Pipe()
    process = forking.Process(target=main, args=(name, str(root), training, stop))
    process.start()
    training.close()
    return process, test


def told(test: Connection) -> Iterator[str]:
    """What a training tells until it ends: ids of versions, and last a fingerprint."""
    with contextlib.suppress(EOFError):
        while True:
            yield test.recv()


def trained(name: str, root: Path) -> str:
    """Train to the end; returns the fingerprint."""
    process, test = started(name, root)
    (*_, end) = told(test)
    process.join()
    assert process.exitcode == 0
    return end


def traced(name: str, root: Path, inject: str = "") -> tuple[int | None, list[str], str]:
    """Train under strace from the save on that is to be killed, and until the next.

    Returns:
        The exit status, the ids of the versions that were acknowledged, and what strace saw.
    """
    process, test = started(name, root, STOP)
    acknowledged = []
    while (said := test.recv()) != "ready":
        acknowledged.append(said)
    trace = root / "trace"
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={CALLS}"]
    command += ["-e", f"inject={inject}"] if inject else []
    with subprocess.Popen([*command, "-p", str(process.pid)], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        test.send("go")
        acknowledged += told(test)
        process.join()
        tracer.stderr.read()
    return process.exitcode, acknowledged, trace.read_text()


def numbered(trace: str) -> Iterator[tuple[str, int, str]]:
    """The calls that strace saw: the name of each, its number among its like in its thread, and what it was given."""
    seen = dict[tuple[str, str], int]()
    for thread, call, given in re.findall(r"^(\d+) +(\w+)\((.*)", trace, re.MULTILINE):
        seen[thread, call] = seen.get((thread, call), 0) + 1
        yield call, seen[thread, call], given


def points(trace: str, root: Path) -> list[tuple[str, int]]:
    """The calls that change something below a folder: the name of each, and its number among its like in its thread."""
    found = []
    for call, number, given in numbered(trace):
        is_reading = call == "openat" and not re.search(r"O_(WRONLY|RDWR|CREAT)", given)
        if str(root) in given and not is_reading:
            found.append((call, number))
    return found


def chosen(every: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The calls at which a save is killed: in a soak all of them, or as many as there is time for; in the suite a few.

    The suite passes over calls between others of their kind, as SQLite makes many.
    """
    if "SOAK_SECONDS" in os.environ:
        end = time.monotonic() + soak.seconds(0)
        for one in random.sample(every, len(every)):
            if time.monotonic() < end:
                yield one
        return
    turns = [
        one
        for before, one, after in zip([("", 0), *every], every, [*every[1:], ("", 0)], strict=False)
        if not before[0] == one[0] == after[0]
    ]
    yield from random.sample(turns, min(POINTS, len(turns)))


def check(root: Path, acknowledged: list[str], kept: int) -> None:
    """See that what is below a folder after a kill is whole.

    Args:
        acknowledged: the versions that must be there, unless newer ones took their place.
        kept: how many of the newest versions the rules keep.
    """
    registry = Registry(root / "registry", create=False)
    assert registry.verify().problems == ()
    assert broken_rules(registry) == []
    present = [version.id for version in registry.versions("net")][::-1]
    unheard = [version_id for version_id in present if version_id not in acknowledged]
    assert len(unheard) <= 1
    newest = [*dict.fromkeys(acknowledged), *unheard][-kept:]
    assert set(newest) <= set(present)
    assert registry.resolve("net@latest").id == newest[-1]
    for version_id in present:
        registry[version_id].load()
    for folder, _, _ in os.walk(root):
        for path, version_id in pointers.in_folder(folder).items():
            assert version_id in present, path
    registry.catalog.close()


@pytest.mark.parametrize("name", TRAININGS)
def test_a_save_killed_at_each_of_its_system_calls(tmp_path: Path, name: str) -> None:
    kept = 1 if name == "lightning_best" else RULES["keep_last"]
    whole = trained(name, tmp_path / "whole")
    counted = tmp_path / "counted"
    status, acknowledged, trace = traced(name, counted)
    assert status == 0
    check(counted, acknowledged, kept)
    every = points(trace, counted)
    killed = 0
    for i, (call, number) in enumerate(chosen(every)):
        # A failing test shows it.
        print(f"killed before {call} number {number}")
        root = tmp_path / str(i)
        status, acknowledged, trace = traced(name, root, f"{call}:signal=SIGKILL:when={number}")
        if status == 0:
            # Threads share their work anew each time, and this time none of them came so far.
            assert (call, number) not in {(call, number) for call, number, _ in numbered(trace)}
        else:
            assert status == -signal.SIGKILL, (call, number)
            killed += 1
        check(root, acknowledged, kept)
        assert trained(name, root) == whole, (call, number)
        shutil.rmtree(root)
    assert killed > i / 2
    soak.count("integrations", **{name: killed})
