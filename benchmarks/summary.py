"""The README's table: the figures that matter most, taken from those of a whole run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import Result, Section, Table
from benchmarks.report import markdown, put_between

BEGIN, END = "<!-- python -m benchmarks -->\n", "<!-- end -->\n"
"""What is between these lines of the README is written by `write`."""

_STATES = {"resnet50": "ResNet50", "gpt2": "GPT-2 small"}
"""The groups that have a column, and its title."""

_OPERATIONS = (
    ("save, all new", "of torch.save", "save, everything new, durable", "`torch.save` + fsync"),
    (
        "save, unchanged",
        "of torch.save",
        "save again in one process, nothing changed",
        "`torch.save` + fsync",
    ),
    ("save, 1% new", "of torch.save", "save, 1% new", "`torch.save` + fsync"),
    ("load, mapped", "of torch.load", "load, mapped, warm", "`torch.load`"),
    ("load, mapped and verified", "of torch.load", "load, mapped, every byte verified, warm", "`torch.load`"),
    (
        "load, owned, then updated",
        "of torch.load",
        "load to train on, first update included",
        "`torch.load` + update",
    ),
    ("load into a live model", "of memcpy", "load into a live model", "copying its memory"),
)
"""What a result is called and compared with, the title of its row, and what the row calls the other."""


def write(readme: Path, sections: Mapping[str, Section]) -> None:
    """Put the tables into a README; does nothing where that or one of their groups is missing.

    Raises:
        ValueError: if it has no place for them.
    """
    if {*_STATES, "series"} <= sections.keys() and readme.is_file():
        put_between(readme, BEGIN, END, tables(sections))


def tables(sections: Mapping[str, Section]) -> str:
    """The two tables: seconds of saves and loads, and bytes of series, as parts of what the others take."""
    seconds = [
        [title, other, *(_shown(_of(sections[name], what, peer)) for name in _STATES)]
        for what, peer, title, other in _OPERATIONS
    ]
    sizes = [
        [
            result.what.partition(", ")[2].rpartition(":")[0],
            f"{result.value:.2f}",
            *(_part(result.detail, what) for what in ("of the moments zero", "of the parameters unchanged")),
        ]
        for result in sections["series"].results
    ]
    found = (
        Table("", ["", "against", *_STATES.values()], seconds),
        Table(
            "",
            [
                "20 checkpoints, three steps apart",
                "bytes, against a file for each",
                "moments that are zero",
                "parameters as they were before",
            ],
            sizes,
        ),
    )
    return "\n".join(f"{markdown(table)}\n" for table in found)


def _part(detail: str, what: str) -> str:
    """The percentage that stands before some words; empty without one."""
    found = re.search(rf"\d+%(?= {what})", detail)
    return found[0] if found else ""


def _of(section: Section, what: str, peer: str) -> Result:
    """The result that ends with these words, against this peer."""
    return next(one for one in section.results if one.what.endswith(f": {what}") and peer in one.detail)


def _shown(result: Result) -> str:
    """The median, and where it moves the range of the runs' medians."""
    digits = 3 if result.value < 0.1 else 2
    if result.moves:
        return f"{result.value:.{digits}f} ({min(result.runs):.{digits}f} to {max(result.runs):.{digits}f})"
    return f"{result.value:.{digits}f}"
