"""A simulator: several programs work on one registry in one process, and a seed decides whose turn it is.

Each actor is a thread with a registry object of its own, as another process would have one. Only one runs at a time. At
every durable step, at every lock and before every file that is opened, the seed decides who goes on. It also decides when
the machine is killed or loses power. What was not synced then may be lost, torn or kept, and names of files whose
folder was not synced may be the old ones.

With `--hosts`, the actors are on several hosts that share a registry in a bucket, whose requests are durable steps as well.

What was acknowledged is written down outside, and checked against the registry while it is used and after each crash.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soak
import torch
from support import broken_rules, collect, may_be_an_old_log

from registry import Registry
from registry.cache import contents
from registry.catalog import catalog
from registry.log import entries, journal
from registry.remote import journal as remote_journal
from registry.remote import packs, remote, shared_log
from registry.store import durable, pack, places
from registry.store.errors import Conflict, NotFound, RegistryError

ACTORS = 4
SWITCH = 0.35
"""How often another actor gets its turn at a step."""

OPERATIONS_OF_A_SEED = 300

SQLITE = "catalog.sqlite"


class Crashed(BaseException):
    """The machine has stopped; whoever gets this does nothing any more."""


class Found(AssertionError):
    """Something that was acknowledged is not so."""


_MOVED = 1e-3 * torch.randn(1_100, generator=torch.Generator().manual_seed(0))


def state(number: int) -> dict[str, Any]:
    """A small training state: what all share, what is near that of its neighbours, and what is its own."""
    near = torch.arange(1_100.0)
    near[: 30 * number % 1_000] += _MOVED[: 30 * number % 1_000]
    near[-1] = number
    return {
        "model": {"shared": torch.arange(50.0), "near": near, "own": torch.full((9,), float(number))},
        "optimizer": {"state": {0: torch.full((600,), -float(number % 5))}, "param_groups": [{"n": number}]},
    }


def number_of(tree: dict[str, Any], number: int, *, thinned: bool) -> bool:
    """Whether a loaded tree is the state of a number, perhaps without its optimizer."""
    expected = state(number)
    if thinned and set(tree) == {"model"}:
        del expected["optimizer"]
    if set(tree) != set(expected):
        return False
    same = all(torch.equal(tree["model"][name], tensor) for name, tensor in expected["model"].items())
    if "optimizer" in expected:
        same = same and tree["optimizer"]["param_groups"] == [{"n": number}]
        same = same and torch.equal(tree["optimizer"]["state"][0], expected["optimizer"]["state"][0])
    return same


@dataclass
class Known:
    """What is known of a version that was acknowledged.

    Attributes:
        may_be_thin: whether it was asked to be cut down to its weights.
        removers: how many have asked to remove it and were not refused; `is_gone` once that was acknowledged.
        names: aliases, tags and notes that were acknowledged, and that nobody has asked to take away.
    """

    number: int
    may_be_thin: bool = False
    removers: int = 0
    is_gone: bool = False
    names: set[tuple[str, str]] = field(default_factory=set)

    @property
    def may_be_gone(self) -> bool:
        return self.removers > 0 or self.is_gone


class Disk(durable.Disk):
    """Does each step, notes what a power cut could undo, and lets others have their turn."""

    def __init__(self, world: World) -> None:
        self.world = world

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        self.world.pause()
        yield
        self.world.pause()

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        with self._step():
            safe = os.fstat(fd).st_size if path.suffix == ".log" else 0
            self.world.unsynced.setdefault(os.fstat(fd).st_ino, safe)
            return super().write(fd, path, data)

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        with self._step():
            self.world.unsynced[os.fstat(fd).st_ino] = 0
            return super().write_at(fd, path, data, offset)

    def sync(self, fd: int, path: Path) -> None:
        with self._step():
            super().sync(fd, path)
            self.world.unsynced.pop(os.fstat(fd).st_ino, None)

    def sync_folder(self, path: Path, folder: int) -> None:
        with self._step():
            super().sync_folder(path, folder)
            self.world.pending = [change for change in self.world.pending if change.folder != path]
            self.world.made = [made for made in self.world.made if made.parent != path]

    def mkdir(self, path: Path, folder: int) -> None:
        with self._step():
            super().mkdir(path, folder)
            self.world.made.append(path)

    def rename(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        with self._step():
            change = Pending(target.parent, source, target, self.world.buried(target))
            super().rename(source, target, source_folder, target_folder)
            self.world.pending.append(change)

    def link(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        with self._step():
            super().link(source, target, source_folder, target_folder)

    def unlink(self, path: Path, folder: int) -> None:
        with self._step():
            change = Pending(path.parent, path, None, self.world.buried(path))
            super().unlink(path, folder)
            self.world.pending.append(change)

    def truncate(self, fd: int, path: Path, size: int) -> None:
        with self._step():
            super().truncate(fd, path, size)


class AtOnce(Executor):
    """Does what threads would do beside an actor in its own, as nothing but the seed may decide who comes first."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, task: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(task(*arguments, **named))
        except Exception as error:
            done.set_exception(error)
        return done

    def map(self, task: Callable[..., Any], *arguments: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(task, *arguments)


@dataclass
class Pending:
    """A change of names that a power cut may undo: a rename, or a removal if there is no target.

    Attributes:
        buried: the file that the target's name had before, or that was removed.
    """

    folder: Path
    source: Path
    target: Path | None
    buried: Path | None


class Actor:
    """One program: draws what to do next, does it, and writes down what was acknowledged."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.chance = random.Random(f"{world.seed} {index}")
        self.turn = threading.Semaphore(0)
        self.registry: Registry | None = None
        self.done = False
        self.thread = threading.Thread(target=self._run, name=f"actor-{index}", daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            while not self.world.crashed and self.world.budget > 0:
                self.world.budget -= 1
                self.act()
        except Crashed:
            pass
        except BaseException as error:
            self.world.failure = self.world.failure or error
        finally:
            with contextlib.suppress(BaseException):
                if self.registry is not None and not self.world.crashed:
                    self.registry.catalog.close()
            # What this thread has open would be closed behind its end, while others have their turn.
            self.registry = None
            gc.collect()
            self.done = True
            self.world.hand_on(self)

    def act(self) -> None:
        """One operation."""
        gc.collect()
        if self.registry is None or self.chance.random() < 0.05:
            self.registry = self.world.opened(self.index)
        # What was open before is closed as its memory is freed, and Python passes over what is raised meanwhile.
        if self.world.crashed:
            raise Crashed
        name = self.chance.choices(*self.world.operations)[0]
        self.world.trace.append((self.index, name))
        try:
            OPERATIONS[name](self, self.registry, self.world)
        except Conflict as error:  # Which is told, and costs nothing.
            self.world.trace.append((self.index, f"{name}: {error}"))
        self.world.count += 1

    def pick(self, *, gone: bool = False) -> str | None:
        """The name of some version that was acknowledged, and that this host has seen."""
        names = [name for name, known in self.world.versions.items() if gone or not known.is_gone]
        name = self.chance.choice(names[-12:]) if names else None
        assert self.registry is not None
        self.world.catch_up(self.registry)
        return name


def _save(actor: Actor, registry: Registry, world: World) -> None:
    number = world.next_number
    world.next_number += 1
    _save_number(actor, registry, world, number)


def _save_again(actor: Actor, registry: Registry, world: World) -> None:
    name = actor.pick(gone=True)
    if name is not None:
        _save_number(actor, registry, world, world.versions[name].number)


def _save_number(actor: Actor, registry: Registry, world: World, number: int) -> None:
    model = f"net{actor.chance.randrange(2)}"
    world.in_flight.append((model, number))
    saved = registry.save(model, state(number), epoch=number, metrics={"n": float(number)})
    world.versions[saved.name] = Known(number)
    world.in_flight.remove((model, number))


def _load(actor: Actor, registry: Registry, world: World) -> None:
    name = actor.pick()
    if name is None:
        return
    known = world.versions[name]
    try:
        tree = registry[name].load(copy=actor.chance.random() < 0.5)
    except NotFound:
        if not known.may_be_gone and not known.may_be_thin:
            raise
        if known.may_be_gone:
            return
        tree = registry[name].load()  # Its id has just changed.
    if not number_of(tree, known.number, thinned=known.may_be_thin):
        raise Found(f"{name} is not state {known.number}")


def _thin(actor: Actor, registry: Registry, world: World) -> None:
    name = actor.pick()
    if name is not None:
        world.versions[name].may_be_thin = True
        with contextlib.suppress(NotFound):
            registry.thin(name)
        _unless_gone(actor, world, name)


def _remove(actor: Actor, registry: Registry, world: World) -> None:
    name = actor.pick()
    if name is None or len(world.versions) < 3:
        return
    known = world.versions[name]
    known.removers += 1
    force = actor.chance.random() < 0.3
    try:
        registry.remove([name], force=force)
    except Conflict:
        known.removers -= 1
        raise
    except NotFound:
        known.removers -= 1
        _unless_gone(actor, world, name)
    else:
        known.is_gone = True


def _unless_gone(actor: Actor, world: World, name: str) -> None:
    registry = world.opened(actor.index)
    world.catch_up(registry)
    is_there = name in present(registry)  # Others may have their turn meanwhile.
    if not is_there and not world.versions[name].may_be_gone:
        raise Found(f"{name} is gone")


def _name(actor: Actor, registry: Registry, world: World) -> None:
    """Give a version an alias, a tag or a note that no other actor takes away."""
    name = actor.pick()
    if name is None:
        return
    known = world.versions[name]
    word = f"w{world.next_word}"
    world.next_word += 1
    try:
        if actor.chance.random() < 0.4:
            registry.set_tag(name, word)
            known.names.add(("tag", word))
        elif actor.chance.random() < 0.5:
            registry.add_note(name, word)
            known.names.add(("note", word))
        else:
            registry.set_alias(name, word)
            known.names.add(("alias", word))
    except NotFound:
        _unless_gone(actor, world, name)


def _artifact(actor: Actor, registry: Registry, world: World) -> None:
    size = actor.chance.randrange(3, 6)
    if world.is_computing:  # Another would wait for it with its turn in hand.
        return
    world.is_computing = True
    made = registry.cached(_computed, key=["size"])(size=size)
    if not torch.equal(made, torch.arange(float(size))):
        raise Found(f"the artifact of {size} is another")
    world.is_computing = False
    if actor.chance.random() < 0.2:
        registry.artifacts.clear()


def _computed(size: int) -> torch.Tensor:
    return torch.arange(float(size))


def _collect(actor: Actor, registry: Registry, world: World) -> None:
    registry.collect_garbage(grace=0)


def _compact(actor: Actor, registry: Registry, world: World) -> None:
    if actor.chance.random() < 0.2:
        registry.expand()
    else:
        registry.compact(similar=actor.chance.random() < 0.5, alone=actor.chance.random() < 0.5)


def _verify(actor: Actor, registry: Registry, world: World) -> None:
    found = [problem.message for problem in registry.verify().problems]
    # A save that gc has overtaken writes its manifest's file again a moment after the log has it; verify waits for that,
    # but here nobody else goes on while one waits.
    found = [message for message in found if "the file is missing; the log has it" not in message]
    if found:
        raise Found(f"verify finds {found[0]}")


def _rebuild(actor: Actor, registry: Registry, world: World) -> None:
    found = registry.rebuild()
    if found.damaged:
        raise Found(f"rebuild finds {found.damaged[0]}")


def _lose_catalog(actor: Actor, registry: Registry, world: World) -> None:
    for path in registry.root.glob(f"{SQLITE}*"):
        path.unlink(missing_ok=True)


OPERATIONS: dict[str, Callable[[Actor, Registry, World], None]] = {
    "save": _save,
    "save again": _save_again,
    "load": _load,
    "thin": _thin,
    "remove": _remove,
    "name": _name,
    "artifact": _artifact,
    "gc": _collect,
    "compact": _compact,
    "verify": _verify,
    "rebuild": _rebuild,
    "lose the catalog": _lose_catalog,
}
WEIGHTS = {
    "save": 12,
    "save again": 5,
    "load": 30,
    "thin": 5,
    "remove": 8,
    "name": 8,
    "artifact": 4,
    "gc": 5,
    "compact": 1.5,
    "verify": 0.5,
    "rebuild": 0.4,
    "lose the catalog": 0.3,
}


def present(registry: Registry) -> dict[str, Any]:
    """The versions that a registry has, by name."""
    from registry.catalog.versions import find_versions

    return {version.name: version for version in find_versions(registry.catalog, "1 = 1")}


def stored_packs(registry: Registry) -> set[str]:
    """The packs that lie in a registry's folder, or in the bucket that hosts share."""
    elsewhere = registry.store.elsewhere
    return set(registry.store.pack_digests() if elsewhere is None else elsewhere.ages())


class World:
    """A registry, its actors, and what they were told.

    Args:
        place: a folder, best in memory.
        without: operations that are left out, to find out which a failure needs.
        hosts: how many share the registry; none for one in a folder.
    """

    def __init__(
        self, place: Path, seed: int, *, without: frozenset[str] = frozenset(), hosts: int = 0
    ) -> None:
        self.seed = seed
        self.hosts = hosts
        self.chance = random.Random(seed)
        self.place = place
        self.root = place / "0"
        names = [name for name in OPERATIONS if name not in without]
        self.operations = (names, [WEIGHTS[name] for name in names])
        self.versions: dict[str, Known] = {}
        self.in_flight: list[tuple[str, int]] = []
        self.trace: list[tuple[int, str]] = []
        self.next_number = self.next_word = 1
        self.count = self.crashes = self.budget = self.turns = 0
        self.failure: BaseException | None = None
        self._clear()

    def opened(self, index: int) -> Registry:
        """The registry as an actor's host has it."""
        if not self.hosts:
            return Registry(self.root)
        folder = self.folders(self.root)[index % self.hosts]
        remote.folder_for = lambda address: folder
        return Registry((self.root / "bucket").as_uri())

    def folders(self, root: Path) -> list[Path]:
        """The folders that hold a catalog."""
        return [root / f"host-{number}" for number in range(self.hosts)] or [root]

    def catch_up(self, registry: Registry) -> None:
        """Let a host see what others have done."""
        if self.hosts:
            registry.catalog.commit(lambda view: [])

    def _clear(self) -> None:
        self.crashed = self.is_computing = False
        self.actors: list[Actor] = []
        self.current: Actor | None = None
        self.crash_in = -1
        self.unsynced: dict[int, int] = {}
        self.pending: list[Pending] = []
        self.made: list[Path] = []
        self.over = threading.Event()

    # -- turns -------------------------------------------------------------------------------------------

    def pause(self, *, must: bool = False) -> None:
        """Let another actor go on, if the seed says so.

        Args:
            must: whether this one cannot.
        """
        actor = self.current
        if actor is None or threading.current_thread() is not actor.thread:
            return
        if self.crashed:
            raise Crashed
        self.crash_in -= 1
        if self.crash_in == 0:
            self._crash()
            raise Crashed
        if must or self.chance.random() < SWITCH:
            others = [one for one in self.actors if not one.done and one is not actor]
            if others:
                self._give(self.chance.choice(others))
                actor.turn.acquire()
                if self.crashed:
                    raise Crashed

    def _give(self, actor: Actor) -> None:
        self.turns += 1
        self.current = actor
        actor.turn.release()

    def hand_on(self, actor: Actor) -> None:
        """Give the turn to somebody else for good."""
        left = [one for one in self.actors if not one.done]
        if left:
            self._give(self.chance.choice(left))
        else:
            self.current = None
            self.over.set()

    # -- crashes -----------------------------------------------------------------------------------------

    def buried(self, path: Path) -> Path | None:
        """A second name for a file that is about to lose its own."""
        if not path.is_file():
            return None
        grave = self.place / "graves" / f"{len(self.pending)}-{self.chance.getrandbits(60)}"
        grave.parent.mkdir(exist_ok=True)
        os.link(path, grave)
        return grave

    def _crash(self) -> None:
        """Stop the machine: the folder as a kill leaves it, or as a power cut may."""
        self.crashed = True
        self.crashes += 1
        target = self.place / str(self.crashes)
        shutil.copytree(self.root, target, symlinks=True)
        for folder in self.folders(target):
            (folder / f"{SQLITE}-shm").unlink(missing_ok=True)
        durable.disk.safe_folders.clear()
        if self.chance.random() < 0.6:
            self._cut_power(target)
        for folder in self.folders(target):
            self._damage_catalog(folder)
        shutil.rmtree(self.root)
        self.root = target

    def _cut_power(self, target: Path) -> None:
        for path in [path for path in self.root.rglob("*") if path.is_file()]:
            safe = self.unsynced.get(path.stat().st_ino)
            if safe is not None and SQLITE not in path.name:
                self._tear(target / path.relative_to(self.root), safe)
        for change in reversed(self.pending):
            if self.chance.random() < 0.5:
                self._undo(change, target)
        for path in self.made:
            if self.chance.random() < 0.5:
                shutil.rmtree(target / path.relative_to(self.root), ignore_errors=True)

    def _tear(self, path: Path, safe: int) -> None:
        """Lose what was not synced: all of it, its end, or some of its sectors."""
        data = path.read_bytes()
        fate = self.chance.randrange(4)
        if fate == 0:
            data = data[:safe]
        elif fate == 1:
            data = data[: self.chance.randint(safe, len(data))]
        elif fate == 2:
            torn = bytearray(data)
            for start in range(safe - safe % 512, len(data), 512):
                if self.chance.random() < 0.5:
                    first = max(start, safe)
                    torn[first : start + 512] = bytes(len(torn[first : start + 512]))
            data = bytes(torn)
        path.chmod(0o644)
        path.write_bytes(data)

    def _undo(self, change: Pending, target: Path) -> None:
        source = target / change.source.relative_to(self.root)
        if change.target is None:
            if change.buried is not None and not source.exists():
                shutil.copyfile(change.buried, source)
            return
        renamed = target / change.target.relative_to(self.root)
        if renamed.exists() and not source.exists():
            renamed.rename(source)
            if change.buried is not None:
                shutil.copyfile(change.buried, renamed)

    def _damage_catalog(self, target: Path) -> None:
        """What a crash can do to a catalog, which is a view: lose it, or leave an older one."""
        fate = self.chance.random()
        older = self.place / f"older-{target.name if self.hosts else ''}"
        if fate < 0.1:
            for path in target.glob(f"{SQLITE}*"):
                path.unlink()
        elif fate < 0.2 and older.exists() and target.exists():
            for path in target.glob(f"{SQLITE}*"):
                path.unlink()
            shutil.copyfile(older, target / SQLITE)
        elif fate < 0.25:
            (target / f"{SQLITE}-wal").unlink(missing_ok=True)

    # -- running -----------------------------------------------------------------------------------------

    def run(self, operations: int) -> None:
        """Let the actors do so many operations, with crashes in between.

        Raises:
            Found, RegistryError: if something that was acknowledged is not so, or an operation fails.
        """
        with self._patched():
            for index in range(self.hosts):
                self.opened(index).catalog.close()
            while operations > 0:
                part = min(operations, self.chance.randint(5, 60))
                operations -= part
                self._session(part)
                self.check()

    def _session(self, operations: int) -> None:
        self._clear()
        self.budget = operations
        if self.chance.random() < 0.7:
            self.crash_in = self.chance.randint(1, 40 * operations)
        self.actors = [Actor(self, index) for index in range(ACTORS)]
        for actor in self.actors:
            actor.chance.seed(f"{self.seed} {self.count} {actor.index}")
            actor.thread.start()
        self._give(self.chance.choice(self.actors))
        if not self.over.wait(600):
            raise Found("the actors wait for one another")
        for actor in self.actors:
            actor.thread.join()
        self.current = None
        if self.failure is not None:
            raise self.failure
        if not self.crashed:
            self.crashed = False

    def check(self) -> None:
        """Compare the registry, as each host has it, with what was acknowledged."""
        for index in range(self.hosts or 1):
            registry = self.opened(index)
            self.catch_up(registry)
            self._check(registry)
        shutil.rmtree(self.place / "graves", ignore_errors=True)
        self.pending.clear()
        self.made.clear()

    def _check(self, registry: Registry) -> None:
        found = present(registry)
        for name, known in self.versions.items():
            self._check_version(registry, name, known, found)
        unknown = [version for name, version in found.items() if name not in self.versions]
        for version in unknown:  # A save that was in flight when the machine stopped.
            number = version.epoch
            if (version.model, number) not in self.in_flight:
                raise Found(f"nobody saved {version.name}")
            if not number_of(registry[version.name].load(), number, thinned=False):
                raise Found(f"{version.name} is not state {number}")
            self.versions[version.name] = Known(number)
        self.in_flight.clear()
        if self.chance.random() < 0.2:
            if problems := broken_rules(registry):
                raise Found(problems[0])
            packs = stored_packs(registry)
            collect(registry, grace=0)
            if self.hosts or not may_be_an_old_log(registry):
                packs = {row[0] for row in registry.catalog.query("SELECT digest FROM packs")}
            if stored_packs(registry) != packs:
                raise Found("gc leaves packs that nothing needs")
            if problems := [problem.message for problem in registry.verify().problems]:
                raise Found(problems[0])
        registry.catalog.close()
        if self.chance.random() < 0.2:
            older = self.place / f"older-{registry.root.name if self.hosts else ''}"
            shutil.copyfile(registry.root / SQLITE, older)

    def _check_version(self, registry: Registry, name: str, known: Known, found: dict[str, Any]) -> None:
        if name not in found:
            if not known.may_be_gone:
                raise Found(f"{name} is gone")
            known.is_gone = True
            return
        if known.is_gone:
            raise Found(f"{name} has come back")
        known.removers = 0
        version = found[name]
        has = {("alias", one) for one in version.aliases} | {("tag", one) for one in version.tags}
        has |= {("note", text) for _, text in version.notes}
        if not known.names <= has:
            raise Found(f"{name} has lost {known.names - has}")
        tree = registry[name].load()
        if not number_of(tree, known.number, thinned=known.may_be_thin):
            raise Found(f"{name} is not state {known.number}")
        known.may_be_thin = set(tree) == {"model"}

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """Put the simulator in the place of the disk, of locks, of time and of chance."""
        clock = iter(range(1 << 40))

        def now() -> str:
            micros = next(clock)
            return f"2026-01-01T{micros // 3_600_000_000 % 24:02d}:{micros // 60_000_000 % 60:02d}:" + (
                f"{micros // 1_000_000 % 60:02d}.{micros % 1_000_000:06d}Z"
            )

        def lock(fd: int, *, seconds: float = 0) -> bool:
            while not durable.try_lock(fd):
                self.pause(must=True)
            self.pause()
            return True

        real_open = places.open_file

        def open_file(path: Path, flags: int, **options: Any) -> int:
            self.pause()
            return real_open(path, flags, **options)

        salts = random.Random(f"{self.seed} salt")
        before = (durable.disk, durable.lock, durable.open_file, places.open_file)
        salt, entry_now = entries.salt, entries.now
        import registry.catalog.commit as commit
        import registry.checkpoints.saving as saving

        commit_now, saving_now = commit.now, saving.now

        class Chance:
            # Who waits for other hosts does not let them go on here.
            uniform = staticmethod(lambda least, most: 0.0)

        looks = random.Random(f"{self.seed} looks")

        class Sometimes:
            """A time that has passed or not by chance: a connection looks at the log now and then."""

            def __radd__(self, _: float) -> float:
                return float("-inf") if looks.random() < 0.2 else float("inf")

        look_again, catalog._LOOK_AGAIN = catalog._LOOK_AGAIN, Sometimes()  # type: ignore[assignment]
        # A connection that nobody has any more is closed when it is collected.
        gc.disable()
        gc.freeze()
        # Temporary files are looked at in the order of their names.
        names = random.Random(f"{self.seed} names")
        urandom, os.urandom = os.urandom, names.randbytes
        # How old a file is depends on the machine.
        settled, places._SETTLED = places._SETTLED, 1 << 62
        recent, contents._RECENT = contents._RECENT, 1 << 62
        durable.disk, durable.lock = Disk(self), lock
        durable.open_file = places.open_file = open_file
        pack.salt = entries.salt = lambda: f"{salts.getrandbits(128):032x}"
        entries.now = commit.now = saving.now = now
        segment = journal.SEGMENT
        journal.SEGMENT = 20_000
        shared = (shared_log._REFRESH, shared_log._CONFIRM, remote.probe, remote.folder_for)
        shared_log._REFRESH, shared_log._CONFIRM = Sometimes(), 0.0  # type: ignore[assignment]
        # Its clients race in threads of their own.
        remote.probe = lambda bucket: None
        catalog_random, catalog.random = catalog.random, Chance  # type: ignore[attr-defined]
        beside = [(module, module.ThreadPoolExecutor) for module in (packs, remote_journal, shared_log)]
        for module, _ in beside:
            module.ThreadPoolExecutor = AtOnce  # type: ignore[attr-defined]
        try:
            yield
        finally:
            durable.disk, durable.lock, durable.open_file, places.open_file = before
            pack.salt, entries.salt, entries.now = salt, salt, entry_now
            commit.now, saving.now = commit_now, saving_now
            journal.SEGMENT = segment
            catalog._LOOK_AGAIN, places._SETTLED = look_again, settled
            contents._RECENT = recent
            os.urandom = urandom
            gc.unfreeze()
            gc.enable()
            shared_log._REFRESH, shared_log._CONFIRM, remote.probe, remote.folder_for = shared
            catalog.random = catalog_random  # type: ignore[attr-defined]
            for module, threads in beside:
                module.ThreadPoolExecutor = threads  # type: ignore[attr-defined]


@dataclass
class Outcome:
    """What a seed gave: how much was done, and what was found."""

    seed: int
    operations: int
    crashes: int
    turns: int
    failure: BaseException | None
    trace: list[tuple[int, str]]


def simulate(seed: int, operations: int, *, without: frozenset[str] = frozenset(), hosts: int = 0) -> Outcome:
    """Run one seed, in memory where there is a folder for that."""
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="registry-simulation-", dir=place))
    world = World(folder, seed, without=without, hosts=hosts)
    failure: BaseException | None = None
    try:
        if not hosts:
            Registry(world.root).catalog.close()
        world.run(operations)
    except (Found, RegistryError, AssertionError, OSError) as error:
        failure = error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(seed, world.count, world.crashes, world.turns, failure, world.trace)


