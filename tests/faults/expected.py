"""What a registry should hold after a series of operations: a model of it in plain dicts, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from trees import UNSEEN, Tree, exactly, is_same, tensors_in, ties

from registry import Registry
from registry.catalog.versions import Version, find_versions
from registry.log.metrics import Monitor
from registry.store.errors import NotFound, RegistryError, Unsupported

Name = tuple[str, int]
"""A model and the number of one of its versions."""


# -- the model -----------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """A version that is there.

    Attributes:
        version_id: None until it is seen for the first time.
        file: what the file that it was imported from holds at its top level; None if it was not, or from another kind.
        is_read: whether its tree was compared since it changed.
    """

    tree: Tree
    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None
    parent: str | None = None
    lineage: tuple[tuple[str, str], ...] = ()
    aliases: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    version_id: str | None = None
    file: Tree | None = None
    is_thin: bool = False
    is_read: bool = False

    def value(self, metric: str) -> float:
        """What it ranks by; NaN if it does not."""
        found = self.loss if metric == "loss" else self.metrics.get(metric)
        return math.nan if found is None else found

    def description(self) -> dict[str, Any]:
        found = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            "metrics": dict(sorted(self.metrics.items())),
            "config": self.config,
            "meta": self.meta,
            "run": self.run,
            "parent": self.parent,
            "lineage": self.lineage,
            "aliases": sorted(self.aliases),
            "tags": sorted(self.tags),
            "notes": self.notes,
            "components": sorted(self.tree),
            "is_thin": self.is_thin,
        }
        return {key: exactly(value) for key, value in found.items()}


def _description(version: Version) -> dict[str, Any]:
    record = version.record
    found = {
        "epoch": version.epoch,
        "step": version.step,
        "loss": version.loss,
        "metrics": version.metrics,
        "config": record.get("config"),
        "meta": record.get("meta", {}),
        "run": record.get("run"),
        "parent": record.get("parent"),
        "lineage": tuple((edge["kind"], edge["parent"]) for edge in record.get("lineage", ())),
        "aliases": list(version.aliases),
        "tags": list(version.tags),
        "notes": tuple(text for _, text in version.notes),
        "components": sorted(record["components"]),
        "is_thin": "thinned-from" in record,
    }
    return {key: exactly(value) for key, value in found.items()}


class Began(NamedTuple):
    """A run: how it stands, and the id of the version that it went on from."""

    state: str
    resumed: str | None


@dataclass
class Expected:
    """What a registry should hold.

    Attributes:
        highest: the highest number that a version of a model has ever had.
        artifacts: number of the content, by key.
        artifact_ids: by number of the content, as far as it was ever seen.
        gone: ids that belong to no version any more.
    """

    versions: dict[Name, Saved] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)
    artifact_ids: dict[int, str] = field(default_factory=dict)
    runs: dict[str, Began] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def copy(self) -> Expected:
        versions = {name: replace(saved) for name, saved in self.versions.items()}
        parts = {**self.highest}, {**self.artifacts}, {**self.artifact_ids}, {**self.runs}, {*self.gone}
        return Expected(versions, *parts)

    def numbers(self, model: str) -> list[int]:
        return sorted(number for name, number in self.versions if name == model)

    def publish(self, model: str, saved: Saved) -> Name:
        """Add a version under the next number."""
        name = model, self.highest.get(model, 0) + 1
        self.highest[model] = name[1]
        self.versions[name] = saved
        return name

    def remove(self, name: Name) -> None:
        self._let_go(self.versions.pop(name))

    def _let_go(self, saved: Saved) -> None:
        if saved.version_id is not None:
            self.gone.add(saved.version_id)

    def point(self, name: Name, alias: str) -> None:
        """Point an alias at a version."""
        self.unpoint(name[0], alias)
        self.versions[name].aliases |= {alias}

    def unpoint(self, model: str, alias: str) -> None:
        for number in self.numbers(model):
            self.versions[model, number].aliases -= {alias}

    def pointed(self, model: str, alias: str) -> Name | None:
        found = [(model, n) for n in self.numbers(model) if alias in self.versions[model, n].aliases]
        return found[0] if found else None

    def best(self, model: str, by: Monitor) -> Name | None:
        """The version with the best value; of equal ones the earliest."""
        ranked = [(self.versions[model, n].value(by.metric), n) for n in self.numbers(model)]
        ranked = [(value if by.smallest else -value, n) for value, n in ranked if not math.isnan(value)]
        return (model, min(ranked)[1]) if ranked else None

    def has_descendants(self, name: Name) -> bool:
        own = self.versions[name].version_id
        edges = (edge for saved in self.versions.values() for edge in saved.lineage)
        return any(parent == own for _, parent in edges)

    def thin(self, name: Name) -> bool:
        """Cut a version down to its weights, if it can be; whether it was."""
        saved = self.versions[name]
        kept = {part: tree for part, tree in saved.tree.items() if part not in ("optimizer", "rng")}
        if "model" not in kept or len(kept) == len(saved.tree) or self.has_descendants(name):
            return False
        self._let_go(saved)
        self.versions[name] = replace(saved, tree=kept, version_id=None, is_thin=True, is_read=False)
        return True

    def chain(self, run: str) -> list[str]:
        """A run and those that it went on from, as far as the versions are there."""
        found: list[str] = []
        while run and run not in found:
            found.append(run)
            resumed = self.runs[run].resumed
            before = [saved.run for saved in self.versions.values() if saved.version_id == resumed]
            run = (before[0] or "") if resumed and before else ""
        return found


# -- what becomes of what ------------------------------------------------------------------------------------


def point_best(after: Expected, model: str, by: Monitor | None) -> None:
    best = after.best(model, by) if by else None
    if best:
        after.point(best, "best")


def training(
    expected: Expected,
    model: str,
    trees: Sequence[Tree],
    values: Sequence[float],
    by: Monitor | None,
    rules: dict[str, Any],
    resumed: Name | None,
) -> Iterator[Expected]:
    """The stages of a run that saves trees and keeps what its rules say."""
    yield expected
    state = expected.copy()
    numbers = [int(name.rpartition("-")[2]) for name in state.runs if name.startswith(f"{model}/")]
    run = f"{model}/run-{max(numbers, default=0) + 1}"
    origin = expected.versions[resumed] if resumed else None
    state.runs[run] = Began("running", origin.version_id if origin else None)
    yield state
    parent = f"{resumed[0]}:v{resumed[1]}" if resumed else None
    lineage = (("resumed-from", str(origin.version_id)),) if origin else ()
    for tree, value in zip(trees, values, strict=True):
        state = state.copy()
        about = {
            "loss": value,
            "metrics": {"accuracy": value},
            "run": run,
            "parent": parent,
            "lineage": lineage,
        }
        name = state.publish(model, Saved({**tree, "rng": UNSEEN}, **about))
        parent, lineage = f"{name[0]}:v{name[1]}", ()
        point_best(state, model, by)
        yield state
        for change in retention(state, model, run, by, rules):
            state = state.copy()
            change(state)
            yield state
    state = state.copy()
    state.runs[run] = state.runs[run]._replace(state="finished")
    yield state


def retention(
    state: Expected, model: str, run: str, by: Monitor | None, rules: dict[str, Any]
) -> Iterator[Callable[[Expected], object]]:
    """What a run's rules take away behind a save, commit by commit."""
    chain = state.chain(run)
    own = [(model, n) for n in state.numbers(model) if state.versions[model, n].run in chain]
    last, best, optimizer = rules["keep_last"], rules["keep_best"], rules["keep_optimizer"]
    kept = set(own[-(last or 1) :])
    if by and best:
        ranked = [(state.versions[name].value(by.metric), name) for name in own]
        ranked = sorted((v if by.smallest else -v, name) for v, name in ranked if not math.isnan(v))
        kept |= {name for _, name in ranked[:best]} or set(own)  # Where the best is not known, none may go.
    kept |= {name for name in own if state.versions[name].aliases or state.versions[name].tags}
    kept |= {name for name in own if state.has_descendants(name)}
    superfluous = [name for name in own if name not in kept] if last or best else []
    if superfluous:
        yield lambda after: [after.remove(name) for name in superfluous]
    left = [name for name in own if name not in superfluous]
    for name in left[::-1][optimizer:] if optimizer else ():
        if not state.versions[name].is_thin:
            yield lambda after, name=name: after.thin(name)


