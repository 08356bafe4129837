"""A storm: processes that change one registry at once, and a ledger of what they began and what was acknowledged.

The ledger is outside the registry's folder. Each process has a file of its own in it, and writes a line before it
begins something and another one when that is acknowledged, each durably. So whoever reads the ledger knows what must
be there, what may be there, and what must be gone.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import Tree, all_versions

from registry import Registry
from registry.cache.keys import Key
from registry.catalog.versions import Version
from registry.remote.bucket import Unreachable
from registry.store.digest import digest
from registry.store.errors import Conflict, NotFound, RegistryError
from registry.upkeep.repacking import tidy

MODELS = ("net", "mine", "other")
KEEP_LAST = 2


class Content(NamedTuple):
    """Which values a state has; two that differ in `near` alone differ in few bits."""

    own: int
    near: int


_MOVED = 1e-3 * torch.randn(3_000, generator=torch.Generator().manual_seed(0))


def tree_of(content: Content) -> Tree:
    near, moved = torch.arange(3_000.0), 50 * (content.near % 50)
    near[:moved] += _MOVED[:moved]
    near[-1] = content.near
    model = {
        "shared": torch.arange(2_000.0),
        "near": near,
        "own": torch.full((50, 30), float(content.own)),
    }
    optimizer = {
        "state": {0: {"exp_avg": torch.full((8_000,), -float(content.own))}},
        "param_groups": [{"lr": 0.1, "params": [0], "own": content.own}],
    }
    return {"model": model, "optimizer": optimizer}


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


class Wrong(AssertionError):
    """A promise that was broken."""


# -- the ledger ----------------------------------------------------------------------------------------------


class Pen:
    """Writes one process's file of the ledger."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **line: Any) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")
        os.fsync(self._fd)


