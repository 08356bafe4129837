"""The page of a version: metrics, origin, tensors by module, settings, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from registry.catalog.ancestry import children
from registry.catalog.documents import version_document
from registry.catalog.resolving import resolve
from registry.catalog.versions import Version, by_id, find_versions
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.counting import networks
from registry.configs.documents import flatten
from registry.log.metrics import with_metrics
from registry.registry import Registry
from registry.reports.words import counted
from registry.store.errors import NotFound, RegistryError
from registry.store.text import quoted
from registry.ui.kept import owned
from registry.ui.page import Args, Moved, Page, address, address_of

MOST_TENSORS = 1_500
"""Tensors that a page lists, unless all are asked for."""


class Tensor(NamedTuple):
    """A tensor, as a page of a version shows it.

    Attributes:
        name: the last part of its path.
        is_changed: whether the version before has other content under this path; None where there is no such version.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    is_changed: bool | None

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Module(NamedTuple):
    """The tensors whose paths differ in the last part alone."""

    path: str
    tensors: Sequence[Tensor]

    @property
    def elements(self) -> int:
        """How many numbers its tensors hold."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """How many of its tensors differ from those of the version before."""
        return sum(bool(tensor.is_changed) for tensor in self.tensors)


def by_reference(registry: Registry, args: Args, reference: str) -> Moved:
    """The address of the version that a reference or the beginning of an id names."""
    return Moved(address_of(resolve(registry.catalog, reference)))


def by_alias(registry: Registry, args: Args, model: str, alias: str) -> Page:
    """The version that an alias points at, under an address that follows the alias."""
    return _page(registry, args, resolve(registry.catalog, f"{model}@{alias}"))


def version(registry: Registry, args: Args, model: str, name: str) -> Page:
    """A version: what was saved with it, and where it stands."""
    return _page(registry, args, resolve(registry.catalog, f"{model}:{name}"))


def _page(registry: Registry, args: Args, one: Version) -> Page:
    record = one.record
    before = _before(registry, one)
    modules, count, problem = _modules(registry, one, before, is_whole=bool(args.get("all")))
    older, newer = _beside(registry, one)
    document = version_document(one)
    document["parameters"] = [
        {"path": tensor.path, "dtype": tensor.dtype, "shape": list(tensor.shape), "digest": tensor.digest}
        for _, found in modules
        for tensor in (tensor for module in found for tensor in module.tensors)
    ]
    edges = [
        (edge["kind"], by_id(registry.catalog, edge["parent"]), edge["parent"])
        for edge in record.get("lineage", [])
    ]
    provenance = record.get("provenance", {})
    return Page(
        template="version.html",
        title=one.name,
        place="models",
        document=document,
        rows=document["parameters"],
        command=f"registry show {one.name} --params",
        python=f"registry[{one.name!r}].load()",
        context={
            "version": one,
            "record": record,
            "before": before,
            "older": older,
            "newer": newer,
            "deltas": _deltas(one, before),
            "components": record.get("components", {}),
            "can_compare": before is not None
            and "model" in record.get("components", {})
            and "model" in before.record.get("components", {}),
            "modules": modules,
            "tensors": count,
            "problem": problem,
            "edges": edges,
            "children": children(registry.catalog, one),
            "data": registry.artifacts.used_by(provenance),
            "own": own.size if (own := owned(registry).by_version.get(one.id)) else 0,
            "config": flatten(record.get("config") or {}),
            "meta": flatten(record.get("meta") or {}),
            "provenance": {
                **flatten({key: value for key, value in provenance.items() if key != "command"}),
                "command": provenance.get("command"),
            }
            if provenance
            else {},
            "kinds": provenance.get("kinds", {}),
            "networks": networks_of(registry, one),
        },
    )


def tensor(registry: Registry, digest: str, args: Args) -> dict[str, str]:
    """The version and the path that an address names as the place of a tensor.

    Raises:
        NotFound: if there is no such version, or it has another tensor there.
    """
    one, path = resolve(registry.catalog, args.get("of", "")), args.get("path", "")
    for known, _, _, found in Checkpoint(registry.store, one).parameters():
        if known == path and found == digest:
            return {"of": one.name, "path": path}
    raise NotFound(f"{one.name} has no tensor {quoted(path)} with this digest")


def networks_of(registry: Registry, one: Version) -> list[str]:
    """What is known of each network: its class, its parameters, and how many of these were frozen."""
    provenance = one.record.get("provenance", {})
    kinds, found = provenance.get("kinds", {}), []
    try:
        listed = registry.store.manifest(one.id).listed
    except RegistryError:
        # The page says so where it lists the tensors.
        return []
    for network in networks(listed, provenance):
        amount = counted(network.values, "value")
        if network.parameters is not None:
            frozen = f" ({network.frozen:,} frozen)" if network.frozen else ""
            amount = counted(network.parameters, "parameter") + frozen
        found.append(" · ".join([kinds.get(network.component, network.component), amount, *network.dtypes]))
    return found


def _before(registry: Registry, one: Version) -> Version | None:
    """The version that one was made from, or else the one before it."""
    for reference in (one.record.get("parent"), *(edge["parent"] for edge in one.record.get("lineage", []))):
        if not isinstance(reference, str):
            continue
        try:
            return resolve(registry.catalog, reference)
        except RegistryError:
            # It was removed, or is a file.
            continue
    found = find_versions(
        registry.catalog, "v.model = ? AND v.version < ?", [one.model, one.version], limit=1
    )
    return found[0] if found else None


def _beside(registry: Registry, one: Version) -> tuple[str | None, str | None]:
    """The addresses of the next older and the next newer version of the model."""
    found = []
    for sign, order in (("<", "DESC"), (">", "ASC")):
        rows = registry.catalog.query(
            f"SELECT version FROM versions WHERE model = ? AND version {sign} ? ORDER BY version {order} LIMIT 1",
            [one.model, one.version],
        )
        found.append(address("m", one.model, f"v{rows[0][0]}") if rows else None)
    return found[0], found[1]


def _deltas(one: Version, before: Version | None) -> dict[str, tuple[float, float | None]]:
    """Each metric, and the loss, with how it differs from that of the version before."""
    values: Mapping[str, float | None] = with_metrics({"loss": one.loss}, one.metrics)
    others: Mapping[str, float | None] = with_metrics({"loss": before.loss}, before.metrics) if before else {}
    found: dict[str, tuple[float, float | None]] = {}
    for name, value in values.items():
        if value is not None:
            other = others.get(name)
            found[name] = (value, None if other is None else value - other)
    return found


def _modules(
    registry: Registry, one: Version, before: Version | None, *, is_whole: bool
) -> tuple[list[tuple[str, list[Module]]], int, str]:
    """The modules of each component, how many tensors there are in all, and why they cannot be read."""
    try:
        found = list(Checkpoint(registry.store, one).parameters())
    except RegistryError as error:
        return [], 0, str(error)
    others: dict[str, str] = {}
    if before is not None:
        try:
            others = {path: digest for path, _, _, digest in Checkpoint(registry.store, before).parameters()}
        except RegistryError:
            others = {}
    components: dict[str, dict[str, list[Tensor]]] = {}
    for path, dtype, shape, digest in found if is_whole else found[:MOST_TENSORS]:
        component, _, inner = path.partition("/")
        cut = max(inner.rfind("."), inner.rfind("/"))
        module, name = inner[: max(cut, 0)], inner[cut + 1 :]
        is_changed = others[path] != digest if path in others else None
        tensor = Tensor(path, name, dtype, tuple(shape), digest, is_changed)
        components.setdefault(component, {}).setdefault(module, []).append(tensor)
    shown = [
        (component, [Module(path, tensors) for path, tensors in modules.items()])
        for component, modules in components.items()
    ]
    return shown, len(found), ""
