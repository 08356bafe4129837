"""What resumes exactly: trainings that are killed and resumed, from their framework's own checkpoint and from ours.

Needs an environment with the frameworks; `make exactness` runs it there. A new case is an entry of `CASES`; a new
framework a script in `trainings/` besides, which resumes by itself, and takes `--native` for its own checkpoint. The
network and the samples of most are in `trainings/small.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import Scale, Section, Table
from benchmarks.report import markdown, put_between
from registry import RegistryError, check_resume

SCRIPTS = Path(__file__).parent / "trainings"

PAGE = "integrations.md"
"""The page of the documentation that has the table."""

BEGIN, END = "<!-- python -m benchmarks exactness -->\n", "<!-- end -->\n"
"""What is between these lines of the page is written by `write`."""


@dataclass(frozen=True)
class Case:
    """A training, which is run with its framework's own checkpoint, and with ours.

    Attributes:
        package: the framework, as it is installed.
        name: what is special about it.
        script: the script of `trainings/`.
        words: its arguments.
        at: the number of optimizer steps after which it is killed.
    """

    package: str
    name: str
    script: str
    words: str
    at: int


_PLAIN = ("torch", "plain.py")
_TORCHDATA = ("torchdata", "plain.py")
_ACCELERATE = ("accelerate", "accelerated.py")
_LIGHTNING = ("lightning", "lightning_training.py")
_TRAINER = ("transformers", "trainer_training.py")

CASES = [
    Case(package, name, script, words, at)
    for (package, script), name, words, at in (
        (_PLAIN, "end of an epoch", "--every 10", 23),
        (_PLAIN, "inside an epoch", "", 17),
        (_PLAIN, "inside an epoch, 2 workers", "--workers 2", 17),
        (_PLAIN, "inside a window of accumulated gradients", "--window 2 --every 5", 8),
        (_TORCHDATA, "data that draw nothing", "--loader torchdata --data plain", 17),
        (_TORCHDATA, "data that draw", "--loader torchdata", 17),
        (_TORCHDATA, "a generator of its own", "--loader torchdata --generator", 17),
        (_TORCHDATA, "2 workers, data that draw", "--loader torchdata --workers 2", 17),
        (_TORCHDATA, "a stream with a state", "--loader torchdata --data stream", 17),
        (_TORCHDATA, "end of an epoch, data that draw", "--loader torchdata --every 10", 23),
        (_ACCELERATE, "end of an epoch", "--every 10", 23),
        (_ACCELERATE, "inside an epoch, `skip_first_batches`", "", 17),
        (_ACCELERATE, "inside an epoch, 2 workers", "--workers 2", 17),
        (_ACCELERATE, "inside an epoch, `use_stateful_dataloader`", "--stateful", 17),
        (_ACCELERATE, "inside a window of accumulated gradients", "--window 2 --every 5", 8),
        (_LIGHTNING, "end of an epoch", "--every 10", 23),
        (_LIGHTNING, "inside an epoch, `DataLoader`", "", 17),
        (_LIGHTNING, "inside an epoch, `StatefulDataLoader`", "--loader stateful", 17),
        (_LIGHTNING, "inside an epoch, `ResumableLoader`", "--loader resumable", 17),
        (_LIGHTNING, "the same, 2 workers", "--loader resumable --workers 2", 17),
        (_TRAINER, "end of an epoch, data that draw", "--every 10 --data draw", 23),
        (_TRAINER, "inside an epoch", "", 17),
        (_TRAINER, "the same, another seed set before it resumes", "--seed 777", 17),
        (_TRAINER, "inside an epoch, data that draw", "--data draw", 17),
        (_TRAINER, "the same, `ResumableData`", "--data draw --loader resumable", 17),
        (_TRAINER, "the same, `ResumableData`, 2 workers", "--data draw --loader resumable --workers 2", 17),
        (_TRAINER, "inside an epoch, Mixtral", "--network mixtral", 17),
        (_TRAINER, "inside an epoch, LoRA of PEFT", "--network lora", 17),
    )
]
"""The rows of the table."""


def measure(folder: Path, scale: Scale) -> Section:
    """Run every case whose framework is installed."""
    rows, missing = [], set()
    for case in CASES:
        try:
            release = version(case.package).partition("+")[0]
        except PackageNotFoundError:
            missing.add(case.package)
            continue
        theirs, ours = (verdict(case, *more) for more in (["--native"], []))
        rows.append([f"{case.package} {release}", case.name, theirs, ours])
    notes = [f"{name} is not installed, and is left out." for name in sorted(missing)]
    return Section(
        tables=[Table("what resumes exactly", ["", "killed", "its own checkpoint", "ours"], rows)],
        notes=notes,
    )


def verdict(case: Case, *more: str) -> str:
    """Whether a case is exact, or else what differs first."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        found = check_resume(SCRIPTS / case.script, *case.words.split(), *more, at=case.at)
    except RegistryError as error:
        return f"not checked: {error}"
    if found.exact:
        return "**exact**"
    assert found.difference is not None
    if not found.repeats:
        return "does not repeat itself"
    return f"differs: {found.difference.kind}"


def write(folder: Path, section: Section) -> Path:
    """Put the table into the page of a folder.

    Raises:
        ValueError: if a framework was missing, or the page has no place for the table.
    """
    if section.notes:
        raise ValueError("; ".join(section.notes))
    (table,) = section.tables
    page = folder / PAGE
    put_between(page, BEGIN, END, f"{markdown(table)}\n")
    return page