class Known:
    """What the ledger says so far.

    Attributes:
        begun: the models and values of all saves that were begun, by token.
        saved: tokens of the acknowledged versions, by name.
        pending: tokens of those that wait in an outbox, or did: which name they get is not known.
        twice: names that were given to two versions.
        removing: how many removals of a version were begun, and not refused.
        taken: tokens of versions whose removal was begun.
        removed: versions whose removal was acknowledged.
        thinning, thinned: likewise.
        ageing: versions that a run's rules may remove or thin, with the run.
        runs: acknowledged versions of each run, in their order.
        unruled: runs that said that their rules failed, so that they may never be applied.
        values: what an alias, a tag, a note or an artifact may be, by key; one value once that is acknowledged.
        changes: how often somebody began or ended a change of a key.
        held: versions that may have had an alias or a tag.
        resumed: versions that others may descend from, so that no rule and no thinning touches them.
        counts: acknowledged operations.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: Counter[str] = Counter()
        self._open: dict[int, dict[str, Any]] = {}
        self.begun: dict[int, tuple[str, Content]] = {}
        self.saved: dict[str, int] = {}
        self.pending: set[int] = set()
        self.twice: list[str] = []
        self.removing: Counter[str] = Counter()
        self.taken: set[int] = set()
        self.removed: set[str] = set()
        self.thinning: set[str] = set()
        self.thinned: set[str] = set()
        self.ageing: dict[str, str] = {}
        self.runs: dict[str, list[str]] = {}
        self.unruled: set[str] = set()
        self.values: dict[str, set[Any]] = {}
        self.changes: Counter[str] = Counter()
        self.held: set[str] = set()
        self.resumed: set[str] = set()
        self.counts: Counter[str] = Counter()

    def refresh(self) -> Known:
        """Read on; a process is read to its end before the one that has its place after it."""
        for path in sorted(self._folder.iterdir()):
            with path.open("rb") as file:
                file.seek(self._read[path.name])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read[path.name] += len(line)
                    self._take(json.loads(line))
        return self

    def _take(self, line: dict[str, Any]) -> None:
        if line["what"] == "begin":
            self._open[line["token"]] = line
            self._begin(line)
        elif line["what"] == "end":
            begun = self._open.pop(line["token"])
            self.counts[begun["op"]] += 1
            self._end(begun, line["name"])
        elif line["what"] == "rules failed":
            self.unruled.add(line["run"])
        else:
            begun = self._open.pop(line["token"])
            self.removing.subtract(begun.get("removes", ()))
            if "key" in begun:
                self.values[begun["key"]] = set(begun["before"])

    def _begin(self, line: dict[str, Any]) -> None:
        if "content" in line:
            self.begun[line["token"]] = line["model"], Content(*line["content"])
        self.removing.update(line.get("removes", ()))
        self.taken.update(line.get("takes", ()))
        self.thinning.update(line.get("thins", ()))
        self.ageing |= dict.fromkeys(line.get("ages", ()), line.get("run"))
        self.held.update(line.get("holds", ()))
        self.resumed.update(line.get("resumes", ()))
        if "key" in line:
            values = self.values.setdefault(line["key"], {None})
            line["before"] = [*values]
            values.add(_plain(line["value"]))
            self.changes[line["key"]] += 1

    def _end(self, begun: dict[str, Any], name: str | None) -> None:
        if "content" in begun:
            assert name is not None
            if is_pending(name):
                self.pending.add(begun["token"])
                if "run" in begun:
                    # The rules of its run may take it.
                    self.taken.add(begun["token"])
            else:
                if name in self.saved:
                    self.twice.append(name)
                self.saved[name] = begun["token"]
        if "run" in begun:
            assert name is not None
            self.runs.setdefault(begun["run"], []).append(name)
        self.removed.update(begun.get("removes", ()))
        self.thinned.update(begun.get("thins", ()))
        if "key" in begun:
            self.values[begun["key"]] = {_plain(begun["value"])}
            self.changes[begun["key"]] += 1

    def may_be_gone(self, name: str) -> bool:
        return self.removing[name] > 0 or name in self.ageing or self._may_have_been_taken(name)

    def must_be_gone(self, name: str) -> bool:
        if name in self.removed:
            return True
        names = self._ruled_with(name)
        is_old = name in names[:-KEEP_LAST] and not any(map(self.removing.get, names))
        return is_old and name not in self.held and name not in self.resumed

    def may_be_thin(self, name: str) -> bool:
        return name in self.thinning or name in self.ageing or self._may_have_been_taken(name)

    def _may_have_been_taken(self, name: str) -> bool:
        """Whether it may be one of those that waited in an outbox, and the rules of its run, or a removal, concern it."""
        return name not in self.saved and not self.pending.isdisjoint(self.taken)

    def must_be_thin(self, name: str) -> bool:
        names = self._ruled_with(name)
        is_thinned = name in self.thinned or (name in names[:-1] and not any(map(self.removing.get, names)))
        return is_thinned and name not in self.resumed

    def _ruled_with(self, name: str) -> list[str]:
        """The versions of a version's run, if its rules have been applied for certain."""
        run = self.ageing.get(name, "")
        names = self.runs.get(run, [])
        return [] if run in self.unruled or any(map(is_pending, names)) else names

    def must_be_there(self) -> set[str]:
        return {name for name in self.saved if not self.may_be_gone(name)}

    def must_be_shared(self) -> set[int]:
        """Tokens of versions that are there once all outboxes have been shared."""
        return self.pending - self.taken

    def check(self, name: str, token: int | None, loaded: Mapping[str, Any], *, was_thin: bool) -> None:
        """Compare a loaded version with what the ledger says.

        Args:
            token: of the save that made it, as the version has it.
            was_thin: whether it had to be thin when it was loaded.

        Raises:
            Wrong: if it is another.
        """
        if token not in self.begun or self.saved.get(name, token) != token:
            raise Wrong(f"{name} is of save {token}, not {self.saved.get(name)}")
        model, content = self.begun[token]
        if not name.startswith(f"{model}:v"):
            raise Wrong(f"{name} was saved as {model}")
        expected = tree_of(content)
        found = {part: tree for part, tree in loaded.items() if part != "rng"}
        if set(found) == {"model"}:
            if not self.may_be_thin(name):
                raise Wrong(f"{name} was never thinned, and has no optimizer")
        elif set(found) != set(expected):
            raise Wrong(f"{name} has the components {sorted(found)}")
        elif was_thin:
            raise Wrong(f"{name} was thinned, and is whole")
        if wrong := [part for part in found if not equal(found[part], expected[part])]:
            raise Wrong(f"{wrong} of {name} is not what was saved")


