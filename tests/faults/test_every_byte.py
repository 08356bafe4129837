"""Every file and every byte: damage gives the right bits or an error that names the file, and verify reports it.

A small registry that holds a bit of everything is copied, damaged in one place or two, and used. Each seed is one case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import random
import shutil
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soak
import torch
from support import Tree, broken_rules, collect

from registry import Registry
from registry.catalog.versions import find_versions, list_aliases, list_models
from registry.log import entries
from registry.store import durable, pack
from registry.store.errors import RegistryError

STEM = "test_every_byte"
BUDGET = 20.0
SEGMENT = 11_000
RUN = "net/first"


class Fast(durable.Disk):
    """A disk whose writes are not made durable, as no power is cut here."""

    def sync(self, fd: int, path: Path) -> None:
        """Nothing."""

    def sync_folder(self, path: Path, folder: int) -> None:
        """Nothing."""


class Refused(NamedTuple):
    """What a question was answered with where it could not be answered."""

    message: str


class State(NamedTuple):
    """What a registry shows of its names after some entries of the log."""

    seq: int
    versions: Mapping[str, str]
    aliases: frozenset[tuple[str, ...]]
    tags: frozenset[tuple[str, ...]]
    notes: frozenset[tuple[str, ...]]


NOTHING = State(0, {}, frozenset(), frozenset(), frozenset())


class World(NamedTuple):
    """What a case starts from.

    Attributes:
        roots: the registry, and as a program leaves it that was killed: with a write-ahead log.
        older: as it was some entries before.
        other: another one whose names are equal.
        truth: the answer to each question.
        bits: what loading gives, by id.
        states: in the order of the log.
        live: the ids of manifests that count.
        users: the questions that need a pack, by the digest of each that counts.
        rests: the packs that hold differences from what is in a pack, by its digest.
    """

    roots: Mapping[str, Path]
    older: Path
    other: Path
    truth: Mapping[str, Any]
    bits: Mapping[str, str]
    states: tuple[State, ...]
    live: frozenset[str]
    users: Mapping[str, frozenset[str]]
    rests: Mapping[str, frozenset[str]]


# -- building ------------------------------------------------------------------------------------------------


def tree(number: int, salt: int) -> Tree:
    moment = torch.full((8,), -float(number)).bfloat16()
    return {
        "model": {"shared": torch.arange(100.0) + salt, "own": torch.full((40, 40), float(number + salt))},
        "optimizer": {
            "state": {0: {"moment": moment}},
            "param_groups": [{"lr": 0.1, "params": [0], "n": number}],
        },
    }


def build(root: Path, *, salt: int, at: Callable[[Registry], None] = lambda registry: None) -> None:
    """Make a registry that holds a bit of everything; `at` sees it after each step."""
    registry = Registry(root)
    run = registry.runs.begin("net", RUN.partition("/")[2], {"config": {"lr": 0.1}})
    for number in range(1, 6):
        before = [{"kind": "resumed-from", "parent": registry["net"].id}] if number > 1 else []
        registry.save(
            "net", tree(number, salt), epoch=number, metrics={"acc": number / 10}, run=run, lineage=before
        )
        at(registry)
    registry.runs.end(run, "finished")
    (root / "runs" / run).mkdir(parents=True)
    (root / "runs" / run / "run.log").write_text("[2026-01-01 00:00:00] - INFO: [a.py][1] one\n" * 3)
    for step in (
        lambda: registry.save("tiny", {"model": {"w": torch.ones(3) * salt}}, loss=0.5),
        lambda: registry.save("tiny", {"model": {"w": torch.ones(3) + salt}}, loss=0.25),
        lambda: registry.set_alias("net:v3", "good"),
        lambda: registry.set_tag("net:v2", "paper"),
        lambda: registry.add_note("net:v4", "checked by hand"),
        lambda: registry.cached(_numbers)(salt),
        lambda: registry.remove(["tiny:v1"]),
        lambda: collect(registry, grace=0),
        lambda: registry.set_alias("net:v2", "old"),
        lambda: registry.set_alias("net:v3", "old"),
        lambda: registry.remove_tag("net:v2", "paper"),
        lambda: registry.set_tag("net:v4", "paper"),
        lambda: registry.save("net", tree(6, salt), epoch=6, metrics={"acc": 0.6}),
        lambda: registry.thin("net:v6"),
        lambda: registry.remove(["net:v1"], force=True),
        lambda: registry.compact(["net"]),
        lambda: registry.compact(alone=True),
        lambda: registry.save("net", tree(7, salt), epoch=7, metrics={"acc": 0.55}),
        lambda: registry.set_tag("net:v7", "last"),
    ):
        step()
        at(registry)
    registry.catalog.close()


def _numbers(count: int) -> torch.Tensor:
    return torch.arange(float(count))


@contextlib.contextmanager
def no_chance() -> Iterator[None]:
    """Let random names and times be the same each time, so that a seed names the same byte again."""
    drawn = iter(range(1, 1 << 30))

    def salt() -> str:
        return hashlib.sha256(str(next(drawn)).encode()).hexdigest()[:32]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(drawn))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(entries, "salt", salt)
        patched.setattr(entries, "datetime", Clock)
        patched.setattr(pack, "salt", salt)
        patched.setattr("registry.cache.decorator.time", _NoTime)
        yield


class _NoTime:
    """A clock that stands still."""

    @staticmethod
    def perf_counter() -> float:
        return 0.0


def state_of(registry: Registry) -> State:
    versions = find_versions(registry.catalog, "1 = 1")
    return State(
        seq=registry.catalog.ledger().seq,
        versions={version.name: version.id for version in versions},
        aliases=frozenset((model, alias, found) for model, alias, _, found in list_aliases(registry.catalog)),
        tags=frozenset((version.id, tag) for version in versions for tag in version.tags),
        notes=frozenset((version.id, text) for version in versions for _, text in version.notes),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    top = tmp_path_factory.mktemp("every-byte")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(durable, "disk", Fast())
        patched.setattr("registry.log.journal.SEGMENT", SEGMENT)
        patched.setattr("registry.log.history.SEGMENT", SEGMENT)
        root, states = top / "golden", []

        def at(registry: Registry) -> None:
            states.append(state_of(registry))
            if len(states) == 16:
                shutil.copytree(root, top / "older")
            shutil.rmtree(top / "killed", ignore_errors=True)
            shutil.copytree(root, top / "killed")

        with no_chance():
            build(root, salt=0, at=at)
            build(top / "other", salt=50)
        assert (top / "killed" / "catalog.sqlite-wal").stat().st_size
        Registry(top / "older").catalog.close()
        older = Registry(top / "older")
        older.catalog.query("SELECT 1")
        older.catalog.close()
        registry = Registry(root)
        assert broken_rules(registry) == []
        assert len(registry.catalog.journal.segments()) == 2
        assert registry.catalog.query("SELECT 1 FROM tensors WHERE base IS NOT NULL")
        truth = answers(root)
        assert not [answer for answer in truth.values() if isinstance(answer, Refused)]
        versions = find_versions(registry.catalog, "1 = 1")
        names = {version.id: f"load {version.name}" for version in versions}
        names |= {one.id: "load artifact" for one in registry.artifacts.find()}
        query = registry.catalog.query
        users: dict[str, set[str]] = {digest: set() for (digest,) in query("SELECT digest FROM packs")}
        for found, digest in query("SELECT u.id, p.digest FROM uses u JOIN packs p ON p.number = u.pack"):
            users[digest].add(names[found])
        rests: dict[str, set[str]] = {digest: set() for digest in users}
        for base, digest in query(
            "SELECT b.digest, p.digest FROM tensors t JOIN packs p ON p.number = t.pack "
            "JOIN tensors s ON s.digest = t.base JOIN packs b ON b.number = s.pack"
        ):
            rests[base].add(digest)
        registry.catalog.close()
        yield World(
            roots={"golden": root, "killed": top / "killed"},
            older=top / "older",
            other=top / "other",
            truth=truth,
            bits={version.id: truth[f"load {version.name}"][1] for version in versions},
            states=tuple(states),
            live=frozenset(names),
            users={digest: frozenset(found) for digest, found in users.items()},
            rests={digest: frozenset(found) for digest, found in rests.items()},
        )


# -- asking --------------------------------------------------------------------------------------------------

LOADED = ("net:v2", "net:v3", "net:v4", "net:v5", "net:v6", "net:v7", "tiny:v2")


def answers(root: Path) -> dict[str, Any]:
    """What a fresh program answers to each question about a registry."""
    try:
        registry = Registry(root, create=False)
    except RegistryError as error:
        return dict.fromkeys(_questions(None), Refused(str(error)))
    found: dict[str, Any] = {}
    try:
        for name, ask in _questions(registry).items():
            try:
                found[name] = ask()
            except RegistryError as error:
                found[name] = Refused(str(error))
    finally:
        registry.catalog.close()
    return found


def _questions(registry: Any) -> dict[str, Callable[[], Any]]:
    def load(name: str) -> tuple[Any, str]:
        checkpoint = registry[name]
        return registry.resolve(name), bits_of(checkpoint.load())

    def artifact() -> str:
        one = next(iter(registry.artifacts.find()), None)
        return bits_of(registry.store.get(one.id)) if one else "none"

    def listed() -> Any:
        return [(one.name, one.versions, one.latest) for one in list_models(registry.catalog)]

    return {
        "models": listed,
        "versions": lambda: find_versions(registry.catalog, "1 = 1"),
        "aliases": lambda: list_aliases(registry.catalog),
        "runs": lambda: [one._replace(folder=None) for one in registry.runs.find()],
        "artifacts": lambda: [one._replace(used=0.0) for one in registry.artifacts.find()],
        "latest": lambda: registry.resolve("net").id,
        "good": lambda: registry.resolve("net@good").id,
        "best": lambda: registry.best("net", "acc").id,
        **{f"load {name}": lambda name=name: load(name) for name in LOADED},
        "load artifact": artifact,
    }


def bits_of(value: Any) -> str:
    """A digest of a tree: of every bit of its tensors, and of everything else."""
    hasher = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            hasher.update(f"{item.dtype} {tuple(item.shape)}".encode())
            hasher.update(item.contiguous().view(torch.uint8).numpy())
        elif isinstance(item, np.ndarray):
            hasher.update(f"{item.dtype} {item.shape}".encode() + item.tobytes())
        elif isinstance(item, Mapping):
            for key, below in item.items():
                hasher.update(repr(key).encode())
                add(below)
        elif isinstance(item, list | tuple):
            hasher.update(f"{type(item).__name__} {len(item)}".encode())
            for below in item:
                add(below)
        else:
            hasher.update(repr(item).encode())

    add(value)
    return hasher.hexdigest()


def verified(root: Path) -> list[str]:
    """What `verify` reports; one line if it cannot begin."""
    try:
        registry = Registry(root, create=False)
        try:
            found = registry.verify()
            return [one.message for one in (*found.problems, *found.mended)]
        finally:
            registry.catalog.close()
    except RegistryError as error:
        return [str(error)]


def command(*words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command line in this process."""
    from registry.cli.app import app

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patched.setattr(sys, "argv", ["registry", *words])
        with pytest.raises(SystemExit) as caught:
            app.main(args=list(words), prog_name="registry")
    assert isinstance(caught.value.code, int)
    return caught.value.code, out.getvalue(), err.getvalue()


