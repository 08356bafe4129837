"""What a version holds, counted from its manifest alone: the parameters of its networks, and its tensors by module."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from registry.reports.merged_names import merge_names
from registry.store.manifest import Listed

_LAST = re.compile(r"[./](?=[^./]*\Z)")
"""The separator before the last part of a tensor's path."""


class Network(NamedTuple):
    """A component that is a network, counted. A tensor that several names share counts once.

    Attributes:
        component: its name, such as `model`.
        values: elements of all its tensors.
        parameters: elements of those that are no buffers; None where it was not recorded which are buffers.
        frozen: elements of the parameters that were frozen.
        dtypes: of its tensors that are no buffers, the most frequent first.
    """

    component: str
    values: int
    parameters: int | None
    frozen: int
    dtypes: tuple[str, ...]


class Module(NamedTuple):
    """Tensors of one module, or of several that are alike and differ in a number of their names.

    Attributes:
        name: such as `model/conv.0`, or `model/layers.{0-11}.norm`.
        modules: how many it stands for.
        tensors: last part of the name, dtype and shape of each tensor of one such module.
        values: elements of the tensors of all of them.
        bytes: their bytes.
    """

    name: str
    modules: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    values: int
    bytes: int


def networks(listed: Sequence[Listed], provenance: Mapping[str, Any]) -> list[Network]:
    """The networks of a version: the components of which a run recorded the buffers, or else `model`.

    Args:
        listed: the tensors of the version's manifest.
        provenance: what was recorded when the version was saved.
    """
    buffers: Mapping[str, Collection[str]] = provenance.get("buffers", {})
    frozen: Mapping[str, Collection[str]] = provenance.get("frozen", {})
    found = [
        _counted(name, listed, buffers.get(name), frozen.get(name, ()))
        for name in (buffers if buffers else ["model"])
    ]
    return [one for one in found if one.values]


def _counted(
    component: str, listed: Sequence[Listed], buffers: Collection[str] | None, frozen: Collection[str]
) -> Network:
    """Count the tensors of a network."""
    is_buffer, is_frozen = set(buffers or ()), set(frozen)
    start = f"{component}/"
    seen: set[Any] = set()
    values = parameters = held = 0
    dtypes: dict[str, int] = {}
    for one in listed:
        if not one.path.startswith(start) or one.shards in seen:
            continue
        seen.add(one.shards)
        name = one.path.removeprefix(start)
        values += one.info.elements
        if name in is_buffer:
            continue
        parameters += one.info.elements
        dtypes[one.info.dtype] = dtypes.get(one.info.dtype, 0) + one.info.elements
        held += one.info.elements if name in is_frozen else 0
    return Network(
        component=component,
        values=values,
        parameters=None if buffers is None else parameters,
        frozen=held,
        dtypes=tuple(sorted(dtypes, key=lambda dtype: -dtypes[dtype])),
    )


def modules(listed: Iterable[Listed]) -> list[Module]:
    """Tensors by module, in the order of the manifest. Modules that differ in numbers of their names alone are one."""
    by_name: dict[str, list[Listed]] = {}
    for one in listed:
        by_name.setdefault(_LAST.split(one.path)[0], []).append(one)
    found = [
        Module(
            name=name,
            modules=1,
            tensors=tuple((_LAST.split(one.path)[-1], one.info.dtype, one.info.shape) for one in members),
            values=sum(one.info.elements for one in members),
            bytes=sum(one.info.size for one in members),
        )
        for name, members in by_name.items()
    ]
    while True:
        merged = merge_names([one.name for one in found], [(one.tensors, one.modules) for one in found])
        if len(merged) == len(found):
            return found
        found = [_together(name, [found[i] for i in places]) for name, places in merged]


def _together(name: str, alike: Sequence[Module]) -> Module:
    """Several modules as one."""
    return Module(
        name=name,
        modules=sum(one.modules for one in alike),
        tensors=alike[0].tensors,
        values=sum(one.values for one in alike),
        bytes=sum(one.bytes for one in alike),
    )
