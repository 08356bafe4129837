"""The worker: a child process that reads tensors, so that the server itself never loads torch.

It reads a request a line from its standard input and writes an answer a line to its standard output, both as JSON. It
ends when its input ends, or when nobody has asked for a while.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import sys
from typing import Any

from registry.checkpoints.measured import measure
from registry.registry import Registry
from registry.reports import html
from registry.runs.events import read_events
from registry.store.errors import RegistryError
from registry.transfer.diffing import diff

_IDLE_SECONDS = 120.0

_MOST_POINTS = 2_000
"""Points of a tag that are sent."""


def main() -> None:
    """Answer requests about the registry that the command line names."""
    # Whoever prints must not break an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(OSError):
        os.nice(10)
    registry = Registry(sys.argv[1], create=False)
    while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps(_answer(registry, json.loads(line))), file=answers, flush=True)


def _answer(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "run" in request:
            return _events(registry, request)
        return _statistics(registry, request) if "path" in request else _diff(registry, request)
    except RegistryError as error:
        message, hint = error.for_command_line()
        return {"error": {"kind": type(error).__name__, "message": message, "hint": hint}}


def _statistics(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    ((_, found),) = measure(registry[request["of"]], [request["path"]])
    return found._asdict()


def _events(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    folder = registry.runs[request["run"]].folder
    found = read_events(folder) if folder else {}
    return {
        tag: [
            (point.step, point.value)
            for point in points[:: len(points) // _MOST_POINTS + 1]
            if math.isfinite(point.value)
        ]
        for tag, points in found.items()
    }


def _diff(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    report = diff(request["a"], request["b"], registry=registry, values=True)
    return {
        "report": report.model_dump(mode="json", by_alias=True),
        "modules": [
            {
                **module._asdict(),
                "tensors": [tensor._asdict() for tensor in module.tensors],
                "elements": module.elements,
                "changed": module.changed,
            }
            for module in report.modules_changed()
        ],
        "headline": report.headline,
        "html": html.render(report.blocks()),
    }


if __name__ == "__main__":
    main()