# -- damaging ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One damage.

    Attributes:
        text: what it is, for people.
        kinds: of the files that it touches: `log`, `catalog`, `manifest`, `pack`, `settings`, `other`.
        names: one of which an error must hold.
        count: the number to which it counts.
        paths: of the files.
        lost: entries that neither copy of the log has any more.
        is_short: whether the end of the log is lost in both copies, so that nothing shows it.
    """

    text: str
    kinds: frozenset[str]
    names: tuple[str, ...]
    count: str
    paths: tuple[str, ...]
    lost: tuple[int, ...] = ()
    is_short: bool = False


def kind_of(path: str) -> str:
    """What a file is, by its path below the registry's folder."""
    top, _, rest = path.partition("/")
    if top.startswith("catalog.sqlite"):
        return "catalog"
    if top == "journal" and rest.endswith(".log"):
        return "log"
    return {"manifests": "manifest", "packs": "pack", "registry.toml": "settings"}.get(top, "other")


WORDS = {
    "log": ("journal", " log"),
    "catalog": ("catalog",),
    "settings": ("registry.toml", "format", "no registry"),
    "other": (),
}


def files_of(root: Path) -> dict[str, int]:
    """Sizes of all files of a registry, by path."""
    found = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.endswith("-shm"))
    return {str(path.relative_to(root)): path.stat().st_size for path in found}


