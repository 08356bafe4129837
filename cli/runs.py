"""Training sessions: runs, logs, board."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.catalog.documents import run_document
from registry.catalog.runs import INNER, LOG, RunInfo
from registry.cli.options import ReferenceType, RunType, command
from registry.cli.output import counted, nothing, print_json, say, time_of, warn
from registry.cli.suggestions import WrongUse
from registry.cli.tables import Column, Field, TableView, print_table
from registry.store.errors import Conflict, NotFound, storage_errors
from registry.store.places import open_file, opened_folder

if TYPE_CHECKING:
    from registry.registry import Registry


_LONGEST_LOG = 4 << 20
"""Bytes that are shown from the end of a run's log."""

_LONGEST_LINE = 1 << 20
"""Characters of a log line that are printed at once."""


@command("runs", "registry runs lenet5")
@click.argument("model", required=False, type=ReferenceType())
def runs(model: str | None, registry: Registry, view: TableView, as_json: bool) -> None:
    """List training sessions, the newest first."""
    found = registry.runs.find(model)
    if model and not found:
        model = registry.resolve(model).model
    if not found and not as_json:
        nothing(f"no runs{f' of {model}' if model else ''} yet; start one with: registry train lenet5")
        return
    counts = registry.runs.counts()
    states = [registry.runs.shown_state(info) for info in found]
    if as_json:
        rows = [
            run_document(info, state=state, versions=counts.get(info.name, 0))
            for info, state in zip(found, states, strict=True)
        ]
        print_json({"runs": rows})
        return
    fields: list[Field[tuple[RunInfo, str]]] = [
        (Column("RUN", is_text=True), lambda one: one[0].name),
        (Column("STATE", 1, is_text=True), lambda one: one[1]),
        (Column("VERSIONS", 2), lambda one: counts.get(one[0].name, 0)),
        (Column("STARTED", 3), lambda one: time_of(one[0].started)),
        (Column("TOOK", 4), lambda one: _duration(one[0])),
    ]
    print_table(fields, list(zip(found, states, strict=True)), view)


def _duration(info: RunInfo) -> str:
    """The time that a run took. It is empty while the run goes on, and a question mark if its times are damaged."""
    if not info.ended:
        return ""
    try:
        seconds = (datetime.fromisoformat(info.ended) - datetime.fromisoformat(info.started)).total_seconds()
    except (TypeError, ValueError):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _run_of(registry: Registry, text: str) -> RunInfo:
    """The run of that name, or the run that saved the version of that reference.

    Raises:
        NotFound: if there is no such run or version, or no run saved the version.
    """
    if "/" in text:
        return registry.runs[text]
    version = registry.resolve(text)
    run = version.record.get("run")
    if not run:
        raise NotFound(f"{version.name} was not saved by a run, so it has no log and no events")
    return registry.runs[run]


@command("logs", "registry logs lenet5@best\nregistry logs lenet5/run-3 -f")
@click.argument("source", type=RunType(), metavar="REFERENCE|RUN")
@click.option("--follow", "-f", is_flag=True, help="Print new lines as they come, until Ctrl-C.")
def logs(source: str, follow: bool, registry: Registry, as_json: bool) -> None:
    """Show the log file of a run.

    For a version, the command shows the log of the run that saved it.
    """
    info = _run_of(registry, source)
    path = registry.root / "runs" / info.name / LOG
    if as_json and follow:
        raise WrongUse("--json prints one document, so it excludes --follow", "leave one of them out")
    with storage_errors(path):
        try:
            fd = open_file(path, os.O_RDONLY, inner=INNER)
        except FileNotFoundError:
            raise NotFound(f"{path}: the log of {info.name} is not there any more") from None
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        before = os.fstat(fd).st_size - _LONGEST_LOG
        if before > 0:
            warn(f"only the last {_LONGEST_LOG >> 20} MB are shown; the whole log is in {path}")
            file.seek(before)
            # Skip the rest of a line that begins before this place.
            file.readline(_LONGEST_LINE)
        if as_json:
            lines = file.read(_LONGEST_LOG).splitlines()
            print_json({"run": info.name, "file": str(path), "lines": lines})
            return
        while True:
            while line := file.readline(_LONGEST_LINE):
                say(line.rstrip("\n"))
            sys.stdout.flush()
            over = registry.runs[info.name].state != "running" or registry.runs.is_lost(info)
            if not follow or over:
                return
            time.sleep(0.3)


