"""The page of a diff: what became of each module and tensor between two versions."""

from __future__ import annotations

import fnmatch
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from registry.catalog.resolving import resolve
from registry.catalog.versions import Version
from registry.registry import Registry
from registry.reports.charts import heat_of
from registry.store.errors import RegistryError
from registry.ui.asking import Asking
from registry.ui.page import Args, Page

ORDERS = ("network", "change")

NETWORKS = "registry.models"
"""The group of entry points by which packages name their networks; see `registry.live.builders`."""


def sides(registry: Registry, args: Args) -> tuple[list[str], list[Version | None]]:
    """The two sides that an address names, and the versions that these are, if they are.

    Rows that are selected in a table are named as `v`; the older one is the first side.
    """
    picked = args.get("v", "").split()
    names = (
        sorted(picked[:2], key=_number)
        if len(picked) > 1
        else [args.get("a", "").strip(), args.get("b", "").strip()]
    )
    found: list[Version | None] = []
    for name in names:
        try:
            found.append(resolve(registry.catalog, name))
        except RegistryError:
            # No address leads to a file.
            if name and not is_network(name):
                raise
            found.append(None)
    return names, found


def _number(name: str) -> int:
    number = name.rpartition(":v")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else 0


def is_network(name: str) -> bool:
    """Whether a name is that of a network of torchvision or of an installed package."""
    family, colon, _ = name.partition(":")
    return (bool(colon) and family == "torchvision") or name in {
        one.name for one in entry_points(group=NETWORKS)
    }


def diff(asking: Asking, names: Sequence[str], versions: Sequence[Version | None], args: Args) -> Page:
    """What differs between two versions, or between a version and a network.

    Raises:
        RegistryError: if a side cannot be read.
    """
    if not all(names):
        return Page(
            template="diff.html",
            title="Diff",
            place="diff",
            document={},
            context={"names": names, "report": None, "versions": versions},
        )
    key = " ".join(version.id if version else name for version, name in zip(versions, names, strict=True))
    shown = [version.name if version else name for version, name in zip(versions, names, strict=True)]
    answer = asking.ask(key, a=shown[0], b=shown[1])
    report = answer["report"]
    modules = chosen(answer["modules"], args)
    command = f"registry diff {shlex.quote(shown[0])} {shlex.quote(shown[1])} --values"
    tops = [module["relative"] for module in answer["modules"] if is_number(module["relative"])]
    return Page(
        template="diff.html",
        title=f"{shown[0]} → {shown[1]}",
        place="diff",
        document=report,
        rows=[{"module": module["path"], **tensor} for module in modules for tensor in module["tensors"]],
        command=command,
        python=f"registry.diff({shown[0]!r}, {shown[1]!r}, values=True)",
        context={
            "names": shown,
            "versions": versions,
            "report": report,
            "metrics": _metrics(report, versions),
            "headline": answer["headline"],
            "html": answer["html"],
            "modules": modules,
            "all_modules": len(answer["modules"]),
            "top": max(tops, default=0.0) or 1.0,
            "most": max(
                (module for module in answer["modules"] if is_number(module["relative"])),
                key=lambda module: module["relative"],
                default=None,
            ),
            "changed": sum(module["changed"] for module in answer["modules"]),
            "tensors": sum(len(module["tensors"]) for module in answer["modules"]),
            "by": "tensor" if args.get("by") == "tensor" else "module",
            "only": "changed" if args.get("only") == "changed" else "",
            "sort": args.get("sort") if args.get("sort") in ORDERS else "network",
            "pattern": args.get("q", ""),
            "is_number": is_number,
            "heat": heat_of,
        },
    )


def _metrics(report: Mapping[str, Any], versions: Sequence[Version | None]) -> list[Mapping[str, Any]]:
    """The loss and the metrics of both sides, where they differ."""
    a, b = (version.loss if version else None for version in versions)
    loss = [] if a == b else [{"key": "loss", "a": a, "b": b}]
    return [*loss, *(field for field in report["metrics"] if field["key"] != "loss" or not loss)]


def chosen(modules: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """The modules and tensors that an address asks for, in its order."""
    pattern = args.get("q", "").strip()
    found = []
    for module in modules:
        tensors = [
            tensor
            for tensor in module["tensors"]
            if (args.get("only") != "changed" or tensor["sign"] != "=")
            and _fits(f"{module['path']}.{tensor['name']}".lstrip("."), pattern)
        ]
        if tensors:
            found.append({**module, "tensors": tensors})
    if args.get("sort") == "change":
        found.sort(key=lambda module: -module["relative"] if is_number(module["relative"]) else math.inf)
    return found


def _fits(name: str, pattern: str) -> bool:
    """Whether a name has a part of the text, or is one that its wild cards stand for."""
    if not pattern:
        return True
    has_wild_cards = any(sign in pattern for sign in "*?[")
    return fnmatch.fnmatchcase(name, pattern) if has_wild_cards else pattern in name


def is_number(value: Any) -> bool:
    """Whether a value was measured and is finite."""
    return isinstance(value, int | float) and math.isfinite(value)
