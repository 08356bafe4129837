"""Trainings that are killed and resumed: each in a process of its own, which prints a fingerprint of how it ended."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "integrations.md"


def fingerprint(*parts: Any) -> str:
    """SHA-256 over all tensors and numbers of states, with their names."""
    found = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item)
        else:
            found.update(f"{name}={value!r}".encode())

    for i, part in enumerate(parts):
        add(str(i), part.state_dict())
    return found.hexdigest()


def examples_of(section: str) -> list[str]:
    """The Python of a section of the page about integrations."""
    return re.findall(r"^```python\n(.*?)^```$", _section(section), re.MULTILINE | re.DOTALL)


def commands_of(section: str) -> list[str]:
    """The commands of a section of the page about integrations, without `registry`."""
    return re.findall(r"^\$ registry (.*)$", _section(section), re.MULTILINE)


def _section(name: str) -> str:
    return PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def kill_me() -> None:
    """The end, as by the system when memory is short."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def train(script: str, *words: object, count: int = 1, killed: bool = False) -> str:
    """Run a script of this folder, alone or under torchrun, offline.

    Returns:
        What it printed last, behind `END`; empty if it was killed, as it should be.
    """
    command = [sys.executable]
    if count > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={_free_port()}"]
        command += [*launch, "--master-addr=127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(HERE / script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    ends = sorted(line for line in done.stdout.splitlines() if line.startswith("END"))
    if killed:
        status = -signal.SIGKILL if count == 1 else 1
        assert (done.returncode, ends) == (status, []), done.stdout + done.stderr
        return ""
    assert done.returncode == 0, done.stdout + done.stderr
    return "\n".join(ends)


def train_forked(main: Callable[..., str], *words: object, count: int = 1, killed: bool = False) -> list[str]:
    """Call the main function of a script of this folder in processes of their own, offline.

    Where a framework takes seconds to import, this is quicker than `train`: a server imports the script once, does nothing
    else, and forks each process.

    Args:
        count: how many processes train together; each finds the others as under torchrun.

    Returns:
        What each process returned; empty if they were killed, as they should be.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([main.__module__])
    found = forking.SimpleQueue()
    places = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = []
    for rank in range(count):
        environment = places | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        given = (main, [*map(str, words)], environment, found)
        processes.append(forking.Process(target=_call, args=given))
        processes[-1].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if killed else 0] * count
    return [] if killed else sorted(found.get() for _ in processes)


def _call(main: Callable[..., str], words: list[str], environment: dict[str, str], found: Any) -> None:
    os.environ |= environment
    # Workers of loaders are forked, as in a program of its own.
    multiprocessing.set_start_method("fork", force=True)
    found.put(f"{environment.get('RANK', '0')} {main(words)}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