def is_pending(name: str) -> bool:
    """Whether a version was saved in an outbox."""
    return ":pending-" in name


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# -- the processes -------------------------------------------------------------------------------------------


class Held:
    """A component with a state."""

    def __init__(self, state: Tree) -> None:
        self._state = state

    def state_dict(self) -> Tree:
        return self._state

    def load_state_dict(self, state: Tree) -> None:
        self._state = state


class Warnings(logging.Handler):
    """Tells of runs that warn that their rules fail.

    Args:
        tell: is told the name of the run.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if "as the rules of the run fail" in str(record.msg):
            assert isinstance(record.args, tuple)
            self._tell(str(record.args[0]).rpartition("/")[2])


class Worker:
    """One process of a storm.

    Args:
        place: the registry: a folder, or the URL of a shared one.
        slot: its place, which another process gets once this one is killed.
        number: how many have had it before.
    """

    def __init__(self, place: str, ledger: Path, seed: int, slot: int, number: int) -> None:
        self.name = f"{slot}-{number:04d}"
        self.chance = random.Random(f"{seed} {self.name}")
        self.slot = slot
        self.registry = Registry(place, create=False)
        self.is_shared = self.registry.catalog.shared is not None
        self.own = ledger.parent / f"own-{slot}"
        self.known = Known(ledger).refresh()
        self.count = 0
        self._first_token = (slot * 10_000 + number) * 10_000
        self._pen = Pen(ledger / self.name)
        tell = lambda run: self._pen.write(what="rules failed", run=run)  # noqa: E731
        logging.getLogger("registry.runs.session").addHandler(Warnings(tell))

    def work(self, stop: Path) -> None:
        """Do one thing after the other until there is a file, or who started it is gone."""
        parent = os.getppid()
        operations = {**OPERATIONS, **(SHARED_OPERATIONS if self.is_shared else {})}
        while not stop.exists() and os.getppid() == parent:
            (operation,) = self.chance.choices([*operations], [*operations.values()])
            try:
                self.look_up()
                operation(self)
            except Unreachable:
                # What it was at may have happened or not, as with a process that is killed.
                continue
            except Exception as error:
                error.add_note(f"process {self.name}, {operation.__name__}, change {self.count}")
                raise

    def look_up(self) -> None:
        """Read the ledger on, and see at least what it has."""
        self.known.refresh()
        if self.is_shared:
            # A reader may see what this host had, while another process of it waits for the network.
            self.registry.catalog.commit(lambda view: [])

    def change(
        self,
        op: str,
        act: Callable[[int], str | None],
        *,
        refused: Callable[[RegistryError], bool] = lambda error: False,
        **about: Any,
    ) -> str | None:
        """Change something, with a line in the ledger before and behind it.

        Args:
            act: does it, given a number that no other change has; returns the name of what it saved. A save that
                returns none was not acknowledged, and may have happened.
            refused: whether an error is right as things stand, by what the ledger says then.
        """
        self.count += 1
        token = self._first_token + self.count
        self._pen.write(what="begin", token=token, op=op, **about)
        try:
            name = act(token)
        except Unreachable:
            raise
        except RegistryError as error:
            self._pen.write(what="refused", token=token)
            self.known.refresh()
            if not refused(error):
                raise
            return None
        if name is not None or "content" not in about:
            self._pen.write(what="end", token=token, name=name)
        return name

    def seen(self, op: str) -> None:
        """Note that something was read, and was right."""
        self.change(op, lambda _: None)

    def pick(self) -> str | None:
        """A version that is there."""
        found = self.pick_row()
        return found.name if found else None

    def pick_row(self) -> Version | None:
        """A version that is there, as the catalog has it."""
        found = all_versions(self.registry)
        return self.chance.choice(found) if found else None

    def content(self) -> Content:
        """New values, those of another state, or near ones."""
        fresh = self._first_token % 1_000_000 + self.count
        known = [content for _, content in self.known.begun.values()]
        kind = self.chance.random()
        if not known or kind < 0.4:
            return Content(fresh, fresh)
        other = self.chance.choice(known)
        return other if kind < 0.6 else Content(other.own, fresh)

    def without(self, name: str) -> Callable[[RegistryError], bool]:
        """Whether an error is right as somebody may have removed a version."""
        return lambda error: isinstance(error, NotFound) and self.known.may_be_gone(name)


def overtaken(worker: Worker) -> Callable[[RegistryError], bool]:
    """Whether an error is right as other hosts kept changing the registry during a save."""
    return lambda error: worker.is_shared and isinstance(error, Conflict)


def save(worker: Worker) -> None:
    model, content = worker.chance.choice(MODELS), worker.content()

    def act(token: int) -> str | None:
        try:
            return worker.registry.save(model, tree_of(content), step=token).name
        except NotFound:
            return None  # It was saved, and somebody has removed it before it could be shown.

    worker.change("save", act, refused=overtaken(worker), model=model, content=content)


def save_in_a_run(worker: Worker) -> None:
    """A run that keeps its last versions, and the optimizer of the newest alone."""
    model, name = worker.chance.choice(MODELS), f"{worker.name}-{worker.count}"
    made: list[str] = []
    with worker.registry.run(model, name=name, keep_last=KEEP_LAST, keep_optimizer=1) as run:
        for _ in range(worker.chance.randrange(1, 6)):
            content = worker.content()
            live = {part: Held(tree) for part, tree in tree_of(content).items()}

            def act(token: int, live: dict[str, Held] = live) -> str:
                saved = run.save(step=token, **live)
                assert saved is not None
                return saved.name

            saved = worker.change(
                "run", act, refused=overtaken(worker), model=model, content=content, run=name, ages=made
            )
            if saved is None:
                break
            made.append(saved)


def remove(worker: Worker) -> None:
    found = worker.pick_row()
    if found is None:
        return
    name = found.name
    force = worker.chance.random() < 0.3

    def refused(error: RegistryError) -> bool:
        if isinstance(error, Conflict):
            return not force and name in worker.known.held
        return worker.without(name)(error)

    def act(_: int) -> None:
        worker.registry.remove([name], force=force)

    worker.change("remove", act, refused=refused, removes=[name], takes=[found.step])


def thin(worker: Worker) -> None:
    name = worker.pick()
    if name is not None:

        def act(_: int) -> None:
            worker.registry.thin(name)

        worker.change("thin", act, refused=worker.without(name), thins=[name])


def set_alias(worker: Worker) -> None:
    """Point an alias that no other place changes."""
    name = worker.pick()
    if name is not None:
        model, alias = name.partition(":")[0], f"alias{worker.slot}"

        def act(_: int) -> None:
            worker.registry.set_alias(name, alias)

        worker.change(
            "alias",
            act,
            refused=worker.without(name),
            key=f"alias {model}@{alias}",
            value=name,
            holds=[name],
        )


def set_tag(worker: Worker) -> None:
    name = worker.pick()
    if name is not None:
        tag = f"tag{worker.slot}"

        def act(_: int) -> None:
            worker.registry.set_tag(name, tag)

        worker.change(
            "tag", act, refused=worker.without(name), key=f"tag {name} {tag}", value=True, holds=[name]
        )


def add_note(worker: Worker) -> None:
    name = worker.pick()
    if name is not None:
        text = f"{worker.name} {worker.count}"

        def act(_: int) -> None:
            worker.registry.add_note(name, text)

        worker.change("note", act, refused=worker.without(name), key=f"note {name} {text}", value=True)


def key_of(slot: int, number: int) -> Key:
    return Key(digest(f"{slot} {number}".encode()), "storm", {}, {})


def put_artifact(worker: Worker) -> None:
    key, content = key_of(worker.slot, worker.chance.randrange(3)), worker.content()

    def act(_: int) -> None:
        worker.registry.artifacts.put(key, tree_of(content), version=1, seconds=0.0)

    worker.change("put", act, key=f"artifact {key.digest}", value=content)


def drop_artifact(worker: Worker) -> None:
    key = key_of(worker.slot, worker.chance.randrange(3))

    def act(_: int) -> None:
        worker.registry.artifacts.remove([key.digest])

    worker.change("drop", act, key=f"artifact {key.digest}", value=None)


def load_artifact(worker: Worker) -> None:
    known = worker.known
    keys = sorted(key for key, values in known.values.items() if key.startswith("artifact "))
    if not keys:
        return
    key = worker.chance.choice(keys)
    values, changes = set(known.values[key]), known.changes[key]
    artifact_id = worker.registry.artifacts.id_for(key.removeprefix("artifact "))
    try:
        loaded = None if artifact_id is None else worker.registry.artifacts.load(artifact_id)
    except NotFound:
        known.refresh()
        if values == {None} or len(values) > 1 or known.changes[key] > changes:
            return
        raise
    known.refresh()
    if len(values) == 1 and known.changes[key] == changes:
        (expected,) = values
        if (expected is None) != (loaded is None):
            raise Wrong(f"{key} is {'there' if loaded else 'not there'}")
        if loaded is not None and not equal(loaded, tree_of(Content(*expected))):
            raise Wrong(f"{key} is not what was put")
        worker.seen("load artifact")


def load(worker: Worker) -> None:
    """Load a version that must be there, or another one."""
    there = sorted(worker.known.must_be_there())
    name = worker.chance.choice(there) if there else worker.pick()
    if name is None:
        return
    was_thin = worker.known.must_be_thin(name)
    copies = worker.chance.random() < 0.5
    for _ in range(20):
        try:
            checkpoint = worker.registry[name]
            loaded = checkpoint.load(copy=copies)
        except NotFound:
            worker.known.refresh()
            if worker.known.may_be_gone(name):
                return
            if not worker.known.may_be_thin(name):
                raise
            continue  # Thinning gives it another id, and the one that was read is gone.
        worker.known.refresh()
        worker.known.check(name, checkpoint.step, loaded, was_thin=was_thin)
        worker.seen("load")
        return
    raise Wrong(f"{name} cannot be loaded, though it was not removed")


def look(worker: Worker) -> None:
    """See that every acknowledged version is listed, and no removed one."""
    there = worker.known.must_be_there()
    gone = {name for name in worker.known.saved if worker.known.must_be_gone(name)}
    listed = {version.name for version in all_versions(worker.registry)}
    worker.known.refresh()
    missing = (there & worker.known.must_be_there()) - listed
    back = {name for name in gone & listed if worker.known.must_be_gone(name)}
    if missing or back:
        raise Wrong(f"{sorted(missing)} are not listed, {sorted(back)} are")
    worker.seen("look")


def verify(worker: Worker) -> None:
    if problems := worker.registry.verify().problems:
        raise Wrong(f"verify finds {problems[0].message}, and {len(problems) - 1} more")
    worker.seen("verify")


def compact(worker: Worker) -> None:
    def act(_: int) -> None:
        if worker.chance.random() < 0.2:
            worker.registry.expand()
        else:
            worker.registry.compact(similar=worker.chance.random() < 0.5, alone=worker.chance.random() < 0.5)

    worker.change("compact", act)


def repack(worker: Worker) -> None:
    packs = [digest for (digest,) in worker.registry.catalog.query("SELECT digest FROM packs")]

    def act(_: int) -> None:
        tidy(worker.registry.catalog, worker.registry.store, packs)

    worker.change("repack", act)


def collect(worker: Worker) -> None:
    def act(_: int) -> None:
        worker.registry.collect_garbage(grace=0)

    worker.change("gc", act)


def rebuild(worker: Worker) -> None:
    def act(_: int) -> None:
        found = worker.registry.rebuild()
        if found.damaged:
            raise Wrong(f"rebuild finds {found.damaged[0]}, and {len(found.damaged) - 1} more")

    worker.change("rebuild", act)


def lose_catalog(worker: Worker) -> None:
    """Delete the catalog under everybody, as `rm` does, and let whoever comes next make it again."""

    def act(_: int) -> None:
        parts: Sequence[Path] = sorted(worker.registry.root.glob("catalog.sqlite*"))
        for path in parts if worker.chance.random() < 0.5 else parts[:1]:
            path.unlink(missing_ok=True)
        if worker.chance.random() < 0.5:
            worker.registry.rebuild()

    worker.change("lose the catalog", act)


def resume(worker: Worker) -> None:
    """Go on from a version that any process of any host may have saved."""
    name = worker.pick()
    if name is None:
        return
    model, run = name.partition(":")[0], f"{worker.name}-{worker.count}-again"
    try:
        checkpoint = worker.registry[name]
        live = {part: Held({}) for part in checkpoint.components if part != "rng"}
        checkpoint.restore(**live, rng=False)
        loaded = {part: held.state_dict() for part, held in live.items()}
        worker.known.refresh().check(name, checkpoint.step, loaded, was_thin=False)
        with worker.registry.run(model, name=run, resume=name) as session:
            content = worker.content()
            live = {part: Held(tree) for part, tree in tree_of(content).items()}

            def act(token: int) -> str:
                saved = session.save(step=token, **live)
                assert saved is not None
                return saved.name

            worker.change(
                "resume", act, refused=overtaken(worker), model=model, content=content, resumes=[name]
            )
    except NotFound:
        worker.known.refresh()
        if not worker.known.may_be_gone(name) and not worker.known.may_be_thin(name):
            raise


def push(worker: Worker) -> None:
    """Copy a version to a folder of this process's own, and compare it there."""
    name = worker.pick()
    if name is None:
        return
    was_thin, folder = worker.known.must_be_thin(name), Registry(worker.own)
    try:
        (copied,) = worker.registry.copy_to(folder, [name])
    except NotFound:
        worker.known.refresh()
        if not worker.known.may_be_gone(name) and not worker.known.may_be_thin(name):
            raise
        return
    there = folder[copied.target]
    worker.known.refresh().check(name, there.step, there.load(), was_thin=was_thin)
    if worker.chance.random() < 0.3:
        folder.remove([copied.target], force=True)
        folder.collect_garbage(grace=0)
    worker.seen("push")


