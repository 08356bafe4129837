"""The README's table: the figures that matter most, taken from those of a whole run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import Result, Section

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
    """Put the tables into a README that has a place for them; does nothing where the groups or the place are missing."""
    if not {*_STATES, "series"} <= sections.keys() or not readme.is_file():
        return
    pattern = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)
    text = readme.read_text("utf-8")
    readme.write_text(pattern.sub(lambda _: tables(sections), text), "utf-8")


def tables(sections: Mapping[str, Section]) -> str:
    """The two tables: seconds of saves and loads, and bytes of series, as parts of what the others take."""
    rows = [["", "against", *_STATES.values()]]
    for what, peer, title, other in _OPERATIONS:
        found = [_of(sections[name], what, peer) for name in _STATES]
        rows.append([title, other, *map(_shown, found)])
    bytes_of = [["20 checkpoints, three steps apart", "of a file for each", "what does not move"]]
    for result in sections["series"].results:
        what = result.what.partition(", ")[2].rpartition(":")[0]
        bytes_of.append([what, f"{result.value:.2f}", result.detail.partition("; ")[2] or "not measured"])
    return f"{_markdown(rows)}\n{_markdown(bytes_of)}"


def _of(section: Section, what: str, peer: str) -> Result:
    """The result that ends with these words, against this peer."""
    return next(one for one in section.results if one.what.endswith(f": {what}") and peer in one.detail)


def _shown(result: Result) -> str:
    """The median, and where it moves the range of the runs' medians."""
    digits = 3 if result.value < 0.1 else 2
    if result.moves:
        return f"{result.value:.{digits}f} ({min(result.runs):.{digits}f} to {max(result.runs):.{digits}f})"
    return f"{result.value:.{digits}f}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
