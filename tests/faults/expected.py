"""What a registry should hold after a series of operations: a model of it in plain dicts, and the comparison."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from registry import Registry
from registry.catalog.lookups import Monitor
from registry.catalog.versions import Version, find_versions
from registry.store.errors import NotFound

Tree = dict[str, Any]
Name = tuple[str, int]
"""A model and the number of one of its versions."""

UNSEEN: Any = object()
"""Stands for a part of a tree that nobody can foretell, such as random state, until it is read for the first time."""


# -- trees ---------------------------------------------------------------------------------------------------


def _near(family: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that differs from the others of its family in one row, so that differences are small."""
    tensor = torch.randn(40, 64, generator=torch.Generator().manual_seed(family))
    tensor[k % 40] += 0.001 * (k + 1)
    return tensor.to(dtype)


def _odd(k: int) -> Tree:
    return {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(k),
        "half": torch.tensor([1.5, -0.0, math.inf, k]).bfloat16(),
        "small": torch.tensor([0.5, k]).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([0x7FC00001 + k, 0x7F800002], dtype=torch.int32).view(torch.float32),
        "turned": torch.arange(6.0 + k)[:6].reshape(2, 3).T,
    }


def _tied(k: int) -> Tree:
    weight = torch.full((6, 5), float(k))
    return {"in": weight, "out": weight, "equal": weight.clone(), "part": weight[2:4]}


def _values(k: int) -> Tree:
    ordered = OrderedDict([("b", (1, [2.5, None])), ("a", True)])
    complex_one = torch.tensor([1 + 2j, k], dtype=torch.complex128)
    return {
        "$odd": k,
        "c": complex_one,
        "ordered": ordered,
        "numbers": {3: -0.0, "nan": math.nan, "large": 2**62 + k},
    }


MODELS = {
    "plain": lambda k: {"shared": torch.arange(600.0), "own": torch.full((20,), float(k))},
    "near": lambda k: {"shared": torch.arange(600.0), "emb": _near(0, k, torch.float32)},
    "near halves": lambda k: {
        "emb": _near(1, k, torch.bfloat16),
        "head": _near(2, k // 2, torch.float64)[:20],
    },
    "odd": _odd,
    "tied": _tied,
    "values": _values,
}
"""Makes the component `model` of a tree from a number, by kind."""


def tree_of(kind: str, k: int, *, optimizer: bool) -> Tree:
    """A tree of some kind; trees of two numbers differ, and share what they can."""
    tree: Tree = {"model": MODELS[kind](k)}
    if optimizer:
        group = {"lr": 1e300, "betas": (0.9, 0.999), "params": [0]}
        state = {0: {"step": torch.tensor(float(k)), "exp_avg": torch.full((700,), -float(k))}}
        tree["optimizer"] = {"state": state, "param_groups": [group]}
    return tree


def tensors_in(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree, with its path."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors_in(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from tensors_in(value, f"{path}/{i}")


def ties(tree: Any) -> set[frozenset[str]]:
    """The paths that share memory, by what they share."""
    found: dict[object, set[str]] = {}
    for path, tensor in tensors_in(tree):
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            found.setdefault(place, set()).add(path)
    return {frozenset(paths) for paths in found.values() if len(paths) > 1}


def is_same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit, of the same types, and in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, float):
        return _exactly(a) == _exactly(b)
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _exactly(value: Any) -> Any:
    """A plain value in which NaN equals NaN."""
    if isinstance(value, Mapping):
        return {key: _exactly(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_exactly(one) for one in value]
    return value.hex() if isinstance(value, float) else value


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
        return {key: _exactly(value) for key, value in found.items()}


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
    return {key: _exactly(value) for key, value in found.items()}


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