@command("board", "registry board\nregistry board lenet5/run-12 lenet6@best --port 6007")
@click.argument("sources", nargs=-1, type=RunType(), metavar="[REFERENCE|RUN]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", default=6006, show_default=True, type=click.IntRange(1, 65_535), help="The port to listen on."
)
def board(sources: tuple[str, ...], host: str, port: int, registry: Registry, as_json: bool) -> None:
    """Show runs in TensorBoard, until Ctrl-C.

    Without arguments, TensorBoard shows all runs. A version stands for the run that saved it.
    """
    chosen = [_run_of(registry, source).name for source in sources]
    folder = (registry.root / "runs").absolute()
    if not folder.is_dir():
        raise NotFound("there are no runs yet", "start one with: registry train lenet5")
    _check_port(host, port)
    with contextlib.ExitStack() as stack:
        if chosen:
            # Lazy: start-up.
            import tempfile

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="registry-board-")))
            for name in chosen:
                with (
                    contextlib.suppress(FileNotFoundError),
                    opened_folder(registry.root / "runs" / name, INNER),
                ):
                    pass
            _link(registry.root / "runs", chosen, folder)
        address = _launch(folder, host, port)
        forward = tunnel(port)
        if as_json:
            print_json({"address": address, "runs": list(dict.fromkeys(chosen)) or None, "tunnel": forward})
        else:
            shown = counted(len(set(chosen)), "run") if chosen else "all runs"
            say(f"TensorBoard shows {shown} at {address}")
            if forward:
                say(f"you are on a remote host; on your own machine run: {forward}")
            say("Ctrl-C ends it")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3_600)


def _link(runs: Path, names: Sequence[str], folder: Path) -> None:
    """Fill a folder with links to the chosen runs alone. TensorBoard labels a run by its path below the folder."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink((runs / name).absolute(), folder / name)


def _launch(folder: Path, host: str, port: int) -> str:
    """Start TensorBoard and return its address.

    Raises:
        Conflict: if it does not start.
    """
    # Lazy: loads tensorboard.
    from tensorboard import program

    server = program.TensorBoard()
    where = ["--logdir", str(folder), "--host", host, "--port", str(port)]
    server.configure(argv=["registry board", *where, "--reload_interval", "5"])
    try:
        return str(server.launch())
    except Exception as error:
        raise Conflict(f"TensorBoard did not start: {error}") from error


def _check_port(host: str, port: int) -> None:
    """Check that a port is free.

    Raises:
        Conflict: if it is taken. The message names a free port, if one is near.
    """
    # Lazy: start-up.
    import socket

    def is_free(number: int) -> bool:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except OSError:
                return False
            return True

    if not is_free(port):
        other = next((n for n in range(port + 1, min(port + 100, 65_536)) if is_free(n)), None)
        advice = f"--port {other} is free" if other else f"check that {host} is an address of this machine"
        raise Conflict(f"port {port} of {host} is taken", advice)


def tunnel(port: int) -> str | None:
    """The `ssh` command that forwards the port to the user's own machine; None without SSH."""
    parts = os.environ.get("SSH_CONNECTION", "").split()
    if len(parts) != 4:
        return None
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "USER"
    door = "" if parts[3] == "22" else f" -p {parts[3]}"
    return f"ssh -L {port}:127.0.0.1:{port}{door} {user}@{parts[2]}"
