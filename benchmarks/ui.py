"""The pages in the browser, beside those of MLflow on as many versions, and saves beside browsers that look on."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from benchmarks.catalogs import save
from benchmarks.measure import Result, Scale, Section, Table, Times, spoken
from benchmarks.peers import PEERS, PeerFailed, environment
from registry import Registry

TABS = 20
"""Browsers that follow the registry."""

_ROWS = 100
"""Versions of a page."""

_PATIENCE_SECONDS = 120.0

_FILL = """
import sys, time
import mlflow
from mlflow import MlflowClient
mlflow.set_tracking_uri(sys.argv[1])
client = MlflowClient()
client.create_registered_model("net")
for i in range(int(sys.argv[2])):
    client.create_model_version("net", source=f"s3://bucket/{i}", tags={"accuracy": str(1 - 1 / (i + 1))})
"""
"""Fills a registry of MLflow with versions of a model."""


_BURNER = """
import time
while True:
    end = time.perf_counter() + {busy}
    while time.perf_counter() < end:
        pass
    time.sleep(max(0.0, 0.01 - {busy}))
"""
"""Uses a share of a processor."""


class _Served(NamedTuple):
    """A server that runs.

    Attributes:
        started: seconds from its start to its first answer.
    """

    process: subprocess.Popen[bytes]
    port: int
    started: float

    def get(self, path: str, **headers: str) -> tuple[bytes, dict[str, str]]:
        """What it answers, and its headers."""
        return _get(self.port, path, **headers)

    def memory(self) -> int:
        """Bytes that the process and its children hold."""
        return sum(_resident(pid) for pid in _family(self.process.pid))

    def seconds(self) -> float:
        """Seconds of a processor that it has used, with its children."""
        return sum(_used(pid) for pid in _family(self.process.pid))


def _get(port: int, path: str, **headers: str) -> tuple[bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request(
            "GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise PeerFailed(f"{path}: {answer.status} {body[:200]!r}")
        return body, {name.lower(): value for name, value in answer.getheaders()}


def measure(folder: Path, scale: Scale) -> Section:
    """Measure the start, pages, bytes and memory, and what a save takes beside browsers."""
    count = 1_000 if scale.quick else 10_000
    registry = Registry(folder / "ours")
    for i in range(count):
        save(registry, i)
    section = Section(notes=[f"A model of {count:,} versions, {_ROWS} on a page."])
    rows = [_ours(folder / "ours", registry, section, scale)]
    try:
        rows.append(_mlflow(folder, count, scale))
        section.results.insert(
            0,
            Result(
                "first answer against MLflow's",
                rows[0][1] / rows[1][1],
                0.5,
                f"{spoken(rows[0][1])} against {spoken(rows[1][1])}",
            ),
        )
        section.results.insert(
            1,
            Result(
                "a page of versions against MLflow's",
                rows[0][2] / rows[1][2],
                0.5,
                f"{spoken(rows[0][2])} against {spoken(rows[1][2])}",
            ),
        )
    except PeerFailed as error:
        section.notes.append(f"MLflow was not measured: {error}")
    columns = [
        "",
        "start to first answer",
        "a page again",
        "a page, 95 of 100",
        "after a change",
        "bytes of the page",
        "compressed",
        "first visit",
        "memory",
    ]
    section.tables.append(
        Table(
            "pages",
            columns,
            [[row[0], *map(spoken, row[1:5]), *(_kilobytes(one) for one in row[5:])] for row in rows],
        )
    )
    section.results += _saves(folder, registry, scale)
    return section


_Row = tuple[str, float, float, float, float, int, int, int, int]


def _ours(root: Path, registry: Registry, section: Section, scale: Scale) -> _Row:
    with _serving(
        [sys.executable, "-m", "registry.cli", "--root", str(root), "ui", "--json", "--no-token", "--port"],
        "/",
    ) as served:
        path = "/m/net"
        again, changed = [], []
        for _ in range(scale.rounds * 10):
            registry.add_note("net:v1", "seen")
            changed.append(_timed(lambda: served.get(path)))
            again += [_timed(lambda: served.get(path)) for _ in range(5)]
        plain, _ = served.get(path)
        packed, _ = served.get(path, Accept_Encoding="gzip")
        visit = len(packed) + sum(
            len(gzip.compress(served.get(f"/static/{name}")[0])) for name in ("ui.css", "ui.js", "icon.svg")
        )
        slowest = []
        for other in (
            "/",
            "/m/net?sort=accuracy",
            f"/m/net?before=v{len(plain) % 500 + 200}",
            "/m/net/v500",
            "/lineage?of=net",
            "/storage",
            "/runs",
            "/find?q=v77",
        ):
            registry.add_note("net:v1", "seen")
            slowest.append((_timed(lambda path=other: served.get(path)), other))
        section.notes.append(
            f"The slowest page after a change: {max(slowest)[1]}, {spoken(max(slowest)[0])}."
        )
        return (
            "torch-registry",
            served.started,
            statistics.median(again),
            _high(again),
            statistics.median(changed),
            len(plain),
            len(packed),
            visit,
            served.memory(),
        )


def _mlflow(folder: Path, count: int, scale: Scale) -> _Row:
    peer = next(one for one in PEERS if one.key == "mlflow")
    python = environment(peer)
    store = f"sqlite:///{folder}/mlflow.db"
    filled = subprocess.run(
        [str(python), "-c", _FILL, store, str(count)], capture_output=True, text=True, check=False
    )
    if filled.returncode:
        raise PeerFailed(filled.stderr.strip().splitlines()[-1][:300])
    words = [
        str(python),
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--workers",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
    ]
    with _serving(words, "/") as served:
        asked = urlencode({"filter": "name='net'", "max_results": _ROWS, "order_by": "version_number DESC"})
        path = f"/ajax-api/2.0/mlflow/model-versions/search?{asked}"
        again = [_timed(lambda: served.get(path)) for _ in range(scale.rounds * 10)]
        plain, _ = served.get(path)
        page, _ = served.get("/")
        files = re.findall(rb'(?:src|href)="\.?/?(static-files/[^"]+\.(?:js|css))"', page)
        visit = len(plain) + len(page) + sum(len(served.get(f"/{name.decode()}")[0]) for name in files)
        return (
            "MLflow",
            served.started,
            statistics.median(again),
            _high(again),
            statistics.median(again),
            len(plain),
            len(gzip.compress(plain)),
            visit,
            served.memory(),
        )


def _saves(folder: Path, registry: Registry, scale: Scale) -> list[Result]:
    """Saves beside browsers that follow each, against saves beside a process that burns as much."""
    saves = 50 if scale.quick else 200
    counter = iter(range(1_000_000, 1 << 30))
    times: Times = {"pages": [], "burner": []}
    words = [
        sys.executable,
        "-m",
        "registry.cli",
        "--root",
        str(folder / "ours"),
        "ui",
        "--json",
        "--no-token",
        "--port",
    ]
    with _serving(words, "/") as served, _beside("-m", "benchmarks.ui", str(served.port)) as tabs:

        def seconds() -> float:
            return served.seconds() + _used(tabs.pid)

        time.sleep(2)
        used, began = seconds(), time.monotonic()
        for _ in range(saves):
            times["pages"].append(_timed(lambda: save(registry, next(counter))))
            time.sleep(0.02)
        share = (seconds() - used) / (time.monotonic() - began)
    with _beside("-c", _BURNER.format(busy=0.01 * min(1.0, share))):
        for _ in range(saves):
            times["burner"].append(_timed(lambda: save(registry, next(counter))))
            time.sleep(0.02)
    found = []
    for name, part in (("half", 0.5), ("95 of 100", 0.95), ("99 of 100", 0.99)):
        a, b = (sorted(times[who])[int(part * (saves - 1))] for who in ("pages", "burner"))
        detail = f"{spoken(a)} against {spoken(b)} beside a process that burns {share:.0%} of a core"
        found.append(
            Result(f"a save beside {TABS} tabs, {name}", a / b, 1.25 if part < 0.99 else None, detail)
        )
    return found


def _follow(port: int) -> None:
    """Follow the registry as the script of a page does: at most one page a second, and none without a change."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)
    connection.request("GET", "/events")
    stream, tag = connection.getresponse(), ""
    while line := stream.readline():
        if line.startswith(b"data:"):
            began = time.monotonic()
            with contextlib.suppress(PeerFailed):
                _, headers = _get(port, "/m/net", Accept_Encoding="gzip", If_None_Match=tag)
                tag = headers.get("etag", "")
            time.sleep(max(0.0, 1 - (time.monotonic() - began)))


@contextlib.contextmanager
def _beside(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of Python, in a process of its own, until the block ends."""
    process = subprocess.Popen([sys.executable, *words])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _serving(words: Sequence[str], path: str) -> Iterator[_Served]:
    """Run a server on a free port from its start until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*words, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - began > _PATIENCE_SECONDS:
                raise PeerFailed(f"the server ended or does not answer: {words[0]}")
            with contextlib.suppress(OSError, http.client.HTTPException, PeerFailed):
                served = _Served(process, port, 0.0)
                served.get(path)
                break
            time.sleep(0.005)
        yield served._replace(started=time.perf_counter() - began)
    finally:
        for pid in _family(process.pid)[::-1]:
            with contextlib.suppress(OSError):
                os.kill(pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += map(int, path.read_text().split())
    return found


def _resident(pid: int) -> int:
    try:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1_024 if match else 0


def _used(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _high(times: Sequence[float]) -> float:
    return sorted(times)[int(0.95 * (len(times) - 1))]


def _kilobytes(count: int) -> str:
    return f"{count / 1_000:,.0f} kB"


if __name__ == "__main__":
    for _ in range(TABS):
        threading.Thread(target=_follow, args=(int(sys.argv[1]),), daemon=True).start()
    threading.Event().wait()
