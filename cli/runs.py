"""Looking back: runs, history, best, lineage, log, board."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.runs import INNER, LOG, RunInfo
from registry.cli.options import Reference, command, direction
from registry.cli.output import (
    counted,
    number,
    print_json,
    print_table,
    say,
    size,
    time_of,
    version_document,
    warn,
)
from registry.store.errors import Conflict, NotFound, storage_errors
from registry.store.places import open_file, opened_folder

if TYPE_CHECKING:
    from registry.catalog.versions import Version
    from registry.registry import Registry


_DEEPEST = 50
"""Levels of the tree that `lineage` shows."""

_LONGEST_LOG = 4 << 20
"""Bytes at the end of a run's log that are shown."""

_LONGEST_LINE = 1 << 20


@command("runs", "registry runs lenet5")
@click.argument("model", required=False, type=Reference())
def runs(model: str | None, registry: Registry, as_json: bool) -> None:
    """List training sessions, the newest first."""
    found = registry.runs.find(model)
    if not found:
        if model:
            registry.resolve(model)
        elif not as_json:
            say("No runs yet; start one with: registry train lenet5")
            return
    counts = registry.runs.counts()
    states = [_state(registry, info) for info in found]
    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "name": info.name,
                "model": info.model,
                "state": state,
                "started": info.started,
                "ended": info.ended,
                "versions": counts.get(info.name, 0),
                "config": info.record.get("config", {}),
            }
            for info, state in zip(found, states, strict=True)
        ]
        print_json({"runs": rows})
        return
    print_table(
        ("RUN", "STATE", "VERSIONS", "STARTED", "TOOK"),
        [
            (info.name, state, counts.get(info.name, 0), time_of(info.started), _duration(info))
            for info, state in zip(found, states, strict=True)
        ],
    )


def _state(registry: Registry, info: RunInfo) -> str:
    return "lost (its process is gone)" if registry.runs.is_lost(info) else info.state


def _duration(info: RunInfo) -> str:
    if not info.ended:
        return ""
    try:
        seconds = (datetime.fromisoformat(info.ended) - datetime.fromisoformat(info.started)).total_seconds()
    except (TypeError, ValueError):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@command("history", "registry history lenet5")
@click.argument("model", type=Reference())
@click.option("--limit", default=50, show_default=True, type=click.IntRange(0), help="Rows; 0 for all.")
def history(model: str, limit: int, registry: Registry, as_json: bool) -> None:
    """Show how a model came to be, version by version.

    PARENT is the version that training went on from, OWN what was written for the version alone.
    """
    from registry.catalog.versions import list_versions, own_sizes

    model = registry.resolve(model).model
    versions, total = list_versions(registry.catalog, model, limit=limit or None)
    own = own_sizes(registry.catalog, model, min((v.version for v in versions), default=1))
    if as_json:
        rows = [
            {
                **version_document(version),
                "run": version.record.get("run"),
                "parent": version.record.get("parent"),
                "own": own.get(version.id, 0),
            }
            for version in versions
        ]
        print_json({"total": total, "versions": rows})
        return
    names = list(dict.fromkeys(name for version in versions for name in version.metrics))
    print_table(
        ("NAME", "EPOCH", "STEP", "LOSS", *map(str.upper, names), "ALIASES", "PARENT", "RUN", "OWN"),
        [
            (
                *(version.name, version.epoch, version.step, version.loss),
                *[version.metrics.get(name) for name in names],
                *(version.aliases, version.record.get("parent"), version.record.get("run")),
                size(own.get(version.id, 0)),
            )
            for version in versions
        ],
    )
    if total > len(versions):
        say(f"{counted(len(versions), 'version')} of {total:,}; --limit 0 shows all")


