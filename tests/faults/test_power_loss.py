"""Power cuts: every state of the disk that a cut can leave is a whole registry, however many cuts there are in a row.

Programs that change a registry are recorded call by call, SQLite's calls among them. From each prefix of the calls
follow the states that a file system may be in after a power cut; see `power`. Whatever was acknowledged before the cut
must be there then, bit for bit, and of the operation that was interrupted either all or nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import soak
import torch
import torch.distributed.checkpoint as dcp
from power import KEPT, LOST, SECTOR, Call, Change, File, Image, Volume, parts, record, torn
from support import Tree, all_versions, broken_rules, collect, dump, may_be_an_old_log

from registry import Registry
from registry.cache.artifacts import Artifact
from registry.catalog import database
from registry.catalog.invariants import invariants
from registry.checkpoints.sharded_writer import RegistryWriter
from registry.log import entries, history, journal

STEM = "test_power_loss"
FAILED = soak.COUNTS / f"{STEM}.failed"
"""Where the last state of the disk is kept in which a test failed."""

SMALL = 3_000
"""Bytes of a segment, so that the log gets a new one every few entries."""

Facts = dict[str, str]
"""What a registry says: versions and what is in them, aliases, tags, notes, artifacts and runs, by their names."""


def state(number: int) -> Tree:
    """A training state of its own for each number; compaction finds its neighbours near."""
    near = torch.arange(1_100.0) + number * 1e-5
    return {
        "model": {"shared": torch.arange(40.0), "near": near, "own": torch.full((9,), float(number))},
        "optimizer": {
            "state": {0: torch.full((300,), -float(number % 3))},
            "param_groups": [{"lr": number}],
        },
    }


def fingerprint(tree: Any) -> str:
    """A digest of everything that a tree holds."""
    if isinstance(tree, torch.Tensor):
        data = tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tree.numel() else b""
        return hashlib.blake2b(f"{tree.dtype} {tuple(tree.shape)}".encode() + data).hexdigest()
    if isinstance(tree, Mapping):
        text = repr([(str(key), fingerprint(value)) for key, value in tree.items()])
    elif isinstance(tree, list | tuple):
        text = repr([fingerprint(value) for value in tree])
    else:
        text = repr(tree)
    return hashlib.blake2b(text.encode()).hexdigest()


def facts_of(registry: Registry) -> Facts:
    """What a registry says at this moment."""
    facts: Facts = {}
    for version in all_versions(registry):
        facts[version.name] = f"{version.epoch} {','.join(sorted(version.record['components']))}"
        facts |= {f"{version.model}@{alias}": version.name for alias in version.aliases}
        facts |= {f"tag {version.name} {tag}": "" for tag in version.tags}
        facts |= {f"note {version.name} {text}": "" for _, text in version.notes}
    facts |= {_artifact_name(one): "" for one in registry.artifacts.find()}
    facts |= {f"run {run.name}": run.state for run in registry.runs.find()}
    return facts


def _artifact_name(found: Artifact) -> str:
    return f"artifact {found.record.get('parameters')}"


Contents = dict[str, dict[str, str]]
"""Digests of the components that a version was saved with, by its name and epoch; those of artifacts, likewise."""


def contents_of(registry: Registry) -> Contents:
    """What each version and each artifact is when it is loaded."""
    found: Contents = {}
    for version in all_versions(registry):
        tree = registry[version.name].load()
        found[f"{version.name} {version.epoch}"] = {name: fingerprint(part) for name, part in tree.items()}
    for one in registry.artifacts.find():
        found[_artifact_name(one)] = {"": fingerprint(registry.artifacts.load(one.id, verify=True))}
    return found


@functools.cache
def _contents(number: int) -> dict[str, str]:
    return {name: fingerprint(part) for name, part in state(number).items()}


# -- operations ----------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What a registry holds and what its next versions are called, as far as a test has to know it."""

    facts: Facts = field(default_factory=dict)
    following: int = 1
    contents: Contents = field(default_factory=dict)
    count: int = 0

    def names(self, part: str = "") -> list[str]:
        """The versions of the model `net` that have a component, the oldest first."""
        own = [name for name in self.facts if name.startswith("net:v") and part in self.facts[name]]
        return sorted(own, key=lambda name: int(name.partition(":v")[2]))


