"""`registry ui` as a process: what it prints, what it opens, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from registry import Registry


@contextlib.contextmanager
def serving(
    root: Path, *words: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, with what it printed; it is ended as by Ctrl-C."""
    program = [sys.executable, "-m", "registry.cli", "--root", str(root), "ui", "--json", *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        program, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment}
    )
    assert process.stdout
    lines = []
    while not lines or lines[-1] != "}\n":
        line = process.stdout.readline()
        assert line, process.communicate()
        lines.append(line)
    try:
        yield process, json.loads("".join(lines))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")


def read(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(address, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("names", "title"),
    [
        ([], "Models"),
        (["lenet5"], "lenet5"),
        (["lenet5@production"], "lenet5:v2"),
        (["lenet5:v1", "lenet5:v3"], "lenet5:v1 → lenet5:v3"),
    ],
)
def test_it_begins_at_the_page_of_what_is_named(filled: Registry, names: list[str], title: str) -> None:
    with serving(filled.root, *names) as (_, told):
        assert f"<title>{title} · torch-registry</title>" in read(told["address"])


def test_ctrl_c_ends_it_and_the_process_that_reads_tensors(filled: Registry) -> None:
    with serving(filled.root, "lenet5:v1", "lenet5:v3") as (process, told):
        read(told["address"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children += [
            child
            for task in Path(f"/proc/{process.pid}/task").glob("*/children")
            for child in task.read_text().split()
        ]
        assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_what_it_prints_over_ssh_leads_there(filled: Registry) -> None:
    with serving(filled.root, SSH_CONNECTION="10.0.0.9 50000 10.0.0.1 22", USER="ada") as (_, told):
        port = told["address"].partition("localhost:")[2].partition("/")[0]
        assert told["tunnel"] == f"ssh -L {port}:127.0.0.1:{port} ada@10.0.0.1"


def test_it_takes_the_next_port_unless_one_is_asked_for(filled: Registry, run: Run) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", 6007))
            taken.listen()
        with serving(filled.root) as (_, told):
            assert ":6007/" not in told["address"]
        refused = run("ui", "--port", 6007, "--no-open")
    assert refused.status == 1
    assert refused.err.startswith("error: port 6007 of 127.0.0.1 cannot be used")
    assert "hint:  leave --port out to take a free one" in refused.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lenet55"], "did you mean 'lenet5'?"),
        (["lenet5:v99"], "its newest are v4, v3"),
        (["lenet5/run-99"], "there is no run 'lenet5/run-99'"),
        (["lenet5:v1", "lenet5:v99"], "its newest are v4, v3"),
        (["lenet5", "lenet5:v1", "lenet5:v2"], "leave the others out"),
        (["--host", "0.0.0.0", "--no-token"], "leave it out"),
        (["--base-path", "proxy"], "begins with a slash"),
    ],
)
def test_a_mistake_is_told_before_anything_is_served(
    filled: Registry, run: Run, words: list[str], says: str
) -> None:
    done = run("ui", "--no-open", *words)
    assert done.status in (1, 2)
    assert says in done.err