def fresh(source: Path, target: Path) -> Path:
    """A copy in which packs and manifests are hard links; whoever damages one makes a file of its own."""
    shutil.rmtree(target, ignore_errors=True)
    for folder, folders, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        for name in folders:
            (place / name).mkdir(parents=True)
        is_fixed = kind_of(f"{Path(folder).relative_to(source)}/x") in ("manifest", "pack")
        for name in names:
            (os.link if is_fixed else shutil.copyfile)(Path(folder, name), place / name)
    return target


def put(path: Path, data: bytes) -> None:
    """Let a file hold other bytes, in an inode of its own."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


BYTES = ("flip", "zero", "ones", "truncate")
WHOLE = ("append", "delete", "empty", "swap", "older", "transplant", "repeat", "reorder", "drop")
WEIGHTS = {"log": 30, "catalog": 30, "manifest": 12, "pack": 20, "settings": 5, "other": 3}


def damage_one(world: World, root: Path, chance: random.Random) -> Case:
    """Damage one file, or the one and another of its kind."""
    files = files_of(root)
    kind = chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
    path = chance.choice([name for name in files if kind_of(name) == kind])
    how = chance.choice(WHOLE) if chance.random() < 0.25 or not files[path] else chance.choice(BYTES)
    return damage(world, root, path, how, chance)


def damage(
    world: World, root: Path, path: str, how: str, chance: random.Random, at: int | None = None
) -> Case:
    kind, place = kind_of(path), root / path
    before = place.read_bytes()
    data = bytearray(before)
    position = at if at is not None else chance.randrange(len(data)) if data else 0
    names, paths = WORDS.get(kind, (Path(path).stem,)), (path,)
    if how in BYTES and data:
        if how == "flip":
            data[position] ^= 1 << chance.randrange(8)
        elif how == "truncate":
            del data[position:]
        else:
            data[position] = 0 if how == "zero" else 255
        put(place, bytes(data))
    elif how == "append":
        put(place, before + chance.choice([b"\0", b"x" * 70, b"{}\n", b"a\nb\n", chance.randbytes(5_000)]))
    elif how == "delete":
        place.unlink()
    elif how == "swap":
        others = [name for name in files_of(root) if kind_of(name) == kind and name != path]
        if others:
            other = chance.choice(others)
            put(place, (root / other).read_bytes())
            put(root / other, before)
            names = (*names, *WORDS.get(kind, (Path(other).stem,)))
            paths = (path, other)
    elif how == "older":
        if (world.older / path).exists():
            put(place, (world.older / path).read_bytes())
    elif how == "transplant":
        same = [name for name in files_of(world.other) if kind_of(name) == kind]
        found = path if path in same else chance.choice(same) if same else None
        if found:
            put(place, (world.other / found).read_bytes())
    elif how in ("repeat", "reorder", "drop"):
        lines = before.splitlines(keepends=True)
        one, two = (chance.randrange(len(lines)) for _ in range(2)) if lines else (0, 0)
        if lines and how == "repeat":
            lines.insert(two, lines[one])
        elif lines and how == "reorder":
            lines[one], lines[two] = lines[two], lines[one]
        elif lines:
            del lines[one]
        put(place, b"".join(lines))
    else:
        put(place, b"")
    changed = not place.exists() or place.read_bytes() != before
    text = f"{how} {' '.join(paths)} at {position}" if changed else f"{how} {path}: nothing"
    count = {"flip": "flips", "zero": "bytes_set", "ones": "bytes_set", "truncate": "truncations"}.get(
        how, how
    )
    return Case(text, frozenset([kind] if changed else []), names, count, paths)


def damage_two(world: World, root: Path, chance: random.Random) -> Case:
    """Damage both copies of the log."""
    logs = sorted(name for name in files_of(root) if kind_of(name) == "log")
    counts = [len((root / name).read_bytes().splitlines()) for name in logs]
    how = chance.choice(["same", "different", "gone", "gone", "short", "short", "both"])
    kinds, names = frozenset(["log", "catalog"]), ("journal", " log", "catalog", "manifest")
    if how == "both":
        one = damage(world, root, chance.choice(logs), chance.choice(BYTES), chance)
        parts = [name for name in files_of(root) if kind_of(name) == "catalog"]
        two = damage(world, root, chance.choice(parts), chance.choice(BYTES), chance)
        return Case(f"{one.text}, {two.text}", kinds, names, "pairs", (), (-1,), True)
    entry = chance.randrange(1, sum(counts) + 1)
    if how == "short":
        drop_catalog(root)
        if chance.random() < 0.2:
            (root / logs[-1]).unlink()
            entry = counts[0] + 1
        else:
            data = (root / logs[-1]).read_bytes()
            size = chance.choice([chance.randrange(len(data)), data.rindex(b"\n", 0, -1) + 1])
            put(root / logs[-1], data[:size])
            entry = counts[0] + data[:size].count(b"\n") + 1
        lost = tuple(range(entry, sum(counts) + 1))
        return Case(f"no catalog, the log ends before entry {entry}", kinds, names, "pairs", (), lost, True)
    number = entry if entry <= counts[0] else entry - counts[0]
    place = root / logs[0 if entry <= counts[0] else 1]
    lines = place.read_bytes().splitlines(keepends=True)
    line = bytearray(lines[number - 1])
    line[chance.randrange(len(line) - 1)] ^= 1 << chance.randrange(7)
    lines[number - 1] = bytes(line) if chance.random() < 0.8 else b""
    put(place, b"".join(lines))
    is_last = entry == sum(counts)
    if how == "gone":
        drop_catalog(root)
        return Case(f"no catalog, entry {entry} is damaged", kinds, names, "pairs", (), (entry,), is_last)
    other = entry if how == "same" else chance.choice([n for n in range(1, sum(counts) + 1) if n != entry])
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        if chance.random() < 0.5:
            connection.execute("DELETE FROM log WHERE seq = ?", [other])
        else:
            connection.execute("UPDATE log SET entry = ? WHERE seq = ?", [zlib.compress(b"{}\n"), other])
        connection.commit()
    text = f"entry {entry} is damaged in the log, {other} in the catalog"
    if how != "same":
        return Case(text, kinds, names, "pairs", ())
    # The last entry, when it can be read nowhere, is like one that was never acknowledged.
    return Case(text, kinds, names, "pairs", (), (entry,), entry == sum(counts))


def drop_catalog(root: Path) -> None:
    for path in root.glob("catalog.sqlite*"):
        path.unlink()


# -- checking ------------------------------------------------------------------------------------------------


class Told(logging.Handler):
    """Keeps what the program tells by itself."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    told, logger = Told(), logging.getLogger("registry")
    logger.addHandler(told)
    try:
        yield told.messages
    finally:
        logger.removeHandler(told)


