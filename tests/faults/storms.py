"""Storms: who starts the processes of `storm`, kills them, and compares what is left with the ledger."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import storm
import torch
from servers import Fault, Layer
from storm import Content, Known, Worker, Wrong
from support import all_versions, broken_rules, collect, dump

from registry import Registry
from registry.remote import remote
from registry.remote.bucket import Unreachable
from registry.store import durable
from registry.upkeep.garbage import GRACE

PATIENCE = 100
"""Seconds that a process may take to end; SQLite and the log's lock wait for a minute."""


class Host(NamedTuple):
    """How a process opens the registry.

    Attributes:
        place: a folder, or the URL of a shared registry.
        environment: what it needs for that.
    """

    place: str
    environment: Mapping[str, str] = {}

    def opened(self) -> Registry:
        """The registry, which sees all that has happened."""
        os.environ |= self.environment
        registry = Registry(self.place, create=False)
        registry.catalog.commit(lambda view: [])
        return registry


def _work(host: Host, folder: Path, seed: int, slot: int, number: int) -> None:
    """What one process does."""
    with _told(folder / "failures" / f"{slot}-{number}"):
        os.environ |= host.environment
        while not (folder / "stop").exists():
            try:
                worker = Worker(host.place, folder / "ledger", seed, slot, number)
            except Unreachable:
                # A host that has never seen the registry cannot open it now.
                continue
            worker.work(folder / "stop")
            return


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """In a child process: write what goes wrong into a file."""
    torch.set_num_threads(1)  # Its threads stayed in the parent.
    durable.disk.safe_folders.clear()  # What the parent has made durable is not known to another program.
    try:
        yield
    except BaseException:
        path.write_text(traceback.format_exc())
        raise