def file_of(saved: Saved, suffix: str) -> Saved | type[RegistryError]:
    """What becomes of a version that is exported and imported again, or why it cannot be."""
    edge = (("imported-from", f"file{suffix}"),)
    if suffix == ".safetensors":
        model = saved.tree["model"]
        plain = all(isinstance(value, torch.Tensor) for value in model.values())
        if not plain or any(tensor.dtype == torch.complex128 for _, tensor in tensors_in(model)):
            return Unsupported
        order = sorted(model, key=lambda name: (-model[name].itemsize, name))
        return Saved({"model": {name: model[name].clone() for name in order}}, lineage=edge)
    whole = saved.file
    if whole is None:
        about = {"epoch": saved.epoch, "step": saved.step, "loss": saved.loss, "config": saved.config}
        about["metrics"] = dict(sorted(saved.metrics.items())) or None
        order = ("epoch", "step", "loss", "metrics", "config")
        whole = saved.tree | {key: about[key] for key in order if about[key] is not None}
    parts = {key: whole[key] for key in ("model", "optimizer", "rng") if key in whole}
    numbers = {key: whole[key] for key in ("epoch", "step", "loss") if key in whole}
    extra = {
        key: value
        for key, value in whole.items()
        if key not in parts and not (key in numbers and abs(value) < 2**63)
    }
    return Saved(
        parts | ({"extra": extra} if extra else {}),
        **numbers,
        metrics=whole.get("metrics", {}),
        config=whole.get("config"),
        lineage=edge,
        file=whole,
    )