@command("best", "registry best lenet5 --by accuracy\nregistry best lenet5 --by val/loss")
@click.argument("model", type=Reference())
@click.option("--by", "metric", required=True, metavar="METRIC", help="A metric, or loss.")
@direction
def best(model: str, metric: str, smallest: bool | None, registry: Registry, as_json: bool) -> None:
    """Find the best version of a model."""
    found = registry.best(model, metric, smallest=smallest)
    version = registry.resolve(found.name)
    if as_json:
        print_json(version_document(version))
        return
    value = version.loss if metric == "loss" else version.metrics[metric]
    say(f"{version.name}  {metric} {number(value or 0.0)}  epoch {version.epoch}")


@command("lineage", "registry lineage lenet5@best")
@click.argument("reference", type=Reference())
def lineage(reference: str, registry: Registry, as_json: bool) -> None:
    """Show what a checkpoint came from and what came from it, as a tree."""
    version = registry.resolve(reference)
    sources, led_to = _sources(registry, version, {}), _children(registry, version, {})
    document = {**_node(version), "from": sources, "led_to": led_to}
    if as_json:
        print_json(document)
        return
    say(_label(document))
    _print_branches(document["from"], "")
    if document["led_to"]:
        say("")
        say("led to")
        _print_branches(document["led_to"], "")


def _node(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "id": version.id,
        "epoch": version.epoch,
        "metrics": dict(version.metrics),
        "run": version.record.get("run"),
    }


def _sources(
    registry: Registry, version: Version, seen: dict[str, None], depth: int = 0
) -> list[dict[str, Any]]:
    """What a version came from: its own edges, or the version before it in the same run.

    Args:
        seen: ids of the versions whose own sources are in the tree already; there may be many ways to one.
    """
    seen[version.id] = None
    found = []
    for edge in version.record.get("lineage", []):
        parent = _by_id(registry, edge["parent"])
        if parent is None:
            found.append({"kind": edge["kind"], "name": edge["parent"], "from": []})
        else:
            found.append({"kind": edge["kind"], **_branch(registry, parent, _sources, seen, depth)})
    if not found and (name := version.record.get("parent")):
        with contextlib.suppress(NotFound):
            parent = registry.resolve(name)
            found.append({"kind": "trained on from", **_branch(registry, parent, _sources, seen, depth)})
    return found


def _children(
    registry: Registry, version: Version, seen: dict[str, None], depth: int = 0
) -> list[dict[str, Any]]:
    from registry.catalog.ancestry import children

    seen[version.id] = None
    return [
        {"kind": kind, **_branch(registry, child, _children, seen, depth)}
        for child, kind in children(registry.catalog, version)
    ]


def _branch(
    registry: Registry,
    version: Version,
    below: Callable[[Registry, Version, dict[str, None], int], list[dict[str, Any]]],
    seen: dict[str, None],
    depth: int,
) -> dict[str, Any]:
    """A version in the tree, and what is below it, unless that is there already or too far down."""
    if version.id in seen:
        return {**_node(version), "from": [], "more": "above"}
    if depth >= _DEEPEST:
        return {**_node(version), "from": [], "more": f"registry lineage {version.name}"}
    return {**_node(version), "from": below(registry, version, seen, depth + 1)}


def _by_id(registry: Registry, id: str) -> Version | None:
    from registry.catalog.versions import find_versions

    found = find_versions(registry.catalog, "v.id = ?", [id])
    return found[0] if found else None


def _label(node: dict[str, Any]) -> str:
    parts = [node["name"]]
    if node.get("epoch") is not None:
        parts.append(f"epoch {node['epoch']}")
    parts += [f"{name} {number(value)}" for name, value in node.get("metrics", {}).items()]
    if node.get("run"):
        parts.append(node["run"])
    if node.get("more"):
        parts.append(f"(more: {node['more']})")
    return "  ".join(parts)


def _print_branches(nodes: list[dict[str, Any]], indent: str) -> None:
    for i, node in enumerate(nodes):
        last = i == len(nodes) - 1
        say(f"{indent}{'└── ' if last else '├── '}{node['kind']}  {_label(node)}")
        _print_branches(node["from"], indent + ("    " if last else "│   "))