class Step(NamedTuple):
    """One operation: what it does, and what it changes of the facts; None for what goes."""

    act: Callable[[Registry], object]
    changes: Mapping[str, str | None]


def _save(known: Known, number: int, act: Callable[[Registry], object]) -> Step:
    name = f"net:v{known.following}"
    known.following += 1
    known.contents[f"{name} {number}"] = _contents(number)
    return Step(act, {name: f"{number} model,optimizer"})


def save(known: Known) -> Step:
    known.count += 1
    number = known.count
    return _save(known, number, lambda registry: registry.save("net", state(number), epoch=number))


def save_equal(known: Known) -> Step | None:
    found = [int(fact.split()[0]) for name, fact in known.facts.items() if name.startswith("net:v")]
    if not found:
        return None
    number = found[-1]
    return _save(known, number, lambda registry: registry.save("net", state(number), epoch=number))


def save_sharded(known: Known) -> Step:
    known.count += 1
    number = known.count

    def act(registry: Registry) -> None:
        writer = RegistryWriter(registry, "net", epoch=number)
        dcp.save(state(number), storage_writer=writer, no_dist=True)

    return _save(known, number, act)


def alias(known: Known) -> Step | None:
    """Point an alias at the newest version, or away from it at the oldest."""
    names = known.names()
    if not names:
        return None
    target = names[0] if known.facts.get("net@good") == names[-1] else names[-1]
    return Step(lambda registry: registry.set_alias(target, "good"), {"net@good": target})


def unalias(known: Known) -> Step | None:
    if "net@good" not in known.facts:
        return None
    return Step(lambda registry: registry.remove_alias("net", "good"), {"net@good": None})


def tag(known: Known) -> Step | None:
    name = next((name for name in known.names() if f"tag {name} x" not in known.facts), None)
    return None if name is None else Step(lambda registry: registry.set_tag(name, "x"), {f"tag {name} x": ""})


def untag(known: Known) -> Step | None:
    name = next((name for name in known.names() if f"tag {name} x" in known.facts), None)
    return (
        None
        if name is None
        else Step(lambda registry: registry.remove_tag(name, "x"), {f"tag {name} x": None})
    )


def note(known: Known) -> Step | None:
    names = known.names()
    if not names:
        return None
    known.count += 1
    text = f"text {known.count}"
    return Step(lambda registry: registry.add_note(names[-1], text), {f"note {names[-1]} {text}": ""})


def remove(known: Known) -> Step | None:
    """Remove the oldest version with all its names."""
    names = known.names()
    if len(names) < 2:
        return None
    own = [key for key, fact in known.facts.items() if fact == names[0] or f" {names[0]} " in key]
    changes: dict[str, str | None] = dict.fromkeys([names[0], *own])
    return Step(lambda registry: registry.remove([names[0]], force=True), changes)


def thin(known: Known) -> Step | None:
    names = known.names("optimizer")
    if not names:
        return None
    rest = known.facts[names[0]].replace(",optimizer", "")
    return Step(lambda registry: registry.thin(names[0]), {names[0]: rest})


def compact(known: Known) -> Step | None:
    return Step(lambda registry: registry.compact(), {}) if known.names() else None


def compact_all(known: Known) -> Step | None:
    """What compacts the most: near tensors of other models, and first versions by themselves."""
    run = lambda registry: registry.compact(similar=True, alone=True)  # noqa: E731
    return Step(run, {}) if known.names() else None


def expand(known: Known) -> Step | None:
    return Step(lambda registry: registry.expand(), {}) if known.names() else None