# -- the comparison ------------------------------------------------------------------------------------------


def differences(expected: Expected, registry: Registry) -> list[str]:
    """Where a registry is not what is expected, without a look at the tensors."""
    found: list[str] = []

    def compare(what: str, here: Any, there: Any) -> None:
        if here != there:
            found.append(f"{what}: expected {here}, found {there}")

    rows = {(row.model, row.version): row for row in find_versions(registry.catalog, "1 = 1")}
    compare("versions", sorted(expected.versions), sorted(rows))
    for name in expected.versions.keys() & rows.keys():
        saved, row = expected.versions[name], rows[name]
        compare(row.name, saved.description(), _description(row))
        if saved.version_id is not None:
            compare(f"id of {row.name}", saved.version_id, row.id)
        elif row.id in expected.gone:
            found.append(f"{row.name}: has the id of a version that was removed")
    numbers = dict(registry.catalog.query("SELECT name, next_version FROM models"))
    compare("next numbers", {model: number + 1 for model, number in expected.highest.items()}, numbers)
    artifacts = {artifact.key: artifact.id for artifact in registry.artifacts.find()}
    compare("artifacts", sorted(expected.artifacts), sorted(artifacts))
    for key in expected.artifacts.keys() & artifacts.keys():
        known = expected.artifact_ids.get(expected.artifacts[key])
        if known is not None:
            compare(f"artifact {key[:6]}", known, artifacts[key])
        elif artifacts[key] in expected.artifact_ids.values():
            found.append(f"artifact {key[:6]}: has the id of other content")
    runs = {info.name: info.state for info in registry.runs.find()}
    compare("runs", {name: run.state for name, run in expected.runs.items()}, runs)
    return found


def learn(expected: Expected, registry: Registry) -> None:
    """Take over the ids that nobody could foretell."""
    others = {saved.version_id for saved in expected.versions.values()}
    for (model, number), saved in expected.versions.items():
        if saved.version_id is None:
            saved.version_id = registry[f"{model}:v{number}"].id
            assert saved.version_id not in others | expected.gone
    for key, content in expected.artifacts.items():
        expected.artifact_ids.setdefault(content, registry.artifacts[key].id)
    assert len(set(expected.artifact_ids.values())) == len(expected.artifact_ids)


def check_names(expected: Expected, registry: Registry, monitors: list[Monitor]) -> None:
    """Assert that every reference names what it should."""
    for model in expected.highest:
        numbers = expected.numbers(model)
        if not numbers:
            assert _named(registry, model) is None
            continue
        assert registry[model].version == registry[f"{model}@latest"].version == numbers[-1]
        for number in numbers:
            for alias in expected.versions[model, number].aliases:
                assert registry[f"{model}@{alias}"].version == number
        for by in monitors:
            best = expected.best(model, by)
            try:
                found = registry.best(model, by.metric, smallest=by.smallest)
                assert (found.model, found.version) == best
            except NotFound:
                assert best is None
    assert registry.names() == sorted({model for model, _ in expected.versions})
    assert registry.status().versions == len(expected.versions)


def _named(registry: Registry, reference: str) -> Version | None:
    try:
        return registry.resolve(reference)
    except NotFound:
        return None


def check_tree(saved: Saved, registry: Registry, name: Name) -> None:
    """Assert that a version loads as it was saved, bit for bit."""
    loaded = registry[f"{name[0]}:v{name[1]}"].load()
    for part, tree in saved.tree.items():
        if tree is UNSEEN:
            saved.tree = {**saved.tree, part: registry[f"{name[0]}:v{name[1]}"].load(part, copy=True)[part]}
    assert set(loaded) == set(saved.tree)
    for part, tree in saved.tree.items():
        assert is_same(tree, loaded[part]), f"{name}: {part} is {loaded[part]}, expected {tree}"
    assert ties(loaded) == ties(saved.tree)
    saved.is_read = True