def check(world: World, folder: Path, seed: int) -> Case:
    """One case: damage, ask, verify, rebuild, change."""
    chance = random.Random(seed)
    root = fresh(world.roots[chance.choice([*world.roots])], folder / "r")
    case = (damage_two if chance.random() < 0.25 else damage_one)(world, root, chance)
    run_case(world, root, case, chance)
    return case


def run_case(world: World, root: Path, case: Case, chance: random.Random, *, thorough: float = 0.3) -> None:
    """Ask and verify, in either order; sometimes use the command line, and change the registry.

    Args:
        thorough: how often a damaged byte is followed by changes; other damage always is.
    """
    try:
        with listening() as told:
            verifies_first = chance.random() < 0.5
            reports = verified(root) if verifies_first else []
            found = answers(root)
            reports = reports if verifies_first else verified(root)
        # What was noticed and healed while it was read is as it should be when verify looks.
        check_answers(world, case, found, reports or told)
        if verifies_first and matters(world, case):
            assert reports or told, "verify missed it"
        if chance.random() < 0.1:
            check_commands(root, chance)
        if case.count not in ("flips", "bytes_set") or chance.random() < thorough:
            check_changes(world, root, case)
    except BaseException as error:
        error.add_note(f"{case}")
        raise


def matters(world: World, case: Case) -> bool:
    """Whether every changed byte is one that somebody may need."""
    is_live = any(
        kind_of(path) == "log" or Path(path).stem in world.users or Path(path).stem in world.live
        for path in case.paths
    )
    is_cut_off = case.kinds == {"log"} and case.count == "append"  # It was never acknowledged.
    return bool(case.kinds & {"log", "manifest", "pack"}) and is_live and not (case.is_short or is_cut_off)


