"""Runs, as the catalog knows them: beginning, ending, listing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog.lookups import Reader, parsed
from registry.catalog.resolving import hint
from registry.catalog.scalars import MOST_AT_ONCE, SCALARS, read_scalars
from registry.catalog.versions import commonest_metric
from registry.log.entries import now
from registry.log.facts import sound_run
from registry.log.metrics import is_metric
from registry.log.reference import check_run_name
from registry.reports.words import number, time_of
from registry.store import durable, places
from registry.store.errors import Conflict, NotFound, RegistryError
from registry.store.manifest import record_document
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.log.entries import Record
    from registry.reports.notebook import Part

LOG = "run.log"
PROCESS = "process"
"""A file in a run's folder that names the machine and the process while the run is open."""

INNER = 3
"""Folders that a file of a run is in, below the registry's own: `runs/<model>/<run>`."""

_NUMBERED = re.compile(r"run-([1-9][0-9]{0,8})\Z")
_ROWS = "SELECT name, model, started, record FROM runs"


class RunInfo(NamedTuple):
    """One training session, as the catalog has it."""

    name: str
    model: str
    started: str
    record: Mapping[str, Any]
    folder: Path | None = None
    """Where its log and its events are; None if it was asked for inside a transaction."""

    def __repr__(self) -> str:
        return printable(f"<RunInfo {self.name}: {self.state}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle

        return bundle(repr(self), self.parts())

    def parts(self) -> Iterator[Part]:
        """What a notebook shows of it: how it went, and the last lines of its log."""
        # Lazy: start-up.
        from registry.reports.notebook import code, facts, folded, heading

        yield heading(f"Run {self.name}", self.state)
        yield facts(
            [
                ("began", time_of(self.started)),
                ("ended", self.ended and time_of(self.ended)),
                ("best by", self.monitor),
            ]
        )
        if self.folder is not None:
            yield _curves(self.folder / SCALARS)
            yield folded("log, the last lines", code(_last_lines(self.folder / LOG)), is_open=True)

    @property
    def state(self) -> str:
        """`running`, `finished`, `interrupted`, or `failed: ...`."""
        return str(self.record.get("state", "running"))

    @property
    def monitor(self) -> str | None:
        """The metric (or `loss`) that the alias `best` follows; None if it follows none, or that was not recorded."""
        found = self.record.get("monitor")
        return found[0] if isinstance(found, list) and found and is_metric(found[0]) else None

    @property
    def ended(self) -> str | None:
        """When it ended, in UTC; None while it is open."""
        return self.record.get("ended")


class Runs:
    """The runs of a registry.

    Args:
        root: the registry's folder, below which each run has a folder of its own.
    """

    def __init__(self, catalog: Catalog, root: Path) -> None:
        self._catalog = catalog
        self._root = root

    def begin(self, model: str, name: str | None, about: Mapping[str, Any]) -> str:
        """Record that a run begins.

        Args:
            name: what to call it below the model; `run-` and the next number unless given.

        Returns:
            The run's full name, such as `lenet5/run-12`.

        Raises:
            Conflict: if the model has a run of this name.
        """
        started = now()
        record = record_document({**about, "state": "running"})

        def compute(view: View) -> list[Record]:
            # Versions that were copied from another registry have the names of its runs.
            rows = view.query(
                "SELECT name FROM runs WHERE model = ? UNION SELECT run FROM versions WHERE model = ?",
                [model, model],
            )
            taken = {str(row[0]).removeprefix(f"{model}/") for row in rows}
            if name is None:
                numbers = [int(match[1]) for text in taken if (match := _NUMBERED.match(text))]
                own = f"run-{max(numbers, default=0) + 1}"
            else:
                own = name
                if name in taken or (self._root / "runs" / model / name).exists():
                    raise Conflict(
                        f"{model} has a run {quoted(name)} already", "choose another name, or leave it out"
                    )
            return [{"op": "run", "name": f"{model}/{own}", "model": model, "at": started, "record": record}]

        entry = self._catalog.commit(compute)
        assert entry is not None
        return str(entry.records[0]["name"])

    def end(self, name: str, state: str) -> None:
        """Record how a run ended."""
        ended = now()

        def compute(view: View) -> list[Record]:
            info = _one(view, name)
            record = record_document({**info.record, "state": state, "ended": ended})
            return [{"op": "run", "name": name, "model": info.model, "at": info.started, "record": record}]

        self._catalog.commit(compute)

    def __getitem__(self, name: str) -> RunInfo:
        """One run.

        Raises:
            NotFound: suggesting the nearest name.
        """
        return self._located(_one(self._catalog, name))

    def _located(self, info: RunInfo) -> RunInfo:
        """A run with its folder."""
        return info._replace(folder=self._root / "runs" / info.name)

    def __iter__(self) -> Iterator[str]:
        """The full names of the runs, the newest first."""
        return iter([info.name for info in self.find()])

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self.find())

    def __repr__(self) -> str:
        return f"<Runs: {len(self):,}>"

    def find(self, model: str | None = None) -> list[RunInfo]:
        """Runs, of one model or of all, the newest first."""
        where, given = (" WHERE model = ?", [model]) if model else ("", [])
        rows = self._catalog.query(f"{_ROWS}{where} ORDER BY started DESC, name DESC", given)
        return [self._located(_info(row)) for row in rows]

    def part(self, model: str | None = None, *, before: str = "", limit: int) -> tuple[list[RunInfo], bool]:
        """The newest runs, of one model or of all, and whether there are older ones.

        Args:
            before: a run; those that began before it are asked for.

        Raises:
            NotFound: if there is no such run.
        """
        where, given = ["1 = 1"], []
        if model:
            where.append("model = ?")
            given.append(model)
        if before:
            where.append("(started, name) < (?, ?)")
            given += [self[before].started, before]
        rows = self._catalog.query(
            f"{_ROWS} WHERE {' AND '.join(where)} ORDER BY started DESC, name DESC LIMIT {limit + 1:d}", given
        )
        return [self._located(_info(row)) for row in rows[:limit]], len(rows) > limit

    def open(self) -> list[RunInfo]:
        """Runs that have not ended, the newest first; those whose process is gone are among them."""
        rows = self._catalog.query(
            f"{_ROWS} WHERE record LIKE '%\"running\"%' ORDER BY started DESC, name DESC"
        )
        return [self._located(info) for info in map(_info, rows) if info.state == "running"]

    def counts(self) -> dict[str, int]:
        """How many versions each run has, by its name; those that have none are left out."""
        query = "SELECT run, COUNT(*) FROM versions WHERE run IS NOT NULL GROUP BY run"
        return dict(self._catalog.query(query))

    def monitors(self) -> dict[str, str]:
        """For each model the metric (or `loss`) that its alias `best` follows, as the newest run says."""
        found: dict[str, str] = {}
        for info in self.find():
            if info.monitor:
                found.setdefault(info.model, info.monitor)
        return found

    def headline(self, models: Collection[str]) -> str | None:
        """The metric that says most about some models: what most of their runs follow, or else what most versions have."""
        followed = Counter(metric for model, metric in self.monitors().items() if model in models)
        had = commonest_metric(self._catalog, models)
        return next((name for name, _ in followed.most_common(1)), had)

    def shown_state(self, info: RunInfo) -> str:
        """The state of a run as it is shown, which says so where its process is gone."""
        return "lost (its process is gone)" if self.is_lost(info) else info.state

    def chain(self, name: str) -> list[str]:
        """The names of a run and of those that it was resumed from, the run first."""
        found: list[str] = []
        while name and name not in found:
            found.append(name)
            rows = self._catalog.query(f"{_ROWS} WHERE name = ?", [name])
            resumed = _info(rows[0]).record.get("resumed") if rows else None
            before = self._catalog.query("SELECT run FROM versions WHERE id = ?", [resumed])
            name = before[0][0] if before and before[0][0] else ""
        return found

    def is_lost(self, info: RunInfo) -> bool:
        """Whether a run that never ended belongs to a process of this machine that is gone."""
        if info.state != "running":
            return False
        path = self._root / "runs" / info.name / PROCESS
        try:
            machine, pid = places.read_file(path, 256, inner=INNER).decode().split()
        except (OSError, ValueError, RegistryError):
            return False
        return durable.is_gone(machine, pid)