def gc(known: Known) -> Step:
    return Step(lambda registry: collect(registry, grace=0), {})


def _computed(size: int) -> torch.Tensor:
    return torch.arange(float(size))


def artifact(known: Known) -> Step:
    known.count += 1
    size = 5 + known.count
    name = f"artifact { {'size': size} }"
    known.contents[name] = {"": fingerprint(_computed(size))}
    return Step(lambda registry: registry.cached(_computed, key=["size"])(size=size), {name: ""})


def drop(known: Known) -> Step | None:
    own = [name for name in known.facts if name.startswith("artifact ")]
    if not own:
        return None
    return Step(lambda registry: registry.artifacts.clear(), dict.fromkeys(own))


def begin_run(known: Known) -> Step:
    known.count += 1
    name = f"run-{known.count}"
    return Step(
        lambda registry: registry.runs.begin("net", name, {"lr": 0.1}), {f"run net/{name}": "running"}
    )


def end_run(known: Known) -> Step | None:
    name = next((name for name, fact in known.facts.items() if fact == "running"), None)
    return (
        None
        if name is None
        else Step(lambda registry: registry.runs.end(name[4:], "finished"), {name: "finished"})
    )


def rebuild(known: Known) -> Step:
    return Step(lambda registry: registry.rebuild(), {})


def lose_the_catalog(known: Known) -> Step:
    """Delete the catalog under a program that goes on."""

    def act(registry: Registry) -> None:
        for path in registry.root.glob("catalog.sqlite*"):
            path.unlink()
        registry.rebuild()

    return Step(act, {})


Maker = Callable[[Known], Step | None]
OPERATIONS: Sequence[Maker] = (
    *(
        save,
        save_equal,
        save_sharded,
        alias,
        unalias,
        tag,
        untag,
        note,
        remove,
        thin,
        compact,
        compact_all,
        expand,
        gc,
    ),
    *(artifact, drop, begin_run, end_run, rebuild, lose_the_catalog),
)
WORKLOADS: dict[str, Sequence[Maker]] = {
    "create": (save, alias),
    "save": (save, save_equal, save_sharded),
    "name": (alias, alias, tag, note, untag, unalias),
    "remove": (thin, alias, remove, gc),
    "compact": (compact, gc, thin, gc),
    "compact all, and back": (compact_all, gc, expand, gc),
    "artifact": (artifact, artifact, drop, gc),
    "run": (begin_run, save, end_run),
    "rebuild": (rebuild, lose_the_catalog, save),
    "migrate": (alias, gc),
}


