"""A machine that does to a registry whatever people do, in any order, and kills those who do it.

It draws operations and runs each of them here, by a second registry object on the same folder, on the command
line, in a child process, or in a child that is killed at one of its durable steps. Behind each step the rules of the log
hold, and what can be seen is what `expected.py` says: nothing half, nothing that was removed, no number twice.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from expected import (
    Expected,
    Name,
    Saved,
    check_names,
    check_tree,
    differences,
    file_of,
    learn,
    point_best,
    training,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support import Stepwise, broken_rules, collect, dump, files, fork, kill_me, wait
from trees import MODELS, Tree, artifact, is_same, tree_of
from unsynced import Unsynced

from registry import Registry
from registry.cache.keys import Key
from registry.cli.app import app
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.log.metrics import Monitor
from registry.store import durable
from registry.store.digest import digest
from registry.store.errors import Conflict, Invalid, NotFound, RegistryError
from registry.upkeep.garbage import GRACE
from registry.upkeep.repacking import tidy

NAMES = ["net", "NET", "0", "deadbeef", "latest", "v1", "x.y_z-9", "m" * 128]
ALIASES = ["production", "v1", "0", "cafe00", "A" * 128]
TAGS = ["paper", "Paper", "latest", "t" * 128]
BAD_NAMES = ["", "n" * 129, ".hidden", "a/b", "a:b", "a@b", "a b", "é", "a\n", "-x"]
NUMBERS = [0.0, 0.5, 0.25, -1.5, 1e308, math.inf, -math.inf, math.nan]
MONITORS = [Monitor("accuracy", False), Monitor("loss", True), Monitor("accuracy", True)]
KEYS = [digest(b"%d" % i) for i in range(4)]
TEXTS = ["", "a note", "two\nlines", "\u00e9\U0001f642 'quoted' \"twice\"", "x" * 5_000]


# -- how an operation is run ---------------------------------------------------------------------------------


MOMENTS = ["before", "half", "after"]
"""Of a durable step; not all of them can be done by half."""


class How(NamedTuple):
    """Who runs an operation: `here`, `there`, on the command line (`typed`), in a `child`, or in one that is `killed`."""

    who: str
    step: int
    moment: str


HOW = st.builds(
    How,
    st.sampled_from(["here", "there", "here", "typed", "there", "child", "killed", "killed", "killed"]),
    st.integers(0, 3) | st.integers(0, 30),
    st.sampled_from(MOMENTS),
)


class Operation(NamedTuple):
    """Something to do to a registry.

    Attributes:
        run: does it.
        stages: what may be seen of it, in order: the first is how things stand, the last how they stand when it is done.
        error: what it is refused with; nothing changes then.
        words: the same on the command line, where there is a command.
    """

    run: Callable[[Registry], object]
    stages: Sequence[Expected]
    error: type[RegistryError] | None = None
    words: Sequence[str] | None = None


class Deadly(Stepwise):
    """A disk that nobody waits for, with a step at which the process is killed."""

    def sync(self, fd: int, path: Path) -> None:
        self._step(path, lambda: None)

    def sync_folder(self, path: Path, folder: int) -> None:
        self._step(path, lambda: None)


def run_in_child(run: Callable[[], object], how: How) -> int:
    """Run something in a child, which is killed at a step if that is how; its exit status."""

    def at(count: int, moment: str, path: Path) -> None:
        if (count, MOMENTS.index(moment)) >= (how.step, MOMENTS.index(how.moment)):
            kill_me()

    def child() -> None:
        if how.who == "killed":
            durable.disk = Deadly(at)
        run()

    return wait(fork(child))


# -- the machine ---------------------------------------------------------------------------------------------


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """What may be recorded with a version."""
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["metrics"] = {"accuracy": draw(st.sampled_from(NUMBERS)), "m" * 128: 1.0}
    if draw(st.booleans()):
        found["loss"] = draw(st.sampled_from(NUMBERS))
    if draw(st.booleans()):
        found |= {"epoch": draw(st.sampled_from([0, 7, 2**63 - 1])), "step": 3}
        found |= {"config": {"lr": 1e300, "nan": math.nan}, "meta": {"by": ["hand", None]}}
    return found


MODEL = st.sampled_from(NAMES[:2]) | st.sampled_from(NAMES)
KIND = st.sampled_from(list(MODELS))
CONTENT = st.integers(0, 7)
WHICH = st.integers(0, 99)
BY = st.sampled_from([None, *MONITORS])


class Machine(RuleBasedStateMachine):
    """A registry in a folder, two objects that have it open all the time, and what it should hold."""

    machines = steps = kills = interrupted = 0
    """How much was tried: `kills` counts the children that were killed, `interrupted` those that left a part of several."""

    def __init__(self) -> None:
        super().__init__()
        Machine.machines += 1
        self._plain, durable.disk = durable.disk, Unsynced()
        self.folder = Path(tempfile.mkdtemp(prefix="registry-machine-"))
        self.place = self.made()
        self.here, self.there = self.opened(), self.opened(there=True)
        self.expected = Expected()
        self.turn = 0
        self.has_failed = False

    def made(self) -> str:
        """Make the registry, and return its place."""
        return str(Registry(self.folder / "r").root)

    def opened(self, *, there: bool = False) -> Registry:
        """The registry, opened once more.

        Args:
            there: as the second object has it open.
        """
        return Registry(self.place, create=False)

    @property
    def root(self) -> Path:
        """The folder of the first object."""
        return self.here.root

    def root_of(self, how: How) -> Path:
        """The folder of the registry that runs an operation for which there is a command."""
        return self.root

    # -- running an operation --------------------------------------------------------------------------------

    def perform(self, operation: Operation, how: How) -> None:
        """Run an operation, and compare what is there with what should be there."""
        Machine.steps += 1
        self.turn += 1
        try:
            stages = self._run(operation, how)
            matching = [stage for stage in stages if not differences(stage, self.there)]
            if not matching:
                raise AssertionError("\n".join(differences(stages[-1], self.there)))
            if any(matching[-1] is stage for stage in operation.stages[1:-1]):
                Machine.interrupted += 1
            self.expected = matching[-1].copy()
            self.check(deep=self.turn % 10 == 0)
        except BaseException:
            self.has_failed = True
            raise

    def _run(self, operation: Operation, how: How) -> Sequence[Expected]:
        """Run an operation; what may be seen then."""
        run, error, words = operation.run, operation.error, operation.words
        last = operation.stages[-1:] if error is None else operation.stages[:1]
        registry = self.there if how.who == "there" or how.step % 2 else self.here

        def attempt() -> None:
            if error is None:
                run(registry)
                return
            with pytest.raises(error):
                run(registry)

        if how.who in ("child", "killed"):
            status = run_in_child(attempt, how)
            if status == -signal.SIGKILL and how.who == "killed":
                Machine.kills += 1
                self._reopen_here()  # Whoever opens it next finishes what the log has.
                return operation.stages
            assert status == 0
        elif how.who == "typed" and words is not None:
            done = CliRunner().invoke(app, ["--root", self.place, *words])
            assert done.exit_code == (0 if error is None else 1), done.output
        else:
            attempt()
        return last

    def check(self, *, deep: bool) -> None:
        """Assert that both objects show what is expected, and that no rule is broken."""
        for registry in (self.there, self.here):
            assert differences(self.expected, registry) == []
        learn(self.expected, self.here)
        registry = self.here if self.turn % 2 else self.there
        check_names(self.expected, registry, MONITORS)
        for name, saved in self.expected.versions.items():
            if deep or not saved.is_read:
                check_tree(saved, registry, name)
        for key, content in self.expected.artifacts.items():
            assert is_same(
                artifact(content), registry.artifacts.load(registry.artifacts[key].id, verify=True)
            )
        assert broken_rules(registry) == []

    # -- choosing --------------------------------------------------------------------------------------------

    def name(self, which: int) -> Name | None:
        """One of the versions, if there are any."""
        names = sorted(self.expected.versions)
        return names[which % len(names)] if names else None

    def reference(self, name: Name | None, which: int) -> str:
        """One of the ways to name a version; one that names nothing if there is none."""
        if name is None:
            return "nothing:v1"
        model, number = name
        saved = self.expected.versions[name]
        ways = [
            f"{model}:v{number}",
            str(saved.version_id),
            *(f"{model}@{one}" for one in sorted(saved.aliases)),
        ]
        if number == max(self.expected.numbers(model)):
            ways += [model, f"{model}@latest"]
        return ways[which % len(ways)]

    def change(
        self,
        which: int,
        how: How,
        run: Callable[[Registry, str], object],
        change: Callable[[Expected, Name], object],
        words: Callable[[str], Sequence[str]] | None = None,
        error: type[RegistryError] | None = None,
    ) -> None:
        """Perform a change of one version, which is refused where there is none."""
        name = self.name(which)
        reference = self.reference(name, how.step)
        after = self.expected.copy()
        if name is None:
            error = NotFound
        elif error is None:
            change(after, name)
        typed = words(reference) if words else None
        self.perform(Operation(lambda r: run(r, reference), [self.expected, after], error, typed), how)

    # -- saving ----------------------------------------------------------------------------------------------

    @initialize(count=st.integers(0, 6))
    def begin(self, count: int) -> None:
        """Save some versions, so that there is something to work on."""
        for k in range(count):
            self.save("net", "near", k, True, {}, None, How("here", 0, "before"))

    @rule(model=MODEL, kind=KIND, k=CONTENT, optimizer=st.booleans(), about=fields(), by=BY, how=HOW)
    def save(
        self,
        model: str,
        kind: str,
        k: int,
        optimizer: bool,
        about: dict[str, Any],
        by: Monitor | None,
        how: How,
    ) -> None:
        tree = tree_of(kind, k, optimizer=optimizer)
        after = self.expected.copy()
        after.publish(model, Saved(tree, **about))
        point_best(after, model, by)
        run = lambda registry: registry.save(model, tree, best_by=by, **about)  # noqa: E731
        self.perform(Operation(run, [self.expected, after]), how)

    @rule(
        model=MODEL,
        kind=st.sampled_from(["near", "near halves"]),
        first=CONTENT,
        optimizer=st.booleans(),
        how=HOW,
    )
    def save_a_series(self, model: str, kind: str, first: int, optimizer: bool, how: How) -> None:
        trees = [tree_of(kind, k, optimizer=optimizer) for k in range(first, first + 4)]
        stages = [self.expected]
        for tree in trees:
            stages.append(stages[-1].copy())
            stages[-1].publish(model, Saved(tree))
        self.perform(Operation(lambda r: [r.save(model, tree) for tree in trees], stages), how)

    @rule(which=WHICH, model=MODEL, how=HOW)
    def save_what_was_loaded(self, which: int, model: str, how: How) -> None:
        self.change(
            which,
            how,
            lambda registry, reference: registry.save(model, registry[reference].load()),
            lambda after, name: after.publish(model, Saved(after.versions[name].tree)),
        )

    @rule(
        model=st.sampled_from(NAMES[:3]),
        k=CONTENT,
        values=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4),
        by=BY,
        keep=st.tuples(*[st.none() | st.integers(1, 2)] * 3),
        resume=st.none() | WHICH,
        compact=st.booleans(),
        how=HOW,
    )
    def train(
        self,
        model: str,
        k: int,
        values: list[float],
        by: Monitor | None,
        keep: tuple[int | None, int | None, int | None],
        resume: int | None,
        compact: bool,
        how: How,
    ) -> None:
        last, best, optimizer = keep
        rules = {
            "monitor": by.metric if by else None,
            "mode": ("min" if by.smallest else "max") if by else None,
            "keep_last": last,
            "keep_best": best if by else None,
            "keep_optimizer": optimizer,
        }
        resumed = self.name(resume) if resume is not None else None
        name = None if resumed is None else f"{resumed[0]}:v{resumed[1]}"
        trees = [tree_of("near", k + i, optimizer=True) for i in range(len(values))]

        def run(registry: Registry) -> None:
            with registry.run(model, resume=name, compact=compact, **rules) as run:
                for tree, value in zip(trees, values, strict=True):
                    run.save(**tree, loss=value, metrics={"accuracy": value})

        stages = list(training(self.expected, model, trees, values, by, rules, resumed))
        self.perform(Operation(run, stages), how)

    # -- names -----------------------------------------------------------------------------------------------

    @rule(which=WHICH, alias=st.sampled_from(ALIASES), how=HOW)
    def set_alias(self, which: int, alias: str, how: How) -> None:
        self.change(
            which,
            how,
            lambda registry, reference: registry.set_alias(reference, alias),
            lambda after, name: after.point(name, alias),
            lambda reference: ["alias", reference, alias],
        )

    @rule(model=MODEL, alias=st.sampled_from(ALIASES), how=HOW)
    def remove_alias(self, model: str, alias: str, how: How) -> None:
        after = self.expected.copy()
        error = None if after.pointed(model, alias) else NotFound
        after.unpoint(model, alias)
        words = ["alias", "--remove", f"{model}@{alias}"]
        run = lambda registry: registry.remove_alias(model, alias)  # noqa: E731
        self.perform(Operation(run, [self.expected, after], error, words), how)

    @rule(which=WHICH, tag=st.sampled_from(TAGS), how=HOW)
    def set_tag(self, which: int, tag: str, how: How) -> None:
        def change(after: Expected, name: Name) -> None:
            after.versions[name].tags |= {tag}

        self.change(
            which, how, lambda r, reference: r.set_tag(reference, tag), change, lambda r: ["tag", r, tag]
        )

    @rule(which=WHICH, tag=st.sampled_from(TAGS), how=HOW)
    def remove_tag(self, which: int, tag: str, how: How) -> None:
        def change(after: Expected, name: Name) -> None:
            after.versions[name].tags -= {tag}

        name = self.name(which)
        has = name is not None and tag in self.expected.versions[name].tags
        self.change(
            which,
            how,
            lambda registry, reference: registry.remove_tag(reference, tag),
            change,
            lambda reference: ["tag", "--remove", reference, tag],
            None if has else NotFound,
        )

    @rule(which=WHICH, text=st.sampled_from(TEXTS), how=HOW)
    def add_note(self, which: int, text: str, how: How) -> None:
        def change(after: Expected, name: Name) -> None:
            after.versions[name].notes += (text,)

        self.change(
            which, how, lambda r, reference: r.add_note(reference, text), change, lambda r: ["note", r, text]
        )

    @rule(which=WHICH, bad=st.sampled_from(BAD_NAMES), kept=st.sampled_from(["best", "latest"]))
    def refuse_what_is_malformed(self, which: int, bad: str, kept: str) -> None:
        reference = self.reference(self.name(which), which)
        refused: list[Callable[[Registry], object]] = [
            lambda registry: registry.save(bad, {"model": {}}),
            lambda registry: registry.save("net", {bad: {}}),
            lambda registry: registry.save("net", {"model": {}}, metrics={f" {bad}": 1.0}),
            lambda registry: registry.save("net", {"model": {}}, metrics={"huge": 10**400}),
            lambda registry: registry.save("net", {"model": {}}, epoch=2**63),
            lambda registry: registry.set_alias(reference, bad),
            lambda registry: registry.set_alias(reference, kept),
            lambda registry: registry.remove_alias("net", kept),
            lambda registry: registry.set_tag(reference, bad),
            lambda registry: registry.add_note(reference, "\ud800"),
            lambda registry: registry.run(bad),
        ]
        run = refused[which % len(refused)]
        self.perform(Operation(run, [self.expected], Invalid), How("here", 0, "before"))

    # -- taking away -----------------------------------------------------------------------------------------

    @rule(which=WHICH, how=HOW)
    def thin(self, which: int, how: How) -> None:
        self.change(
            which,
            how,
            lambda registry, reference: registry.thin(reference),
            lambda after, name: after.thin(name),
        )

    @rule(chosen=st.lists(WHICH, min_size=1, max_size=3), force=st.booleans(), how=HOW)
    def remove(self, chosen: list[int], force: bool, how: How) -> None:
        names = {self.name(which) for which in chosen} - {None}
        self._remove(sorted(names), force, how)  # type: ignore[arg-type]

    @rule(model=MODEL, how=HOW)
    def remove_a_model(self, model: str, how: How) -> None:
        self._remove([(model, number) for number in self.expected.numbers(model)], True, how)

    @rule(model=MODEL, force=st.booleans(), how=HOW)
    def remove_the_latest(self, model: str, force: bool, how: How) -> None:
        self._remove([(model, number) for number in self.expected.numbers(model)[-1:]], force, how)

    def _remove(self, names: list[Name], force: bool, how: How) -> None:
        versions = self.expected.versions
        after = self.expected.copy()
        error: type[RegistryError] | None = None if names else NotFound
        if not force and any(versions[name].aliases or versions[name].tags for name in names):
            error = Conflict
        references = [self.reference(name, how.step) for name in names] or ["nothing:v1"]
        for name in names:
            after.remove(name)
        words = ["rm", *references, "--yes", *(["--force"] if force else [])]
        run = lambda registry: registry.remove(references, force=force)  # noqa: E731
        self.perform(Operation(run, [self.expected, after], error, words), how)

    # -- cached results --------------------------------------------------------------------------------------

    @rule(key=st.sampled_from(KEYS), content=st.integers(0, 5), how=HOW)
    def put_artifact(self, key: str, content: int, how: How) -> None:
        after = self.expected.copy()
        after.artifacts[key] = content
        about = Key(key, "made_here", {"n": content}, {})
        run = lambda r: r.artifacts.put(about, artifact(content), version=None, seconds=0.5)  # noqa: E731
        self.perform(Operation(run, [self.expected, after]), how)

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True), how=HOW)
    def drop_artifacts(self, keys: list[str], how: How) -> None:
        after = self.expected.copy()
        for key in keys:
            after.artifacts.pop(key, None)
        there = all(key in self.expected.artifacts for key in keys)
        words = ["cache", "rm", *keys] if there else None
        self.perform(Operation(lambda r: r.artifacts.remove(keys), [self.expected, after], None, words), how)

    @rule(how=HOW)
    def clear_artifacts(self, how: How) -> None:
        after = self.expected.copy()
        after.artifacts.clear()
        words = ["cache", "clear"]
        self.perform(Operation(lambda r: r.artifacts.clear(), [self.expected, after], None, words), how)

    @rule(content=st.integers(0, 5), here=st.booleans())
    def call_a_cached_function(self, content: int, here: bool) -> None:
        registry = self.here if here else self.there
        calls = []

        def make(n: int) -> Tree:
            calls.append(n)
            return artifact(n)

        cached = registry.cached(make)
        key = cached.key(content)
        after = self.expected.copy()
        after.artifacts[key] = content
        is_there = key in self.expected.artifacts

        def run(registry: Registry) -> None:
            assert is_same(cached(content), artifact(content))
            assert len(calls) == (0 if is_there else 1)

        self.perform(Operation(run, [self.expected, after]), How("here", 0, "before"))

    # -- keeping house ---------------------------------------------------------------------------------------

    @rule(model=st.none() | MODEL, options=st.sets(st.sampled_from(["similar", "alone"])), how=HOW)
    def compact(self, model: str | None, options: set[str], how: How) -> None:
        models = [model] if model else []
        error = None if model is None or self.expected.numbers(model) else NotFound
        run = lambda registry: registry.compact(models, **dict.fromkeys(options, True))  # noqa: E731
        words = ["compact", *models, *(f"--{option}" for option in sorted(options))]
        self.perform(Operation(run, [self.expected], error, words), how)

    @rule(model=st.none() | MODEL, how=HOW)
    def expand(self, model: str | None, how: How) -> None:
        models = [model] if model else []
        error = None if model is None or self.expected.numbers(model) else NotFound
        run = lambda registry: registry.expand(models)  # noqa: E731
        self.perform(Operation(run, [self.expected], error, ["compact", "--plain", *models]), how)

    @rule(how=HOW)
    def repack(self, how: How) -> None:
        def run(registry: Registry) -> None:
            rows = registry.catalog.query("SELECT digest FROM packs ORDER BY number")
            tidy(registry.catalog, registry.store, [pack for (pack,) in rows])

        self.perform(Operation(run, [self.expected]), how)

    @rule(how=HOW)
    def collect_at_once(self, how: How) -> None:
        words = ["gc", "--grace", "0"]
        self.perform(Operation(lambda r: collect(r, grace=0), [self.expected], None, words), how)

    @rule(later=st.sampled_from([0, 2]), how=HOW)
    def collect_with_patience(self, later: int, how: How) -> None:
        run = lambda registry: collect(registry, now=time.time() + later * GRACE)  # noqa: E731
        self.perform(Operation(run, [self.expected], None, ["gc"]), how)

    @rule()
    def collect_without_doing_it(self) -> None:
        before = self.files()
        run = lambda registry: collect(registry, grace=0, dry_run=True)  # noqa: E731
        self.perform(Operation(run, [self.expected]), How("here", 0, "before"))
        assert self.files() == before

    @rule(damage=st.sampled_from(["none", "no file", "no files", "header", "cut", "zeroed"]), how=HOW)
    def rebuild(self, damage: str, how: How) -> None:
        damage_catalog(self.root_of(how), damage)
        if damage not in ("none", "no file", "no files") and how.who == "killed":
            how = how._replace(who="child")
        words = ["rebuild"]
        self.perform(Operation(lambda r: r.rebuild(), [self.expected], None, words), how)

    @rule(how=HOW)
    def verify(self, how: How) -> None:
        def run(registry: Registry) -> None:
            found = registry.verify()
            assert [problem.message for problem in found.problems] == []
            assert found.checkpoints == len(self.expected.versions)

        self.perform(Operation(run, [self.expected], None, ["verify"]), how)

    # -- other places ----------------------------------------------------------------------------------------

    @rule(which=WHICH, model=MODEL, suffix=st.sampled_from([".safetensors", ".pt"]), how=HOW)
    def export_and_import(self, which: int, model: str, suffix: str, how: How) -> None:
        name = self.name(which)
        made = name and file_of(self.expected.versions[name], suffix)
        path = self.folder / f"file{suffix}"

        def run(registry: Registry, reference: str) -> None:
            export(registry[reference], path, force=True)
            import_checkpoint(registry, read_checkpoint_file(path), model)

        def change(after: Expected, name: Name) -> None:
            assert isinstance(made, Saved)
            after.publish(model, made)

        self.change(which, how, run, change, error=None if made is None or isinstance(made, Saved) else made)

    @rule(stays=st.booleans())
    def copy_the_folder(self, stays: bool) -> None:
        target = self.folder / f"copy{self.turn}"
        shutil.copytree(self.root, target)
        before = self.place, self.here, self.there
        self.place = str(target)
        self.here, self.there = self.opened(), self.opened(there=True)
        self.perform(Operation(lambda registry: None, [self.expected]), How("here", 0, "before"))
        old = (self.place, self.here, self.there) if stays else before
        if stays:
            self.place, self.here, self.there = before
        for registry in old[1:]:
            registry.catalog.close()
        shutil.rmtree(old[0])

    @rule(here=st.booleans(), there=st.booleans())
    def reopen(self, here: bool, there: bool) -> None:
        if here:
            self._reopen_here()
        if there:
            self.there.catalog.close()
            self.there = self.opened(there=True)
        self.perform(Operation(lambda registry: None, [self.expected]), How("here", 0, "before"))

    def _reopen_here(self) -> None:
        self.here.catalog.close()
        self.here = self.opened()
        self.here.catalog.connection()

    # -- the end ---------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.has_failed:
                self._end()
        finally:
            for registry in (self.here, self.there):
                registry.catalog.close()
            shutil.rmtree(self.folder)
            durable.disk = self._plain

    def _end(self) -> None:
        """Assert that all is there, needs no more than what is there, and follows from the log alone."""
        self.check(deep=True)
        assert [problem.message for problem in self.here.verify().problems] == []
        collect(self.here, grace=0, now=time.time() + 2 * GRACE)
        store = self.here.store
        packs = {pack for (pack,) in self.here.catalog.query("SELECT digest FROM packs")}
        ids = {manifest_id for (manifest_id,) in self.here.catalog.query("SELECT id FROM manifests")}
        assert (self.packs_there(), self.manifests_there(), list(store.tmp.iterdir())) == (packs, ids, [])
        before = dump(self.here)
        damage_catalog(self.root, "no files")
        found = self.there.rebuild()
        assert (found.damaged, found.unnamed, found.adopted) == ((), (), ())
        assert dump(self.here) == before
        self.check(deep=True)

    def files(self) -> dict[str, bytes]:
        """The files that only a change of the registry changes."""
        return files(self.root)

    def packs_there(self) -> set[str]:
        """All packs that are there, whether they are needed or not."""
        return set(self.here.store.pack_digests())

    def manifests_there(self) -> set[str]:
        """All manifests that are there, whether they are needed or not."""
        return set(self.here.store)


class SharedMachine(Machine):
    """A registry that two hosts share: the first object is on one of them, the second on the other."""

    def made(self) -> str:
        (self.folder / "bucket").mkdir()
        url = f"file://{self.folder}/bucket"
        self._hosts = 1
        with self._on("1"):
            Registry(url)
        return url

    def opened(self, *, there: bool = False) -> Registry:
        with self._on(f"2-{self._hosts}" if there else "1"):
            return Registry(self.place, create=False)

    def root_of(self, how: How) -> Path:
        is_there = how.who != "typed" and (how.who == "there" or how.step % 2)
        return self.there.root if is_there else self.root

    @contextlib.contextmanager
    def _on(self, host: str) -> Iterator[None]:
        # What is run on the command line runs on the first host.
        try:
            os.environ["XDG_DATA_HOME"] = str(self.folder / f"host-{host}")
            yield
        finally:
            os.environ["XDG_DATA_HOME"] = str(self.folder / "host-1")

    @rule(stays=st.booleans())
    def copy_the_folder(self, stays: bool) -> None:
        """Let a host that has seen nothing take the place of the second one."""
        self.there.catalog.close()
        if not stays:
            shutil.rmtree(self.there.root)
        self._hosts += 1
        self.there = self.opened(there=True)
        self.perform(Operation(lambda registry: None, [self.expected]), How("here", 0, "before"))

    def files(self) -> dict[str, bytes]:
        # These come when they are read.
        brought = ("packs/", "manifests/")
        return {path: data for path, data in super().files().items() if not path.startswith(brought)}

    def packs_there(self) -> set[str]:
        elsewhere = self.here.store.elsewhere
        assert elsewhere is not None
        assert set(self.here.store.pack_digests()) <= elsewhere.ages().keys()
        return set(elsewhere.ages())

    def manifests_there(self) -> set[str]:
        # The entries of the log have them all. A file comes when one is read.
        known = {manifest_id for (manifest_id,) in self.here.catalog.query("SELECT id FROM manifests")}
        return known | super().manifests_there()


def damage_catalog(root: Path, damage: str) -> None:
    """Do something to the catalog's file, from which it must be made anew."""
    path = root / "catalog.sqlite"
    size = path.stat().st_size
    if damage == "no file":
        path.unlink()
    elif damage == "no files":
        for file in root.glob("catalog.sqlite*"):
            file.unlink()
    elif damage == "cut":
        os.truncate(path, size // 2)
    elif damage in ("header", "zeroed"):
        with path.open("r+b") as file:
            file.seek(0 if damage == "header" else 4_096)
            file.write(b"\0" * (100 if damage == "header" else min(size, 8 * 4_096)))