def check_answers(world: World, case: Case, found: Mapping[str, Any], reports: list[str]) -> None:
    """Every answer is right, or refused with the file's name, and verify has something to say of it."""
    needed = {name for path in case.paths for name in world.users.get(Path(path).stem, ())}
    for name, answer in found.items():
        truth = world.truth[name]
        if answer == truth:
            continue
        if isinstance(answer, Refused):
            assert answer.message.isprintable(), answer
            assert case.kinds - {"other"}, (name, answer)
            resting = [pack for path in case.paths for pack in world.rests.get(Path(path).stem, ())]
            named = any(word in answer.message for word in (*case.names, *resting))
            is_told = "catalog" in case.kinds and bool(reports)
            assert named or case.is_short or is_told, (name, answer, resting)
            assert case.kinds != {"manifest"}, (name, answer)
            assert case.kinds != {"pack"} or name in needed, (name, answer)
        else:
            assert "catalog" in case.kinds, (name, answer, truth)
            if name.removeprefix("load ") in LOADED:
                version, bits = answer
                assert world.bits.get(version.id, bits) == bits, (name, answer, truth)
        assert reports or case.is_short, (name, answer, "verify says all is as saved")


def check_commands(root: Path, chance: random.Random) -> None:
    """The command line ends with a line for people, whatever it meets."""
    for words in chance.sample(COMMANDS, 3):
        status, out, err = command(*words, "--root", str(root))
        assert status in ((0, 1, 2) if words[0] == "diff" else (0, 1)), (words, err)
        assert "unexpected" not in err, (words, err)
        assert "Traceback" not in out + err, (words, err)
        assert (out + err).replace("\n", "").isprintable(), (words, out, err)