# -- recordings ----------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """A program that changed a registry.

    Attributes:
        name: what it did, for messages.
        calls: that it made.
        start: the disk before them.
        facts: what the registry said before each of its operations, and after the last one.
        known: what is known of the registry after it.
        is_new: whether there was no registry before.
        before: what else it may say until the program has opened it. A process that was killed before may have
            written what it did not acknowledge, and what a cut may still take.
    """

    name: str
    calls: list[Call]
    start: Volume
    facts: list[Facts]
    known: Known
    is_new: bool = False
    before: Sequence[Facts] = ()

    def allowed(self, acknowledged: int) -> list[Facts]:
        """What the registry may say after a cut: all of the operation that goes on, or nothing of it."""
        if acknowledged < 0:
            return [self.facts[0], *self.before]
        return self.facts[acknowledged : acknowledged + 2]


@dataclass
class Plan:
    """A program that is about to change a registry.

    Attributes:
        image: what it finds on the disk.
        start: the disk; some of the image may not be safe yet.
    """

    name: str
    image: Image
    start: Volume
    known: Known
    makers: Sequence[Maker]
    is_new: bool = False
    before: Sequence[Facts] = ()


def carry_out(base: Path, plans: Sequence[Plan]) -> list[Recording]:
    """Record several programs, each with a registry of its own."""
    base.mkdir()
    recordings, steps = [], []
    for i, plan in enumerate(plans):
        plan.image.lay_out(base / str(i))
        known = copy.deepcopy(plan.known)
        recording = Recording(plan.name, [], plan.start, [dict(known.facts)], known, plan.is_new, plan.before)
        steps.append([])
        for maker in plan.makers:
            step = maker(known)
            if step is None:
                continue
            for name, fact in step.changes.items():
                if fact is None:
                    del known.facts[name]
                else:
                    known.facts[name] = fact
            steps[i].append(step.act)
            recording.facts.append(dict(known.facts))
            recording.name += f", {maker.__name__}"
        recordings.append(recording)

    def run(say: Callable[[str, str], None]) -> None:
        for i, plan in enumerate(plans):
            registry = Registry(base / str(i) / "r", create=plan.is_new)
            registry.catalog.connection()
            say(str(i), "opened")
            for act in steps[i]:
                act(registry)
                say(str(i), "done")
            registry.catalog.close()

    for i, calls in parts(record(base, run)).items():
        recordings[int(i)].calls = calls
    shutil.rmtree(base)
    return recordings


class Cut(NamedTuple):
    """A state that a power cut may leave.

    Attributes:
        position: how many calls were made before.
        acknowledged: how many operations were; -1 if not even the registry was there.
        kind: what was kept, in words.
        volume: the disk at that moment; it goes on changing.
    """

    position: int
    acknowledged: int
    kind: str
    image: Image
    volume: Volume


def walk(recording: Recording) -> Iterator[tuple[int, int, Volume]]:
    """The disk after each call of a recording, and how many operations were acknowledged."""
    volume = copy.deepcopy(recording.start)
    acknowledged = -1
    for position, call in enumerate(recording.calls, 1):
        volume.do(call)
        acknowledged += call.kind == "said"
        yield position, acknowledged, volume


FIXED = ((KEPT, KEPT), (LOST, LOST), (KEPT, LOST))


def fixed_cuts(recording: Recording) -> Iterator[Cut]:
    """After each sync, the states in which all was kept or lost that was not safe."""
    for position, acknowledged, volume in walk(recording):
        if recording.calls[position - 1].kind in ("sync", "said"):
            for names, data in FIXED:
                yield Cut(
                    position, acknowledged, f"names {names}, data {data}", volume.image(names, data), volume
                )


def drawn_cuts(recording: Recording, chance: random.Random, count: int) -> Iterator[Cut]:
    """States after some of the calls, drawn by chance; what happens rarely is drawn as often as what happens often."""
    groups: dict[str, list[int]] = {}
    for position, call in enumerate(recording.calls, 1):
        groups.setdefault(f"{call.kind} {_part(call.other or call.path)}", []).append(position)
    names = chance.choices(sorted(groups), k=count)
    chosen = sorted(chance.choice(groups[name]) for name in names)
    for position, acknowledged, volume in walk(recording):
        while chosen and chosen[0] == position:
            chosen.pop(0)
            yield Cut(position, acknowledged, "drawn", volume.cut(chance), volume)


def _part(path: str) -> str:
    """The part of a registry that a path belongs to."""
    names = path.split("/")
    return names[1] if len(names) > 1 else path


# -- the check -----------------------------------------------------------------------------------------------


class Check:
    """Opens registries that a power cut left, and sees whether they are whole.

    Args:
        base: a folder for them.
    """

    def __init__(self, base: Path) -> None:
        self._root = base / "cut" / "r"
        self._seen: dict[tuple[str, int, int], Known] = {}
        self._whole: set[str] = set()
        self.cuts = self.states = 0

    def __call__(self, recording: Recording, cut: Cut) -> Known:
        """Assert that a registry holds what was acknowledged, all or nothing of what was not, and that it can be used.

        Returns:
            What it holds.
        """
        self.cuts += 1
        key = (cut.image.digest(), cut.acknowledged, id(recording))
        if key not in self._seen:
            self.states += 1
            try:
                self._seen[key] = self._look(recording, cut)
            except Exception as error:
                call = recording.calls[cut.position - 1]
                cut.image.lay_out(FAILED)
                error.add_note(
                    f"after call {cut.position} of {len(recording.calls)} ({call.kind} {call.path}) of: "
                    f"{recording.name}; acknowledged: {cut.acknowledged}; {cut.kind}; it was as in {FAILED}"
                )
                raise
        return copy.deepcopy(self._seen[key])

    def _look(self, recording: Recording, cut: Cut) -> Known:
        cut.image.lay_out(self._root.parent)
        # Who opens a registry that another process has made in part, and was killed, has been promised nothing yet.
        is_there = cut.acknowledged >= (1 if recording.before else 0) or not recording.is_new
        registry = Registry(self._root, create=not is_there)
        registry.catalog.connection()
        found = facts_of(registry)
        allowed = recording.allowed(cut.acknowledged)
        assert found in allowed, [set(found.items()) ^ set(facts.items()) for facts in allowed]
        if registry.catalog.format == 2:
            assert broken_rules(registry) == []
        rows = registry.catalog.query("SELECT next_version FROM models WHERE name = 'net'")
        following = rows[0][0] if rows else 1
        known = Known(found, following, recording.known.contents, recording.known.count)
        whole = _digest(self._root)
        if whole not in self._whole:
            self._use(registry, known)
            self._whole.add(whole)
        registry.catalog.close()
        return known

    def _use(self, registry: Registry, known: Known) -> None:
        """Assert that everything loads as it was saved and that the registry can be used."""
        assert [problem.message for problem in registry.verify().problems] == []
        self._load(registry, known)
        store = registry.store
        packs = set(store.pack_digests())
        collect(registry, grace=0)
        if may_be_an_old_log(registry):
            assert set(store.pack_digests()) == packs
        else:
            assert set(store.pack_digests()) == set(_column(registry, "SELECT digest FROM packs"))
            assert set(store) == set(_column(registry, "SELECT id FROM manifests"))
        assert list(store.tmp.iterdir()) == []
        after = copy.deepcopy(known)
        step = save(after)
        step.act(registry)
        after.facts |= {name: fact for name, fact in step.changes.items() if fact is not None}
        before = dump(registry)
        registry.catalog.close()
        for path in registry.root.glob("catalog.sqlite*"):
            path.unlink()
        assert dump(registry) == before
        assert registry.rebuild().damaged == ()
        assert dump(registry) == before
        assert list(invariants(registry.catalog.query, registry.store)) == []
        assert [problem.message for problem in registry.verify().problems] == []
        self._load(registry, after)

    def _load(self, registry: Registry, known: Known) -> None:
        assert facts_of(registry) == known.facts
        for name, found in contents_of(registry).items():
            saved = known.contents[name]
            assert found == {part: saved[part] for part in found}


def _column(registry: Registry, sql: str) -> list[Any]:
    return [row[0] for row in registry.catalog.query(sql)]


def _digest(root: Path) -> str:
    """A digest of every file but the catalog, which follows from the others, and those that were being written."""
    hasher = hashlib.blake2b()
    for path in sorted(root.rglob("*")):
        passed = path.name.startswith("catalog.sqlite") or path.parent.name == "tmp"
        if path.is_file() and not passed:
            hasher.update(f"{path}\n".encode() + hashlib.blake2b(path.read_bytes()).digest())
    return hasher.hexdigest()


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A folder in memory where there is one: nothing here depends on what reaches a real disk."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="power-", dir=where) as folder:
        yield Path(folder)


class Mode(NamedTuple):
    """How SQLite keeps the catalog, how large a segment of the log is, and how large the manifests are that it carries."""

    has_wal: bool
    segment: int
    text: int = entries.MAX_TEXT


MODES = {
    "wal": Mode(has_wal=True, segment=journal.SEGMENT),
    "wal, small segments": Mode(has_wal=True, segment=SMALL),
    "rollback": Mode(has_wal=False, segment=journal.SEGMENT),
    "rollback, small segments": Mode(has_wal=False, segment=SMALL),
    "wal, large manifests": Mode(has_wal=True, segment=journal.SEGMENT, text=100),
}


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "is_local", lambda _: mode.has_wal)
        for module in (journal, history):
            patch.setattr(module, "SEGMENT", mode.segment)
        patch.setattr(entries, "MAX_TEXT", mode.text)
        yield


def golden(folder: Path) -> Known:
    """A registry with a few versions, and what is known of it."""
    known = Known()
    registry = Registry(folder / "r")
    for maker in (save, save, save, alias, tag, note):
        step = maker(known)
        assert step is not None
        step.act(registry)
        known.facts |= {name: fact for name, fact in step.changes.items() if fact is not None}
    registry.catalog.close()
    return known


def old_golden(folder: Path) -> Known:
    """A registry of format 1."""
    with tarfile.open(Path(__file__).with_name("format1.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    registry = Registry(folder / "r", create=False)
    known = Known(facts_of(registry), 6, contents_of(registry), 10)
    registry.catalog.close()
    return known


def plans(base: Path, names: Sequence[str]) -> list[Plan]:
    """The workloads of these names, each on a disk of its own."""
    made = []
    for name in names:
        folder = base / "golden"
        folder.mkdir()
        known = Known() if name == "create" else old_golden(folder) if name == "migrate" else golden(folder)
        image = Image.of(folder)
        shutil.rmtree(folder)
        made.append(Plan(name, image, Volume(image), known, WORKLOADS[name], is_new=name == "create"))
    return made


def count(check: Check) -> None:
    soak.count(STEM, states=check.states, cuts=check.cuts)


def _cases() -> Iterator[tuple[str, str]]:
    """Each workload with a write-ahead log or with a rollback journal, in turn; with both where there is time."""
    for i, name in enumerate(WORKLOADS):
        modes = ("wal", "rollback, small segments")
        for mode in modes if "SOAK_SECONDS" in os.environ or name == "save" else (modes[i % 2],):
            yield name, mode
        if name in ("save", "remove", "artifact"):
            yield name, "wal, large manifests"


@pytest.mark.parametrize(("name", "mode"), list(_cases()))
def test_every_state_that_a_power_cut_can_leave_is_whole(base: Path, name: str, mode: str) -> None:
    check = Check(base)
    with using(MODES[mode]):
        (recording,) = carry_out(base / "recorded", plans(base, [name]))
        for cut in fixed_cuts(recording):
            check(recording, cut)
    assert check.states > 20
    count(check)


def follow(check: Check, recording: Recording, chance: random.Random, cuts: int) -> Iterator[Plan]:
    """Check states after cuts, and plan to go on from one of them, and from a state in which only a process was killed."""
    chosen = chance.randrange(cuts)
    killed = chance.randrange(2 * cuts)
    for i, cut in enumerate(drawn_cuts(recording, chance, cuts)):
        known = check(recording, cut)
        makers = chance.choices(OPERATIONS, k=3)
        is_new = recording.is_new and cut.acknowledged < 0
        if i == chosen:
            yield Plan(f"{recording.name}, cut", cut.image, Volume(cut.image), known, makers, is_new)
        if i == killed:
            image = cut.volume.image(KEPT, KEPT)
            known = check(recording, cut._replace(image=image, kind="killed"))
            volume = copy.deepcopy(cut.volume)
            before = recording.allowed(cut.acknowledged)
            yield Plan(f"{recording.name}, killed", image, volume, known, makers, is_new, before)


def test_power_cuts_and_kills_in_a_row(base: Path) -> None:
    for seed in soak.seeds(STEM, 12.0):
        chance = random.Random(seed)
        check = Check(base)
        mode = chance.choice(sorted(MODES))
        with soak.replayable(STEM, seed, f"; the mode is {mode}"), using(MODES[mode]):
            made = plans(base, chance.sample(sorted(WORKLOADS), 2))
            for plan in made:
                plan.makers = [*plan.makers, *chance.choices(OPERATIONS, k=2)]
            for _ in range(3):
                recordings = carry_out(base / "recorded", made)
                made = [plan for one in recordings for plan in follow(check, one, chance, cuts=8)]
        count(check)


def test_what_a_killed_process_wrote_to_the_log_is_durable_before_others_rely_on_it(base: Path) -> None:
    check = Check(base)
    with using(MODES["rollback, small segments"]):
        made = []
        for recording in carry_out(base / "recorded", plans(base, ["name", "create"])):
            for position, acknowledged, volume in walk(recording):
                if "/journal" not in recording.calls[position - 1].path:
                    continue
                image = volume.image(KEPT, KEPT)
                known = check(recording, Cut(position, acknowledged, "killed", image, volume))
                is_new = recording.is_new and acknowledged < 0
                start = copy.deepcopy(volume)
                makers = [save] if recording.is_new else [note]
                made.append(Plan(f"killed at {position}", image, start, known, makers, is_new))
        for again in carry_out(base / "recorded", made):
            for cut in fixed_cuts(again):
                if again.calls[cut.position - 1].kind == "said" and cut.kind == f"names {LOST}, data {LOST}":
                    check(again, cut)
    assert len(made) > 15
    count(check)


def test_what_is_recorded_is_what_lies_on_the_disk(base: Path) -> None:
    folder = base / "recorded"
    for name, mode in (("create", "wal"), ("compact", "rollback")):
        with using(MODES[mode]):
            (plan,) = plans(base, [name])
        plan.image.lay_out(folder)

        def run(say: Callable[[str, str], None], plan: Plan = plan) -> None:
            registry = Registry(folder / "r", create=plan.is_new)
            for maker in plan.makers:
                step = maker(plan.known)
                assert step is not None
                step.act(registry)
                plan.known.facts |= {name: fact for name, fact in step.changes.items() if fact is not None}
            registry.catalog.close()

        with using(MODES[mode]):
            calls = record(folder, run)
        for call in calls:
            plan.start.do(call)
        assert plan.start.image(KEPT, KEPT).files == Image.of(folder).files
        assert plan.start.image(KEPT, KEPT).digest() == Image.of(folder).digest()
        kinds = {(call.kind, Path(call.path).suffix) for call in calls}
        assert {("sync", ".log"), ("write", ".sqlite"), ("sync", ".sqlite")} <= kinds
        assert (("map", ".sqlite-shm") in kinds) == (mode == "wal")
        assert (("write", ".sqlite-journal") in kinds) or mode == "wal"
        shutil.rmtree(folder)


def paths(image: Image) -> dict[str, bytes]:
    return dict(sorted(image.files.items()))


def test_the_model_of_the_disk_loses_what_was_not_synced() -> None:
    volume = Volume(Image({}, ["tmp", "packs"]))
    volume.do(Call("create", "tmp/a"))
    volume.do(Call("write", "tmp/a", data=b"1234"))
    assert paths(volume.image(LOST, LOST)) == {}
    assert paths(volume.image(KEPT, LOST)) == {"tmp/a": b""}
    volume.do(Call("rename", "tmp/a", "packs/b"))
    assert paths(volume.image(KEPT, KEPT)) == {"packs/b": b"1234"}
    volume.do(Call("sync", "packs"))
    assert paths(volume.image(LOST, LOST)) == {"packs/b": b""}
    volume.do(Call("write", "packs/b", offset=-1, data=b"5"))
    volume.do(Call("sync", "packs/b", during=1))
    assert paths(volume.image(LOST, LOST)) == {"packs/b": b"1234"}
    volume.do(Call("sync", "packs/b"))
    assert paths(volume.image(LOST, LOST)) == {"packs/b": b"12345"}
    volume.do(Call("unlink", "packs/b"))
    assert paths(volume.image(LOST, KEPT)) == {"packs/b": b"12345"}
    volume.do(Call("sync", "packs"))
    assert paths(volume.image(LOST, KEPT)) == {}


def test_names_that_are_not_safe_are_lost_in_any_order() -> None:
    volume = Volume(Image({"a/old": b"old"}, ["a", "b"]))
    for call in (
        Call("create", "a/1"),
        Call("create", "b/2"),
        Call("unlink", "a/old"),
        Call("rename", "b/2", "a/3"),
    ):
        volume.do(call)
    chance = random.Random(0)
    seen = {tuple(paths(volume.cut(chance))) for _ in range(500)}
    assert {("a/1", "a/3"), ("a/old",), ("a/3", "a/old"), ("a/old", "b/2"), ("a/1", "a/old", "b/2")} <= seen
    assert {(), ("a/1",), ("a/3", "b/2")} <= seen
    volume.do(Call("sync", "a"))
    assert {tuple(paths(volume.cut(chance))) for _ in range(100)} == {("a/1", "a/3"), ("a/1", "a/3", "b/2")}


def test_data_that_is_not_safe_is_torn_at_sectors() -> None:
    old, new = b"o" * SECTOR, b"n" * SECTOR
    file = File(old * 2, [Change(1, 0, new * 4)])
    chance = random.Random(0)
    seen = {torn(file, fate, chance) for fate in ("torn", "garbage", "zeros", "first") for _ in range(2_000)}
    assert {old * 2, new * 4, old + new, new + old, new * 2, old * 2 + bytes(2 * SECTOR)} <= seen
    assert old * 2 + b"\xa5" * SECTOR + new in seen
    assert all(len(found) >= 2 * SECTOR and found[:SECTOR] in (old, new) for found in seen)
    file.changes = []
    assert {torn(file, fate, chance) for fate in ("torn", "garbage", "zeros", "first")} == {old * 2}


def test_what_a_crash_left_of_a_line_may_hold_line_feeds(tmp_path: Path) -> None:
    root = tmp_path / "r"
    known = golden(tmp_path)
    log = root / "journal" / f"{1:016d}.log"
    whole = log.read_bytes()
    for rest in (
        b"\n",
        b"\n\n",
        b"12\n34",
        b'{"seq": 8}\n\xff\x00\n',
        bytes(700) + b"\n1\n2\t" + b"0" * 64 + b"\n",
    ):
        log.write_bytes(whole + rest)
        registry = Registry(root, create=False)
        assert facts_of(registry) == known.facts
        assert registry.verify().problems == ()
        registry.catalog.close()
        assert log.read_bytes() == whole


def test_entries_that_were_acknowledged_are_not_taken_for_what_a_crash_left(tmp_path: Path) -> None:
    golden(tmp_path)
    log = tmp_path / "r" / "journal" / f"{1:016d}.log"
    lines = log.read_bytes().splitlines(keepends=True)
    for path in log.parents[1].glob("catalog.sqlite*"):
        path.unlink()
    log.write_bytes(b"".join([*lines[:-2], b"X" + lines[-2][1:], b"X" + lines[-1][1:]]))
    registry = Registry(tmp_path / "r", create=False)
    (gap,) = registry.catalog.gaps()
    assert gap.startswith(f"entry {len(lines) - 1} of the log cannot be read")
    registry.catalog.close()
    tree = log.read_bytes()
    for _ in range(2):
        registry = Registry(tmp_path / "r", create=False)
        assert registry.catalog.gaps() == [gap]
        registry.catalog.close()
    assert log.read_bytes() == tree
    registry.rebuild(adopt=True)
    registry.save("net", state(9), epoch=9)
    assert registry.catalog.problems() == registry.catalog.gaps() == []
    registry.catalog.close()
