"""Measure everything side by side, and print it beside the goals."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    caching,
    catalogs,
    cold,
    compaction,
    depth,
    exactness,
    gpu,
    growth,
    imported,
    peers,
    readers,
    report,
    series,
    sharded,
    shared,
    small,
    states,
    storage,
    summary,
    training,
    transfers,
    ui,
)
from benchmarks.measure import Scale, Section, together

Group = Callable[[Path, Scale], Section]
"""A measurement. It takes a folder to work in, and how much work it may do."""

GROUPS: dict[str, tuple[str, Group]] = {
    "peers": ("What people use now, side by side", peers.measure),
    "resnet50": (
        "Saving and loading a ResNet50 with Adam: 307 MB",
        lambda folder, scale: storage.measure(
            "ResNet50 + Adam",
            states.resnet50_with_adam(),
            folder=folder,
            scale=scale if scale.quick else scale.twice(),
        ),
    ),
    "gpt2": (
        "Saving and loading a network of GPT-2 small's shape with Adam: 1.5 GB",
        lambda folder, scale: storage.measure(
            "GPT-2 small + Adam", states.gpt2_small_with_adam(), folder=folder, scale=scale
        ),
    ),
    "cold": ("Loading when nothing is in memory: a ResNet50 with Adam, 307 MB", cold.measure),
    "series": ("Bytes on the disk of training series", series.measure),
    "coding": ("The coding of compaction", compaction.measure),
    "depth": ("What the depth of differences costs a load", depth.measure),
    "imported": ("Models without a history", imported.measure),
    "small": ("Many small tensors, and small saves", small.measure),
    "growth": ("As work grows", growth.measure),
    "catalog": ("Many checkpoints, and the command line", catalogs.measure),
    "readers": ("Saving while others read", readers.measure),
    "training": ("What saving costs a training", training.measure),
    "transfer": ("Diff and transfer", transfers.measure),
    "cache": ("Cached results", caching.measure),
    "sharded": ("torch.distributed.checkpoint on the registry", sharded.measure),
    "shared": ("A shared registry", shared.measure),
    "gpu": ("On a GPU", gpu.measure),
    "ui": ("The pages in the browser", ui.measure),
    "exactness": ("What resumes exactly", exactness.measure),
}
"""Every group by its name, with the title of its section."""

QUICK = ("peers", "resnet50", "series", "growth", "catalog")
"""The groups that `--quick` measures."""

ONCE = ("peers", "series", "imported", "growth", "shared", "ui")
"""Groups that `--runs` does not repeat: they count bytes, or start processes of their own for each round."""

ALONE = ("exactness",)
"""Groups that are measured only where they are named, in an environment of their own. They write a page of their own."""


def main() -> int:
    """Run the command line. Returns 1 if a goal is missed under `--strict`, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure; all by default")
    parser.add_argument(
        "--quick", action="store_true", help=f"measure less, within minutes: {', '.join(QUICK)}"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender; 7, or 3 with --quick")
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="repeat each measurement of times in so many processes; 3 rounds each unless --rounds is given",
    )
    parser.add_argument("--folder", help="the folder to work in; it must be on a disk, not in memory")
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        help="write benchmarks.md, benchmarks.json and a plot there, and the table of the README beside it; named groups take the "
        "place of those that are there",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a goal is missed")
    options = parser.parse_args()
    names = options.groups or (QUICK if options.quick else [name for name in GROUPS if name not in ALONE])
    began = time.monotonic()
    folder = Path(options.write) if options.write and names != ["exactness"] else None
    command = " ".join(["python -m benchmarks", *(["--quick"] if options.quick else []), *options.groups])
    kept = report.read(folder) if folder else {}
    sections: dict[str, Section] = {}
    for name in names:
        if not options.json:
            print(f"\n{GROUPS[name][0]}", flush=True)
        sections[name] = _measured(name, options, in_process=len(names) == 1)
        if not options.json:
            _print(sections[name])
        if folder:
            # After each, so that nothing is lost if a later one fails.
            is_part = options.groups or len(sections) < len(names)
            _write(
                folder,
                {**kept, **sections} if is_part else sections,
                "python -m benchmarks" if options.groups else command,
            )
    if options.json:
        print(json.dumps(report.document(sections, command), indent=2))
    if options.write and not folder:
        print(f"\nwrote {exactness.write(Path(options.write), sections['exactness'])}", file=sys.stderr)
    if not options.json:
        print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(
        options.strict
        and not all(result.holds for section in sections.values() for result in section.results)
    )


def _write(folder: Path, sections: Mapping[str, Section], command: str) -> None:
    """Write the page of some sections, and the tables of the README beside its folder."""
    ordered = {name: sections[name] for name in GROUPS if name in sections}
    titles = {name: title for name, (title, _) in GROUPS.items()}
    page = report.write(folder, sections=ordered, titles=titles, command=command)
    summary.write(folder.parent / "README.md", ordered)
    print(f"\nwrote {page}", file=sys.stderr)


def _measured(name: str, options: argparse.Namespace, *, in_process: bool) -> Section:
    """Measure a group, in as many runs as are asked for.

    Args:
        in_process: whether a single run may be in this process.
    """
    load = os.getloadavg()[0]
    runs = 1 if name in ONCE or name in ALONE else options.runs
    rounds = options.rounds or (3 if options.quick or runs > 1 else 7)
    if runs == 1 and in_process:
        with tempfile.TemporaryDirectory(dir=options.folder or ".", prefix="benchmark-") as folder:
            section = GROUPS[name][1](Path(folder).resolve(), Scale(rounds, options.quick))
    else:
        section = together([_in_a_process_of_its_own(name, rounds, options) for _ in range(runs)])
    section.measured = f"{datetime.now(UTC).date()}, load {load:.1f} before"
    return section


def _in_a_process_of_its_own(name: str, rounds: int, options: argparse.Namespace) -> Section:
    """Measure a group in a new process, because memory that another group has used would slow it."""
    command = [sys.executable, "-m", "benchmarks", name, "--json", "--rounds", str(rounds)]
    command += ["--quick"] if options.quick else []
    command += ["--folder", options.folder] if options.folder else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return report.section(json.loads(done.stdout)["sections"][name])


def _print(section: Section) -> None:
    for result in section.results:
        print(report.line(result))
    for table in section.tables:
        print(f"\n  {table.title}")
        rows = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        for row in rows:
            print(
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            )
    for curve in section.curves:
        points = ", ".join(f"{size:,.0f}: {report.spoken(seconds)}" for size, seconds in curve.points)
        print(f"{curve.what:18} {curve.unit:12} power {curve.power:5.2f}  {points}")
    for note in section.notes:
        print(f"  {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
