"""Measure everything and print the ratios beside their goals; ends with status 1 if one does not hold."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import caching, catalogs, compaction, sharded, states, storage, training, transfers
from benchmarks.measure import Result

Group = Callable[[Path, int], list[Result]]

GROUPS: dict[str, Group] = {
    "resnet50": lambda f, n: storage.measure("ResNet50 + Adam", states.resnet50_with_adam(), f, n),
    "gpt2": lambda f, n: storage.measure("GPT-2 small + Adam", states.gpt2_small_with_adam(), f, n),
    "catalog": catalogs.measure,
    "training": training.measure,
    "transfer": transfers.measure,
    "cache": caching.measure,
    "sharded": sharded.measure,
    "compact": compaction.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the best counts")
    parser.add_argument("--folder", help="where to write; must be on a disk, not in memory")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", file=sys.stderr
    )
    results: list[Result] = []
    for name in options.groups or GROUPS:
        with tempfile.TemporaryDirectory(dir=options.folder or ".", prefix="benchmark-") as folder:
            found = GROUPS[name](Path(folder), options.rounds)
        results += found
        for result in found if not options.json else []:
            _print(result)
    if options.json:
        print(json.dumps([{**asdict(result), "holds": result.holds} for result in results], indent=2))
    return int(not all(result.holds for result in results))


def _print(result: Result) -> None:
    goal = "" if result.goal is None else f"goal {result.goal:.2f}  {'holds' if result.holds else 'MISSED'}"
    print(f"{result.what:52} {result.value:6.2f}{result.unit:2}  {goal:18}  {result.detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