def pull(worker: Worker) -> None:
    """Save into a folder of this process's own, and copy that to the shared registry."""
    model, content, folder = worker.chance.choice(MODELS), worker.content(), Registry(worker.own)

    def act(token: int) -> str:
        name = folder.save(model, tree_of(content), step=token).name
        (copied,) = folder.copy_to(worker.registry, [name])
        return copied.target

    worker.change("pull", act, refused=overtaken(worker), model=model, content=content)


def follow(worker: Worker) -> None:
    """Put the newest version of a model into live tensors."""
    model = worker.chance.choice(MODELS)
    live = tree_of(Content(-1, -1))["model"]
    if any(version.model == model for version in all_versions(worker.registry)):
        checkpoint = next(worker.registry.follow(f"{model}@latest", into=live, every=0.1))
        assert checkpoint.step is not None
        _, content = worker.known.refresh().begun[checkpoint.step]
        if not equal(live, tree_of(content)["model"]):
            raise Wrong(f"{checkpoint.name} was put into live tensors, and is not what was saved")
        worker.seen("follow")


OPERATIONS: dict[Callable[[Worker], None], float] = {
    save: 20,
    save_in_a_run: 4,
    remove: 8,
    thin: 8,
    set_alias: 4,
    set_tag: 2,
    add_note: 4,
    put_artifact: 6,
    drop_artifact: 3,
    load_artifact: 8,
    load: 40,
    look: 10,
    verify: 4,
    compact: 4,
    repack: 3,
    collect: 10,
    rebuild: 2,
    lose_catalog: 1,
}

SHARED_OPERATIONS: dict[Callable[[Worker], None], float] = {resume: 8, push: 4, pull: 4, follow: 4}