COMMANDS = (
    ("ls",),
    ("ls", "net", "--json"),
    ("show", "net", "--params"),
    ("log", "net:v4"),
    ("history", "net"),
    ("runs",),
    ("logs", RUN),
    ("status",),
    ("cache", "list"),
    ("doctor",),
    ("verify",),
    ("verify", "net:v3"),
    ("gc", "--dry-run"),
    ("compact", "--dry-run"),
    ("diff", "net:v2", "net:v4", "--values"),
)


def check_changes(world: World, root: Path, case: Case) -> None:
    """A change works, at once or after a rebuild, and nothing that was acknowledged is lost with the catalog."""
    done, _ = change(root)
    if "save" not in done or "good" not in done:
        rebuild(world, root, case)
        more, refused = change(root)
        done |= more
        # What log and catalog have both lost may come back under new numbers; docs/reliability.md says so.
        is_renumbered = {"log", "catalog"} <= case.kinds and "has no version" in refused.get("good", "")
        assert {"save", "good"} - done.keys() <= ({"good"} if is_renumbered else set()), refused
    if "log" in case.kinds:  # Of which the loss of the catalog would be the second damage.
        rebuild(world, root, case)
    drop_catalog(root)
    registry = Registry(root, create=False)
    try:
        if case.lost:
            registry.rebuild(adopt=True)
        for name, is_there in done.items():
            assert is_there(registry), f"{name} is lost"
        assert registry.catalog.ledger().voids == []
        versions = {version.id: version.name for version in find_versions(registry.catalog, "1 = 1")}
        broken = {name for path in case.paths for name in world.users.get(Path(path).stem, ())}
        for name in LOADED[:-1]:
            version, bits = world.truth[f"load {name}"]
            if version.id not in versions:
                assert case.lost, f"{name} is lost"
                continue
            if case.lost == ():
                assert versions[version.id] == name
            try:
                assert bits_of(registry[versions[version.id]].load()) == bits
            except RegistryError:
                assert f"load {name}" in broken or case.lost, name
        if not case.kinds & {"pack"} and not case.lost:
            assert [problem.message for problem in registry.verify().problems] == []
            assert broken_rules(registry) == []
    finally:
        registry.catalog.close()