class Storm:
    """A storm over one registry, drawn by a seed; the times of the kills are those of the machine."""

    pace = (0.05, 0.5)
    """Seconds between two kills, on the average: at least, and at most."""
    slots = (3, 5)
    """How many processes there are at a time: at least, and at most."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.folder, self.root = folder, folder / "r"
        self.ledger, self.failures, self.stop = folder / "ledger", folder / "failures", folder / "stop"
        self.ledger.mkdir()
        self.failures.mkdir()
        self.context: Any = multiprocessing.get_context("fork")
        self.children: dict[int, BaseProcess] = {}
        self.numbers: dict[int, int] = {}
        self.kills = 0
        self.hosts = self._made()

    def _made(self) -> Sequence[Host]:
        """Make the registry."""
        Registry(self.root).catalog.close()
        return [Host(str(self.root))]

    def rage(self, seconds: float) -> None:
        """Let the processes work, and kill one now and then."""
        slots = self.chance.randint(*self.slots)
        pace = self.chance.uniform(*self.pace)
        end = time.monotonic() + seconds
        try:
            for slot in range(slots):
                self._start(slot)
            while time.monotonic() < end:
                time.sleep(self.chance.expovariate(1 / pace))
                self._check_alive()
                several = self.chance.random() < 0.1
                for slot in range(slots) if several else [self.chance.randrange(slots)]:
                    self._hurt(slot)
            self._check_alive()
            if self.chance.random() < 0.5:
                self._end()
        finally:
            for slot in [*self.children]:
                self._kill(slot)

    def _start(self, slot: int) -> None:
        number = self.numbers[slot] = self.numbers.get(slot, -1) + 1
        host = self.hosts[slot % len(self.hosts)]
        self.children[slot] = self._child(_work, host, self.folder, self.seed, slot, number)

    def _child(self, run: Callable[..., None], *given: object) -> BaseProcess:
        child: BaseProcess = self.context.Process(target=run, args=given)
        child.start()
        return child

    def _hurt(self, slot: int) -> None:
        """Kill a process, at times while it is stopped, and start another in its place."""
        if self.chance.random() < 0.2:
            self._signal(slot, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, 0.3))
            if self.chance.random() < 0.5:
                self._signal(slot, signal.SIGCONT)
                return
        self._kill(slot)
        self._check_alive()
        self._start(slot)

    def _signal(self, slot: int, number: int) -> None:
        pid = self.children[slot].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _kill(self, slot: int) -> None:
        child = self.children.pop(slot)
        child.kill()
        child.join()
        self.kills += child.exitcode == -signal.SIGKILL

    def _check_alive(self) -> None:
        for path in self.failures.iterdir():
            time.sleep(0.1)  # It may be being written.
            raise Wrong(path.read_text())

    def _end(self) -> None:
        """Let the processes finish what they are at."""
        self.stop.touch()
        end = time.monotonic() + PATIENCE
        while self.children and time.monotonic() < end:
            for slot, child in [*self.children.items()]:
                child.join(0.02)
                if child.exitcode is not None:
                    del self.children[slot]
                    self._check_alive()
                    assert child.exitcode == 0
        assert not self.children, f"{[*self.children]} hang"

    def check(self) -> Known:
        """Compare what is there with the ledger.

        Raises:
            AssertionError: if a promise was broken.
        """
        known = Known(self.ledger).refresh()
        assert known.twice == []
        (host,) = self.hosts
        check_folder(known, host.opened())
        return known


class SharedStorm(Storm):
    """A storm over a shared registry: hosts with several processes each, and a layer before the store that fails.

    Its processes come from a server of their own, as a process that was forked from one which has used the store cannot.

    Args:
        layer: before the store.
        environment: how the store is reached.
        url: of the registry, which is made.
    """

    pace = (0.3, 1.5)
    slots = (4, 6)

    def __init__(
        self, folder: Path, seed: int, *, layer: Layer, environment: Mapping[str, str], url: str
    ) -> None:
        self._layer, self._environment, self._url = layer, environment, url
        super().__init__(folder, seed)

    def _made(self) -> Sequence[Host]:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "registry.registry", "registry.remote.s3"])
        hosts = [self._host(str(number)) for number in range(self.chance.randint(2, 3))]
        self._in_child(_make, hosts[0], self.failures)
        return hosts

    def _host(self, name: str) -> Host:
        environment = {**self._environment, "XDG_DATA_HOME": str(self.folder / f"host-{name}")}
        return Host(self._url, environment)

    def _in_child(self, run: Callable[..., None], *given: object) -> None:
        child = self._child(run, *given)
        child.join()
        self._check_alive()
        assert child.exitcode == 0

    def _hurt(self, slot: int) -> None:
        """Let the store fail, or kill a process."""
        self._layer.latency = self.chance.choice([0, 0, 0.01, 0.05])
        if self.chance.random() < 0.4:
            method, match, do = self.chance.choice(TROUBLES)
            fault = Fault(method, match, do, times=self.chance.choice([1, 1, 2, 12]))
            self._layer.faults = [*self._layer.faults[-3:], fault]
        else:
            super()._hurt(slot)

    def check(self) -> Known:
        """Compare what each host sees with the ledger, with what other hosts see, and with the bucket."""
        self._layer.latency = 0
        self._layer.faults = []
        known = Known(self.ledger).refresh()
        assert known.twice == []
        # One that has seen nothing so far is among them.
        hosts = [*self.hosts, self._host("new")]
        self._in_child(_check_hosts, hosts, self.ledger, self.failures)
        return known


TROUBLES = (
    ("PUT", "/journal/", "409"),
    ("PUT", "/journal/", "lose"),
    ("PUT", "/packs/", "lose"),
    ("PUT", "", "500"),
    ("PUT", "", "503"),
    ("GET", "", "503"),
    ("GET", "", "lose"),
    ("GET", "/packs/", "cut"),
    ("POST", "", "lose"),
)
"""What goes wrong with the store: the method of a request, its path, and what is done to it."""


def _make(host: Host, failures: Path) -> None:
    with _told(failures / "make"):
        os.environ |= host.environment
        # It takes seconds on this server.
        remote.probe = lambda bucket: None
        Registry(host.place)


def _check_hosts(hosts: Sequence[Host], ledger: Path, failures: Path) -> None:
    with _told(failures / "check"):
        known = Known(ledger).refresh()
        check_shared(known, [host.opened() for host in hosts])


def check_folder(known: Known, registry: Registry) -> None:
    """Assert that a registry in a folder holds what the ledger says, and nothing else."""
    check_values(known, registry)
    assert broken_rules(registry) == []
    assert [problem.message for problem in registry.verify().problems] == []
    collect(registry, grace=0, now=time.time() + 2 * GRACE)
    check_values(known, registry)
    assert broken_rules(registry) == []
    packs = {digest for (digest,) in registry.catalog.query("SELECT digest FROM packs")}
    assert set(registry.store.pack_digests()) == packs
    assert set(registry.store) == {one for (one,) in registry.catalog.query("SELECT id FROM manifests")}
    assert list(registry.store.tmp.iterdir()) == []
    _check_rebuilt(registry)


def _check_rebuilt(registry: Registry) -> None:
    """Assert that the log says what the catalog does."""
    before = dump(registry)
    registry.catalog.close()
    for path in registry.root.glob("catalog.sqlite*"):
        path.unlink()
    found = registry.rebuild()
    assert (found.damaged, found.unnamed) == ((), ())
    assert dump(registry) == before
    registry.catalog.close()


def check_shared(known: Known, hosts: Sequence[Registry]) -> None:
    """Assert that every host of a shared registry holds what the ledger says, and that the bucket has nothing else."""
    for registry in hosts:
        registry.outbox.share()
        assert not registry.outbox
    for registry in hosts:
        registry.catalog.commit(lambda view: [])
        tokens = {version.step for version in all_versions(registry)}
        assert known.must_be_shared() - tokens == set()
    for registry in hosts:
        check_values(known, registry)
        check_equal_views(hosts)
        assert broken_rules(registry) == []
        assert [problem.message for problem in registry.verify().problems] == []
    for registry in hosts:
        collect(registry, grace=0, now=time.time() + 2 * GRACE)
        assert list(registry.store.tmp.iterdir()) == []
    for registry in hosts:
        registry.catalog.commit(lambda view: [])
        check_values(known, registry)
        assert registry.store.elsewhere is not None
        packs = {digest for (digest,) in registry.catalog.query("SELECT digest FROM packs")}
        assert set(registry.store.elsewhere.ages()) == packs
    check_equal_views(hosts)
    for registry in hosts:
        _check_rebuilt(registry)


def check_equal_views(hosts: Sequence[Registry]) -> None:
    """Assert that hosts have the same entries, without a gap, and that the same follows from them."""
    first, *others = [
        ([item.entry.digest for item in registry.catalog.journal.read() if item.entry], dump(registry))
        for registry in hosts
    ]
    assert len(first[0]) == hosts[0].catalog.ledger().seq
    for other in others:
        assert other == first


def check_values(known: Known, registry: Registry) -> None:
    """Assert that versions, their values and names, and artifacts are what the ledger says."""
    versions = {version.name: version for version in all_versions(registry)}
    assert known.must_be_there() - set(versions) == set()
    assert {name for name in versions if known.must_be_gone(name)} == set()
    tokens = [version.step for version in versions.values()]
    assert len(tokens) == len(set(tokens))
    for name, version in versions.items():
        known.check(name, version.step, registry[name].load(), was_thin=known.must_be_thin(name))
    for key, values in known.values.items():
        kind, _, rest = key.partition(" ")
        name = rest.partition(" ")[0]
        if kind == "artifact":
            found = registry.artifacts.id_for(rest)
            loaded = None if found is None else registry.artifacts.load(found)
            expected = [value and storm.tree_of(Content(*value)) for value in values]
            assert any(storm.equal(loaded, value) for value in expected), key
            continue
        if kind == "alias":
            model, _, alias = rest.partition("@")
            (value,) = [
                one.name for one in versions.values() if one.model == model and alias in one.aliases
            ] or [None]
            assert value in values or (value is None and any(map(known.may_be_gone, filter(None, values)))), (
                key
            )
            continue
        text = rest.partition(" ")[2]
        if name in versions:
            here = versions[name]
            value = (text in here.tags or text in [note for _, note in here.notes]) or None
            assert value in values, key
