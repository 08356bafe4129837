"""The tools that people use now. All of them save and load the same states in turns.

Each tool runs in a process of its own. A tool that does not come with this package gets an environment of its own, which
is made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import torchvision

from benchmarks.floors import touch_free_memory
from benchmarks.measure import Result, Scale, Section, Table, middle_half, rotated, spoken
from benchmarks.states import resnet50_with_adam, with_new_head

ENVIRONMENTS = Path(__file__).parent.parent / "build" / "peers"
"""The folder of the tools' environments."""

WORKER = Path(__file__).with_name("worker.py")
"""The script that runs in a tool's process."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool to compare with.

    Attributes:
        key: its name for the worker.
        name: its name in the report.
        package: the distribution that contains it.
        pinned: the version to install in an environment of its own; None if it comes with this package.
        about: how it is used.
        also: what else is installed with it.
    """

    key: str
    name: str
    package: str
    pinned: str | None = None
    about: str = ""
    also: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version that is measured."""
        return self.pinned or version(self.package)


TORCH = Peer("torch", "torch.save, torch.load", "torch", about="a file for each checkpoint")
OURS = Peer("registry", "torch-registry", "torch-registry", about="loads are mapped and verified")
PEERS = (
    OURS,
    Peer(
        "registry owned", "torch-registry, copy=True", "torch-registry", about="loads are copied and verified"
    ),
    TORCH,
    Peer("torch mmap", "torch.load(mmap=True)", "torch", about="maps the file, verifies nothing"),
    Peer("safetensors", "safetensors", "safetensors", about="a file for each checkpoint, mapped"),
    Peer("dcp", "torch.distributed.checkpoint", "torch", about="a folder for each checkpoint, one process"),
    Peer("joblib", "joblib", "joblib", about="`joblib.dump` and `joblib.load`"),
    Peer(
        "torch_checkpointing",
        "torch_checkpointing",
        package="torch_checkpointing",
        pinned="0.1.1",
        about="a folder for each checkpoint, saved synchronously, without direct I/O, which fails here",
    ),
    Peer(
        "tensorizer",
        "tensorizer",
        package="tensorizer",
        pinned="2.12.1",
        about="a file for each checkpoint, hashes verified",
    ),
    Peer(
        "fastsafetensors",
        "fastsafetensors",
        package="fastsafetensors",
        pinned="0.5.0",
        about="loads a file of safetensors into memory",
    ),
    Peer(
        "zipnn", "zipnn", package="zipnn", pinned="0.5.4", about="the bytes of a safetensors file, compressed"
    ),
    Peer(
        "dvc",
        "DVC",
        package="dvc",
        pinned="3.67.1",
        about="`torch.save` and `dvc add`; `dvc checkout` and `torch.load`",
    ),
    Peer(
        "mlflow",
        "MLflow",
        package="mlflow",
        pinned="3.17.2",
        about="`mlflow.pytorch.log_state_dict`, SQLite and a folder",
    ),
    Peer("coral", "coral-ml", package="coral-ml", pinned="1.0.0", about="a commit for each checkpoint"),
)
COMPACTED = Peer(
    "registry compacted",
    "torch-registry, compacted",
    "torch-registry",
    about="after `registry compact` and `gc`",
)
_REASON = 300
"""Characters of a reason that are shown."""


class PeerFailed(Exception):
    """A peer cannot do what it is asked. The text says why."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure a save, a save again, a save with 1% new, and a load: seconds, memory, and bytes on the disk."""
    state = {"model": torchvision.models.resnet18().state_dict()} if scale.quick else resnet50_with_adam()
    files = {"state": folder / "state.pt", "new head": folder / "new-head.pt"}
    torch.save(state, files["state"])
    torch.save(with_new_head(state), files["new head"])
    size = files["state"].stat().st_size
    what = "ResNet18" if scale.quick else "ResNet50 + Adam"
    rounds = 3 if scale.quick else min(scale.rounds, 5)
    limit, patience = (60.0, 4.0) if scale.quick else (300.0, 40.0)
    found: dict[Peer, dict[str, list[dict[str, Any]]]] = {}
    failures: dict[Peer, str] = {}
    workers: dict[Peer, Worker] = {}
    spent: dict[Peer, float] = {}
    try:
        # The peers are installed side by side.
        with ThreadPoolExecutor(len(PEERS)) as pool:
            starting = {peer: pool.submit(Worker, peer, limit) for peer in PEERS}
        for peer, future in starting.items():
            try:
                workers[peer] = future.result()
            except PeerFailed as failed:
                failures[peer] = str(failed)
        for number in range(rounds + 1):
            for peer, worker in rotated([*workers.items()], number):
                # A slow peer takes fewer turns.
                if spent.get(peer, 0.0) > patience:
                    continue
                began = time.monotonic()
                try:
                    answers = _one_round(worker, folder / f"{peer.key}-{number}", files)
                except PeerFailed as failed:
                    failures[peer] = str(failed)
                    workers.pop(peer).close()
                    found.pop(peer, None)
                    continue
                if number:
                    spent[peer] = spent.get(peer, 0.0) + time.monotonic() - began
                    for name, answer in answers.items():
                        found.setdefault(peer, {}).setdefault(name, []).append(answer)
    finally:
        for worker in workers.values():
            worker.close()
    return _section(f"{what}, {size / 1e6:.0f} MB", size=size, found=found, failures=failures)


