"""A shared registry over a real S3 server on this computer: requests, throughput, and several hosts that save at once.

The server has the same cores and the same disk as its clients, so only ratios of one run tell something.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import obstore
import torch
from obstore.store import S3Store

from benchmarks.floors import touch_free_memory
from benchmarks.measure import Contender, Result, Scale, Section, Table, ratio, spoken, take_turns
from benchmarks.peers import Peer, PeerFailed, Worker
from registry import Checkpoint, Registry
from registry.remote import shared_log
from tests.registry.remote.servers import BUCKET, KEYS, Layer, layer, seaweed

PEERS = (
    Peer("boto3", "boto3", "boto3", "1.44.8"),
    Peer("s3fs", "s3fs", "s3fs", "2026.9.0"),
    Peer("dvc push", "DVC push and pull", "dvc-s3", "3.3.0"),
)
"""Tools that bring files to a bucket. Each is installed in an environment of its own."""

STORES = (PEERS[-1], Peer("mlflow bucket", "MLflow", "mlflow", "3.17.2", also=("boto3",)))
"""Tools that keep versions in a bucket."""

HOSTS = (1, 4, 8)
SAVES = 12
"""Saves of each host."""

_SAVER = """
import sys, time, torch
from registry import Registry
registry, saves = Registry(sys.argv[1]), int(sys.argv[2])
registry.save("warm", {"model": {"w": torch.randn(8)}})
print("ready", flush=True)
sys.stdin.readline()
for i in range(saves):
    began = time.perf_counter()
    registry.save("net", {"model": {"w": torch.randn(1_000)}})
    print(time.perf_counter() - began, flush=True)
"""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure requests, throughput beside obstore alone, a push, and several hosts."""
    # The server of the tests has room for some ten gigabytes.
    size = (32 if scale.quick else 64) << 20
    with seaweed(folder / "seaweed") as port, layer(port) as before, _environment(port):
        results = _throughput(folder, size, scale)
        others, notes = _others(folder, size, before, scale)
        results += others
        pushed, more = _push(folder, before, size)
        results, notes = results + pushed, notes + more
        results += _follow(folder, before, size)
        tables = [_requests(folder, before, scale), _hosts(folder, scale), _clones(folder, scale)]
    return Section(results, tables=tables, notes=notes)


@contextlib.contextmanager
def _environment(port: int) -> Iterator[None]:
    """The keys, and the endpoint, in the environment."""
    kept = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@contextlib.contextmanager
def _asked_every(seconds: float) -> Iterator[None]:
    """Let a host ask others so often what is new."""
    kept, shared_log._REFRESH = shared_log._REFRESH, seconds
    try:
        yield
    finally:
        shared_log._REFRESH = kept


def _opened(folder: Path, host: str, prefix: str) -> Registry:
    os.environ["XDG_DATA_HOME"] = str(folder / f"host-{host}")
    return Registry(f"s3://{BUCKET}/{prefix}")