def rebuild(world: World, root: Path, case: Case) -> None:
    """What a person does where a change is refused."""
    registry = None
    try:
        registry = Registry(root, create=False)
        if registry.rebuild().damaged:
            registry.rebuild(adopt=True)
    except RegistryError as error:
        undo(world, root, case, error)
    finally:
        if registry is not None:
            registry.catalog.close()


def undo(world: World, root: Path, case: Case, error: RegistryError) -> None:
    """What a person does about what the program cannot decide."""
    assert any(word in str(error) for word in case.names), error
    for path in case.paths:
        kind = kind_of(path)
        assert kind in ("log", "catalog", "settings"), (case, error)
        if kind == "catalog":
            drop_catalog(root)
        else:
            put(root / path, (world.roots["golden"] / path).read_bytes())


def change(root: Path) -> tuple[dict[str, Callable[[Registry], bool]], dict[str, str]]:
    """Change a registry in several ways.

    Returns:
        For each change that was acknowledged a question whether it is there, and why others were refused.
    """
    done: dict[str, Callable[[Registry], bool]] = {}
    refused: dict[str, str] = {}

    def acknowledged(name: str, step: Callable[[Registry], Callable[[Registry], bool]]) -> None:
        try:
            registry = Registry(root, create=False)
            try:
                done[name] = step(registry)
            finally:
                registry.catalog.close()
        except RegistryError as error:
            refused[name] = str(error)

    def save(registry: Registry) -> Callable[[Registry], bool]:
        number = 20 + len(done)
        saved = registry.save("net", tree(number, 0), epoch=9)
        return lambda later: (
            later[saved.name].id == saved.id and bits_of(later[saved.id].load()) == bits_of(tree(number, 0))
        )

    def alias(registry: Registry) -> Callable[[Registry], bool]:
        pointed = registry.set_alias("net:v4", "good").id
        return lambda later: later["net@good"].id == pointed

    def tag(registry: Registry) -> Callable[[Registry], bool]:
        tagged = registry.set_tag("net:v3", "later").id
        return lambda later: "later" in later.resolve(tagged).tags

    def note(registry: Registry) -> Callable[[Registry], bool]:
        noted = registry.add_note("net:v2", "once more").id
        return lambda later: "once more" in [text for _, text in later.resolve(noted).notes]

    def remove(registry: Registry) -> Callable[[Registry], bool]:
        (gone,) = registry.remove(["tiny:v2"], force=True)
        return lambda later: gone.id not in {one.id for one in find_versions(later.catalog, "1 = 1")}

    for name, step in {"good": alias, "tag": tag, "note": note, "save": save, "remove": remove}.items():
        acknowledged(name, step)
    return done, refused


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.damages
def test_damage_gives_the_right_bits_or_an_error_that_names_the_file(world: World, tmp_path: Path) -> None:
    for seed in soak.seeds(STEM, BUDGET):
        with soak.replayable(STEM, seed):
            case = check(world, tmp_path, seed)
        soak.count(STEM, cases=1, **{case.count: 1})


@pytest.mark.damages
@pytest.mark.skipif("SOAK_SECONDS" not in os.environ, reason="takes hours; make soak runs a part of it")
def test_every_byte_in_turn(world: World, tmp_path: Path) -> None:
    """Each byte of each file once, in an order of its own in each run, until the time is up."""
    places = [
        (name, path, position)
        for name, root in world.roots.items()
        for path, size in files_of(root).items()
        for position in range(size)
    ]
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 40)))
    chance = random.Random(seed)
    chance.shuffle(places)
    end, done = time.monotonic() + soak.seconds(BUDGET), 0
    for name, path, position in places:
        root = fresh(world.roots[name], tmp_path / "r")
        case = damage(world, root, path, chance.choice(BYTES), chance, position)
        try:
            run_case(world, root, case, chance, thorough=0.05)
        except BaseException as error:
            error.add_note(f"SOAK_SEED={seed} replays it, as case {done}")
            raise
        done += 1
        if time.monotonic() > end:
            break
    soak.count(STEM, in_turn=done, bytes=len(places))