def _one_round(worker: Worker, folder: Path, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    def save() -> dict[str, Any]:
        os.sync()
        touch_free_memory(folder.parent, files["state"].stat().st_size)
        return worker.ask("save")

    worker.ask("open", folder=str(folder))
    worker.ask("state", file=str(files["state"]))
    answers = {"new": save(), "unchanged": save()}
    worker.ask("state", file=str(files["new head"]))
    answers["new head"] = save()
    os.sync()
    answers["load"] = worker.ask("load", update=False, check=True)
    answers["load, update"] = worker.ask("load", update=True, check=False)
    answers["disk"] = worker.ask("close")
    shutil.rmtree(folder)
    return answers


def _section(
    what: str, size: int, found: dict[Peer, dict[str, list[dict[str, Any]]]], failures: dict[Peer, str]
) -> Section:
    def seconds(peer: Peer, name: str) -> str:
        values = [answer["seconds"] for answer in found[peer][name]]
        low, high = middle_half(values)
        return f"{spoken(statistics.median(values))} ({spoken(low)} to {spoken(high)})"

    def memory(peer: Peer, name: str) -> str:
        return f"{statistics.median(answer['memory'] for answer in found[peer][name]) / 1e6:.0f} MB"

    def disk(peer: Peer) -> str:
        return f"{found[peer]['disk'][0]['bytes'] / 1e6:.0f} MB"

    measured = [peer for peer in PEERS if peer in found]
    times = Table(
        f"{what}: median seconds, and the range of the middle half",
        ["", "save, all new", "save, unchanged", "save, 1% new", "load", "load and change all of it"],
        [
            [
                peer.name,
                *(seconds(peer, name) for name in ("new", "unchanged", "new head", "load", "load, update")),
            ]
            for peer in measured
        ],
    )
    room = Table(
        f"{what}: peak memory of an operation beyond the memory before it, and bytes of the three saves",
        ["", "save, all new", "save, unchanged", "load", "on disk"],
        [
            [peer.name, memory(peer, "new"), memory(peer, "unchanged"), memory(peer, "load"), disk(peer)]
            for peer in measured
        ],
    )
    used = Table(
        "what was measured",
        ["", "version", "how"],
        [[peer.name, f"{peer.package} {peer.version}", failures.get(peer, peer.about)] for peer in PEERS],
    )
    notes = [f"{peer.name} could not run: {reason}" for peer, reason in failures.items()]
    for peer in measured:
        if differs := found[peer]["load"][0]["differs"]:
            notes.append(f"{peer.name} is not exact: {differs}.")
    results = []
    if OURS in found and TORCH in found:
        for name in ("new", "unchanged", "new head", "load"):
            ratios = [
                ours["seconds"] / theirs["seconds"]
                for ours, theirs in zip(found[OURS][name], found[TORCH][name], strict=False)
            ]
            low, high = middle_half(ratios)
            results.append(
                Result(
                    f"{what}: {name}, in processes of their own",
                    statistics.median(ratios),
                    goal=None,
                    detail="against torch.save and torch.load",
                    low=low,
                    high=high,
                )
            )
        extra = statistics.median(answer["memory"] for answer in found[OURS]["new"])
        results.append(
            Result(
                "memory that a save takes, as a part of the state",
                extra / size,
                goal=None,
                detail=f"{extra / 1e6:.1f} MB",
            )
        )
    return Section(results, tables=[times, room, used], notes=notes)


class Worker:
    """A peer in its process.

    Args:
        limit: seconds that an answer may take.

    Raises:
        PeerFailed: if the peer cannot be installed or does not start.
    """

    def __init__(self, peer: Peer, limit: float) -> None:
        python = sys.executable if peer.pinned is None else str(environment(peer))
        self._limit = limit
        # What a peer writes beside its data stays in this folder.
        home = ENVIRONMENTS / "home"
        home.mkdir(parents=True, exist_ok=True)
        # One of them leaves a copy of all that it loads.
        self._tmp = tempfile.TemporaryDirectory(dir=ENVIRONMENTS, prefix="tmp-")
        quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        self._process = subprocess.Popen(
            [python, str(WORKER), peer.key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=home,
            env={**os.environ, "HOME": str(home), "TMPDIR": self._tmp.name, **quiet},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **words: Any) -> dict[str, Any]:
        """Send a command to the peer, and wait for its answer.

        Raises:
            PeerFailed: if the peer fails, ends, or takes too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            ended = self._process.wait()
            raise PeerFailed(f"{do} ended with status {ended}, or took more than {self._limit:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{do}: {' '.join(answer['error'].split())[:_REASON]}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._tmp.cleanup()


def environment(peer: Peer) -> Path:
    """The interpreter of a peer's environment. The environment is made if it is not there.

    The interpreter looks for packages in its own environment first, and then in this one, where it finds torch.

    Raises:
        PeerFailed: if the peer cannot be installed.
    """
    folder = ENVIRONMENTS / "-".join([peer.package, peer.pinned or "", *peer.also])
    python = folder / "bin" / "python"
    done = folder / "done"
    if done.exists():
        return python
    print(
        f"installing {peer.package} {peer.pinned} in an environment of its own", file=sys.stderr, flush=True
    )
    venv.create(folder, clear=True, with_pip=True)
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", f"{peer.package}=={peer.pinned}", *peer.also],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        raise PeerFailed(f"pip: {installed.stderr.strip().splitlines()[-1][:_REASON]}")
    for site in folder.glob("lib/python*/site-packages"):
        (site / "zz-torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done.touch()
    return python