def _throughput(folder: Path, size: int, scale: Scale) -> list[Result]:
    """New states saved and loaded, beside the same bytes through obstore alone, and a load from the cache."""
    store = S3Store(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    shared, local = _opened(folder, "a", "throughput"), Registry(folder / "local")
    number, state = count(), {"w": torch.empty(0)}

    def renew() -> None:
        state["w"] = torch.randn(size // 4)

    def upload() -> None:
        obstore.put(
            store, f"plain/{next(number)}", memoryview(state["w"].numpy()).cast("B"), chunk_size=16 << 20
        )

    def save() -> None:
        shared.save("net", {"model": state})

    saving = take_turns({"ours": (renew, save), "obstore": (renew, upload)}, scale.rounds)
    local.save("net", {"model": state})
    plain = f"plain/{next(number) - 1}"
    hosts = count()
    cold: list[Registry] = []

    def new_host() -> None:
        cold[:] = [_opened(folder, f"cold-{next(hosts)}", "throughput")]
        cold[0].versions("net")

    loading: dict[str, Contender] = {
        "ours": (new_host, lambda: cold[0]["net"].load()),
        "obstore": (lambda: None, lambda: obstore.get(store, plain).bytes()),
    }
    loads = take_turns(loading, scale.rounds)
    shared["net"].load()
    cached: dict[str, Contender] = {
        "cached": (lambda: touch_free_memory(folder, size), lambda: shared["net"].load()),
        "local": (lambda: touch_free_memory(folder, size), lambda: local["net"].load()),
    }
    with _asked_every(60.0):
        # How often others are asked is another question.
        warm = take_turns(cached, 3 * scale.rounds)
    what = f"{size >> 20} MB"
    return [
        ratio(
            f"save, {what}, all new", saving, ours="ours", peer="obstore", goal=None, name="an upload alone"
        ),
        ratio(
            f"load, {what}, first on a host",
            loads,
            ours="ours",
            peer="obstore",
            goal=None,
            name="a get alone",
        ),
        ratio(
            f"load, {what}, from the cache",
            warm,
            ours="cached",
            peer="local",
            goal=1.05,
            name="a local registry",
        ),
    ]


def _others(folder: Path, size: int, before: Layer, scale: Scale) -> tuple[list[Result], list[str]]:
    """New states saved and loaded beside other tools; and which of them could not be measured."""
    plain, notes = os.environ["AWS_ENDPOINT_URL"], []
    results: list[Result] = []
    os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{before.port}", BENCHMARK_BUCKET=BUCKET)
    for peer in PEERS:
        try:
            with Worker(peer, 120.0) as worker:
                worker.ask("open", folder=str(folder / f"peer-{peer.package}"))
                for latency in (0.0, 0.03):
                    before.latency = latency
                    results += _beside(peer, worker, folder, size, latency=latency, scale=scale)
        except PeerFailed as error:
            notes.append(f"{peer.name} is not measured: {error}")
    before.latency = 0.0
    os.environ["AWS_ENDPOINT_URL"] = plain
    return results, notes


def _beside(
    peer: Peer, worker: Worker, folder: Path, size: int, *, latency: float, scale: Scale
) -> list[Result]:
    """A save and a first load on a host beside those of a tool, which takes the same bytes as a file of `torch.save`."""
    shared, file = _opened(folder, "a", "others"), folder / "state.pt"
    state, cold, hosts = {"w": torch.empty(0)}, list[Registry](), count()

    def renew() -> None:
        state["w"] = torch.randn(size // 4)

    def renew_there() -> None:
        renew()
        torch.save(state, file)
        worker.ask("state", file=str(file))

    def new_host() -> None:
        cold[:] = [_opened(folder, f"{peer.package}-{latency}-{next(hosts)}", "others")]
        cold[0].versions("net")

    saving: dict[str, Contender] = {
        "ours": (renew, lambda: shared.save("net", {"model": state})),
        peer.key: (renew_there, lambda: worker.ask("save")),
    }
    saves = take_turns(saving, scale.rounds)
    loading: dict[str, Contender] = {
        "ours": (new_host, lambda: cold[0]["net"].load()),
        peer.key: (lambda: None, lambda: worker.ask("load", update=False, check=False)),
    }
    loads = take_turns(loading, scale.rounds)
    return [
        ratio(
            f"{name}, {size >> 20} MB, {1e3 * latency:.0f} ms before each request",
            times,
            ours="ours",
            peer=peer.key,
            goal=None,
            name=peer.name,
        )
        for name, times in (("save", saves), ("load", loads))
    ]


def _push(folder: Path, before: Layer, size: int) -> tuple[list[Result], list[str]]:
    """The second checkpoint of a frozen backbone: bytes that go to the bucket; and which tools could not be measured."""
    plain = os.environ["AWS_ENDPOINT_URL"]
    os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{before.port}", BENCHMARK_BUCKET=BUCKET)
    local, shared = Registry(folder / "frozen"), _opened(folder, "a", "push")
    backbone = torch.randn(size // 4)
    states = [{"backbone": backbone, "head": torch.randn(10_000)} for _ in range(2)]
    ours = []
    for version, state in enumerate(states, 1):
        local.save("net", {"model": state})
        before.received = 0
        local.copy_to(shared, [f"net:v{version}"])
        ours.append(before.received)
    results, notes = [], []
    for peer in STORES:
        try:
            with Worker(peer, 120.0) as worker:
                worker.ask("open", folder=str(folder / f"push-{peer.package}"))
                for state in states:
                    torch.save(state, folder / "state.pt")
                    worker.ask("state", file=str(folder / "state.pt"))
                    before.received = 0
                    worker.ask("save")
            results.append(
                Result(
                    "push of the second checkpoint with a frozen backbone, bytes",
                    ours[1] / before.received,
                    None,
                    f"{ours[1] / 1e6:.2f} MB against {before.received / 1e6:.1f} MB of {peer.name}",
                )
            )
        except PeerFailed as error:
            notes.append(f"a push of {peer.name} is not measured: {error}")
    os.environ["AWS_ENDPOINT_URL"] = plain
    return results, notes


def _follow(folder: Path, before: Layer, size: int) -> list[Result]:
    """A new head over a frozen backbone, put into a live network on another host: bytes, and the pause."""
    plain = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{before.port}"
    trainer, server = _opened(folder, "a", "follow"), _opened(folder, "follower", "follow")
    state = {"backbone": torch.randn(size // 4), "head": torch.randn(10_000)}
    live = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    trainer.save("net", {"model": state})
    pauses: list[float] = []
    sent: list[int] = []
    load_into = Checkpoint.load_into

    def timed(self: Checkpoint, **targets: Any) -> None:
        began = time.perf_counter()
        load_into(self, **targets)
        pauses.append(time.perf_counter() - began)

    versions = server.follow("net@latest", into=live, every=0.05)
    Checkpoint.load_into = timed  # type: ignore[method-assign, assignment]
    try:
        for _ in range(6):
            before.sent = 0
            next(versions)
            sent.append(before.sent)
            assert all(torch.equal(live[name], tensor) for name, tensor in state.items())
            state["head"] = torch.randn(10_000)
            trainer.save("net", {"model": state})
    finally:
        Checkpoint.load_into = load_into  # type: ignore[method-assign]
        os.environ["AWS_ENDPOINT_URL"] = plain
    later, pause = median(sent[1:]), median(pauses[1:])
    what = "follow, a new head over a frozen backbone"
    return [
        Result(
            f"{what}: bytes",
            later / sent[0],
            None,
            f"{later / 1e6:.2f} MB against {sent[0] / 1e6:.0f} MB for the first version",
        ),
        Result(
            f"{what}: pause",
            pause / pauses[0],
            None,
            f"{1e3 * pause:.0f} ms to bring, check and copy it, against {1e3 * pauses[0]:.0f} ms for the first version",
        ),
    ]


def _clones(folder: Path, scale: Scale) -> Table:
    """The first look of a host at a registry of many small versions."""
    rows = []
    for versions in (200,) if scale.quick else (1_000, 10_000):
        writer = _opened(folder, "clones", f"clones-{versions}")
        weights = {f"w{i}": torch.randn(8) for i in range(8)}
        for number in range(versions):
            writer.save("net", {"model": {**weights, "own": torch.full((8,), float(number))}})
        began, busy = time.perf_counter(), time.process_time()
        found = len(_opened(folder, f"clone-{versions}", f"clones-{versions}").versions("net"))
        elapsed, busy = time.perf_counter() - began, time.process_time() - busy
        assert found == versions
        rows.append([f"{versions:,}", spoken(elapsed), f"{1e3 * busy / versions:.1f} ms"])
    return Table("a host that comes new", ["versions", "first list", "CPU for each version"], rows)


def _requests(folder: Path, before: Layer, scale: Scale) -> Table:
    """Requests, and seconds with 0 and 30 ms before each request."""
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{before.port}"
    writer = _opened(folder, "requests", "requests")
    number, hosts = count(), count()

    def save() -> None:
        writer.save("net", {"model": {"w": torch.full((1_000,), float(next(number)))}})

    def other_host() -> Registry:
        return _opened(folder, f"requests-{next(hosts)}", "requests")

    save()
    reader = other_host()
    reader["net"].load()
    rows = []
    steps: dict[str, Callable[[], object]] = {
        "save, first of a program": lambda: _opened(folder, "requests", "requests").save(
            "net", {"model": {"w": torch.full((1_000,), float(next(number)))}}
        ),
        "save": save,
        "alias": lambda: writer.set_alias(f"net:v{1 + next(number) % 2}", "production"),
        "list, first of a program": lambda: _opened(folder, "requests", "requests").versions("net"),
        "list again": lambda: writer.versions("net"),
        "list, a new host": lambda: other_host().versions("net"),
        "show of structure": lambda: list(writer["net"].parameters()),
        "load, cached": lambda: writer["net"].load(),
        "load, new here": lambda: (save(), setattr(reader.remote.log, "_asked", -1e9), reader["net"].load()),
    }
    for name, step in steps.items():
        counts, seconds = [], {0.0: [], 0.03: []}
        for latency, times in seconds.items():
            before.latency = latency
            for _ in range(scale.rounds):
                before.requests.clear()
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
                counts.append(len(before.requests))
        before.latency = 0.0
        rows.append([name, f"{median(counts):g}", *(spoken(median(times)) for times in seconds.values())])
    return Table("requests of one operation", ["operation", "requests", "0 ms", "30 ms each"], rows)


def _hosts(folder: Path, scale: Scale) -> Table:
    """Hosts that save small versions of one model as fast as they can."""
    rows = []
    for hosts in HOSTS:
        url = f"s3://{BUCKET}/hosts-{hosts}"
        _opened(folder, f"first-{hosts}", f"hosts-{hosts}")
        started = []
        for host in range(hosts):
            environment = {**os.environ, "XDG_DATA_HOME": str(folder / f"saver-{hosts}-{host}")}
            words = [sys.executable, "-c", _SAVER, url, str(SAVES)]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True))
        for one in started:
            assert one.stdout
            assert one.stdout.readline() == "ready\n"
        began = time.perf_counter()
        for one in started:
            assert one.stdin
            one.stdin.write("\n")
            one.stdin.flush()
        told = [one.communicate()[0].split() for one in started]
        elapsed = time.perf_counter() - began
        times = [float(text) for texts in told for text in texts]
        found = [
            version.version for version in _opened(folder, f"last-{hosts}", f"hosts-{hosts}").versions("net")
        ]
        missing = hosts * SAVES - len(found) if found == list(range(len(found), 0, -1)) else "gaps"
        p95 = quantiles(times, n=20)[-1]
        rows.append(
            [str(hosts), f"{len(times) / elapsed:.1f}", spoken(median(times)), spoken(p95), str(missing)]
        )
    return Table("hosts that save at once", ["hosts", "saves a second", "p50", "p95", "missing"], rows)