class _Source(Reference):
    """A run, or a checkpoint for the run that saved it."""

    name = "run"


def _run_of(registry: Registry, text: str) -> RunInfo:
    if "/" in text:
        return registry.runs[text]
    version = registry.resolve(text)
    run = version.record.get("run")
    if not run:
        raise NotFound(f"{version.name} was not saved by a run, so it has no log and no events")
    return registry.runs[run]


@command("log", "registry log lenet5@best\nregistry log lenet5/run-3 -f")
@click.argument("source", type=_Source(), metavar="REFERENCE|RUN")
@click.option("--follow", "-f", is_flag=True, help="Go on printing as lines are added, until Ctrl-C.")
def log(source: str, follow: bool, registry: Registry, as_json: bool) -> None:
    """Show the log file of a run.

    Of a checkpoint, it is the log of the run that saved it.
    """
    info = _run_of(registry, source)
    path = registry.root / "runs" / info.name / LOG
    if as_json and follow:
        raise click.UsageError("--follow does not go with --json, which prints one document")
    with storage_errors(path):
        try:
            fd = open_file(path, os.O_RDONLY, inner=INNER)
        except FileNotFoundError:
            raise NotFound(f"{path}: the log of {info.name} is not there any more") from None
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        before = os.fstat(fd).st_size - _LONGEST_LOG
        if before > 0:
            warn(f"only the last {_LONGEST_LOG >> 20} MB are shown; the whole log is {path}")
            file.seek(before)
            file.readline(_LONGEST_LINE)  # The rest of a line that is cut.
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
@click.argument("sources", nargs=-1, type=_Source(), metavar="[REFERENCE|RUN]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=6006, show_default=True, type=click.IntRange(1, 65_535), help="The port.")
def board(sources: tuple[str, ...], host: str, port: int, registry: Registry, as_json: bool) -> None:
    """Show runs in TensorBoard, until Ctrl-C.

    All runs, or those that are named; a checkpoint stands for the run that saved it.
    """
    chosen = [_run_of(registry, source).name for source in sources]
    folder = (registry.root / "runs").absolute()
    if not folder.is_dir():
        raise NotFound("there are no runs yet; start one with: registry train lenet5")
    _check_port(host, port)
    with contextlib.ExitStack() as stack:
        if chosen:
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
        tunnel = _tunnel(port)
        if as_json:
            print_json({"address": address, "runs": list(dict.fromkeys(chosen)) or None, "tunnel": tunnel})
        else:
            shown = counted(len(set(chosen)), "run") if chosen else "all runs"
            say(f"TensorBoard shows {shown} at {address}")
            if tunnel:
                say(f"you are on a remote host; on your own machine run: {tunnel}")
            say("Ctrl-C ends it")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3_600)


def _link(runs: Path, names: Sequence[str], folder: Path) -> None:
    """Give TensorBoard a folder of the chosen runs alone; it labels a run by its path below the folder."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink((runs / name).absolute(), folder / name)


def _launch(folder: Path, host: str, port: int) -> str:
    from tensorboard import program

    server = program.TensorBoard()
    where = ["--logdir", str(folder), "--host", host, "--port", str(port)]
    server.configure(argv=["registry board", *where, "--reload_interval", "5"])
    try:
        return str(server.launch())
    except Exception as error:
        raise Conflict(f"TensorBoard did not start: {error}") from error


def _check_port(host: str, port: int) -> None:
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
        raise Conflict(f"port {port} of {host} is taken; {advice}")


def _tunnel(port: int) -> str | None:
    """The command that forwards the port to a person who came by SSH."""
    parts = os.environ.get("SSH_CONNECTION", "").split()
    if len(parts) != 4:
        return None
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "USER"
    door = "" if parts[3] == "22" else f" -p {parts[3]}"
    return f"ssh -L {port}:127.0.0.1:{port}{door} {user}@{parts[2]}"