def shrink(seed: int, operations: int, hosts: int) -> tuple[int, frozenset[str]]:
    """The fewest operations, and the most kinds of operations left out, with which a seed still fails."""
    without: frozenset[str] = frozenset()
    for name in OPERATIONS:
        if simulate(seed, operations, without=without | {name}, hosts=hosts).failure is not None:
            without |= {name}
    while (
        operations > 5 and simulate(seed, operations // 2, without=without, hosts=hosts).failure is not None
    ):
        operations //= 2
    return operations, without


def main() -> None:
    """Run seeds, print each outcome as a line of JSON, and end with 1 at the first that fails."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("seeds", nargs="*", type=int)
    arguments.add_argument("--operations", type=int, default=OPERATIONS_OF_A_SEED)
    arguments.add_argument(
        "--soak", metavar="STEM", help="the kept seeds of a test, and fresh ones for its time"
    )
    arguments.add_argument("--hosts", type=int, default=0, help="hosts that share the registry")
    given = arguments.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    logging.disable(logging.CRITICAL)
    # What a stopped machine leaves open is closed without a step.
    shown = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is Crashed else shown(found)
    torch.set_num_threads(1)
    for seed in soak.seeds(given.soak, 25.0) if given.soak else given.seeds:
        outcome = simulate(seed, given.operations, hosts=given.hosts)
        if given.soak:
            numbers = {"seeds": 1, "operations": outcome.operations, "crashes": outcome.crashes}
            soak.count(given.soak, **numbers, turns=outcome.turns)
        if outcome.failure is not None:
            if given.soak:
                soak.keep(given.soak, seed)
            _explain(outcome, given.operations, given.hosts)
            raise SystemExit(1)
        trace = [] if given.soak else outcome.trace
        counts = {"operations": outcome.operations, "crashes": outcome.crashes, "turns": outcome.turns}
        print(json.dumps({"seed": seed, **counts, "trace": trace}), flush=True)


def _explain(outcome: Outcome, operations: int, hosts: int) -> None:
    traceback.print_exception(outcome.failure)
    fewest, without = shrink(outcome.seed, operations, hosts)
    smaller = simulate(outcome.seed, fewest, without=without, hosts=hosts)
    print(f"seed {outcome.seed} fails: {outcome.failure!r}")
    print(f"with {fewest} operations, and without {sorted(without)}: {smaller.failure!r}")
    print("\n".join(f"  actor {actor}: {name}" for actor, name in smaller.trace[-40:]))
    print(f"replay it: python tests/faults/simulator.py {outcome.seed} --hosts {hosts}")


if __name__ == "__main__":
    main()