_LINES = 12
"""Lines of a log that a notebook shows."""


def _curves(path: Path) -> Part:
    """How the scalars of a run went; of a long file the end counts."""
    # Lazy: start-up.
    from registry.reports.blocks import Column
    from registry.reports.notebook import Part, table
    from registry.reports.text_charts import sparkline

    status = places.status_of(path, inner=INNER)
    if status is None:
        return Part("")
    points, _ = read_scalars(path, max(0, status.st_size - MOST_AT_ONCE), inner=INNER)
    rows = [
        (tag, sparkline([point.value for point in part], 16), number(part[-1].value), f"{part[-1].step:,}")
        for tag, part in points.items()
    ]
    columns = [
        *(Column("Scalar"), Column("Trend")),
        *(Column("Last", is_number=True), Column("Step", is_number=True)),
    ]
    return table(columns, rows)


def _last_lines(path: Path) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        end = places.read_end(path, 8_192, inner=INNER)
    except FileNotFoundError:
        return []
    return end.decode(errors="replace").splitlines()[-_LINES:]


def _one(catalog: Reader, name: str) -> RunInfo:
    rows = catalog.query(f"{_ROWS} WHERE name = ?", [name])
    if not rows:
        names = [row[0] for row in catalog.query("SELECT name FROM runs")]
        raise NotFound(f"there is no run {quoted(name)}", hint(name, names))
    return _info(rows[0])


def _info(row: tuple[Any, ...]) -> RunInfo:
    name, model, started, record = row
    about = sound_run(parsed(record))
    return RunInfo(name=check_run_name(name), model=model, started=started, record=about)