@pytest.mark.slow
def test_an_entry_that_both_copies_have_lost_takes_nothing_else_along(world: World, tmp_path: Path) -> None:
    """What is removed stays removed, and no alias, tag or note falls back to what it was before."""
    count = world.states[-1].seq
    truth = world.states[-1]
    gone = {found for state in world.states for found in state.versions.values()} - {*truth.versions.values()}
    for lost in range(1, count + 1):
        root = fresh(world.roots["golden"], tmp_path / "r")
        drop_catalog(root)
        lose(root, lost)
        before = max(
            (state for state in world.states if state.seq < lost), key=lambda one: one.seq, default=NOTHING
        )
        after = min((state for state in world.states if state.seq >= lost), key=lambda one: one.seq)
        registry = Registry(root, create=False)
        rebuilt = registry.rebuild(adopt=True)
        found = state_of(registry)
        names = {manifest_id: name for name, manifest_id in found.versions.items()}
        for name, manifest_id in truth.versions.items():
            assert manifest_id in names, (lost, name)
            if names[manifest_id] != name:
                assert names[manifest_id] in rebuilt.adopted, (lost, name)
        lost_removals = {*before.versions.values()} - {*after.versions.values()}
        assert gone & names.keys() <= lost_removals, lost
        for kind in ("aliases", "tags", "notes"):
            odd = getattr(found, kind) ^ getattr(truth, kind)
            lost_names = getattr(before, kind) ^ getattr(after, kind)
            odd = {
                one
                for one in odd
                if not {*one} & (lost_removals | {*after.versions.values()} - {*before.versions.values()})
            }
            assert odd <= lost_names, (lost, kind, odd)
        collect(registry, grace=0)  # Which finds again what a lost entry had doomed.
        assert registry.rebuild().damaged == () or lost_removals, lost
        registry.catalog.close()
        soak.count(STEM, lost_entries=1)


def lose(root: Path, entry: int) -> None:
    """Damage an entry in the folder's log."""
    number = 0
    for path in sorted(root.glob("journal/*.log")):
        lines = path.read_bytes().splitlines(keepends=True)
        if number < entry <= number + len(lines):
            lines[entry - number - 1] = b"~" + lines[entry - number - 1][1:]
            put(path, b"".join(lines))
        number += len(lines)


def test_a_rebuild_that_finds_nothing_to_adopt_writes_no_entry(world: World, tmp_path: Path) -> None:
    """As where a save was killed before its pack had its name: such an entry would be the damage."""
    root = fresh(world.roots["golden"], tmp_path / "r")
    registry = Registry(root, create=False)
    lacking = registry.store.manifest(registry["tiny"].id)
    tensors = tuple(one._replace(digest="ab" * 32) for one in lacking.tensors)
    stray = dataclasses.replace(lacking, tensors=tensors)
    manifest_id, _ = registry.store.write_manifest(stray)
    before = files_of(root / "journal")
    rebuilt = registry.rebuild(adopt=True)
    assert (rebuilt.adopted, rebuilt.unnamed) == ((), (manifest_id,))
    assert files_of(root / "journal") == before
    registry.catalog.close()
    assert verified(root) == []


@pytest.mark.parametrize("has_catalog", [True, False])
def test_old_settings_never_cost_the_log(world: World, tmp_path: Path, has_catalog: bool) -> None:
    """As where a backup of the settings alone was put back, from before the registry got its present format."""
    root = fresh(world.roots["golden"], tmp_path / "r")
    if not has_catalog:
        drop_catalog(root)
    settings = (root / "registry.toml").read_bytes()
    put(root / "registry.toml", b'format = 1\ncreated_by = "torch-registry 0.1.0"\n')
    before = {path: path.read_bytes() for path in root.glob("journal/*.log")}
    assert all(isinstance(answer, Refused) for answer in answers(root).values())
    assert any("registry.toml: says format 1" in told for told in verified(root))
    assert change(root)[0] == {}
    assert {path: path.read_bytes() for path in root.glob("journal/*.log")} == before
    put(root / "registry.toml", settings)
    assert answers(root) == world.truth
