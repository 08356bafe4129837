"""Listings: versions and models as sequences, which print themselves in a line and become tables of pandas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, SupportsIndex, TypeVar, overload

from registry.catalog.conditions import parse_condition
from registry.catalog.lookups import Reader
from registry.catalog.resolving import direction_of, no_such_metric
from registry.catalog.versions import ANY, Condition, Model, Version, list_versions, rank_versions
from registry.reports.words import ago, number, size
from registry.store.errors import Invalid, Unsupported
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    import pandas

    from registry.reports.notebook import Bar, Cell, Part

_MOST_SHOWN = 50
"""Rows that a notebook shows."""
_MOST_METRICS = 4
"""Metrics that it shows, beside the one that versions are in the order of."""

Row = TypeVar("Row")


class Listing(Sequence[Row], Generic[Row]):
    """An immutable sequence of rows. It equals a list or a tuple with the same rows, and a part of it is one of its kind."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> Self: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Row | Self:
        return self._part(self._rows[place]) if isinstance(place, slice) else self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Listing):
            return self._rows == other._rows
        return self._rows == tuple(other) if isinstance(other, list | tuple) else NotImplemented

    # A version holds mappings, which have no hash.
    __hash__ = None  # type: ignore[assignment]

    def _part(self, rows: Iterable[Row]) -> Self:
        """Some of the rows, as a listing."""
        return type(self)(rows)


class Asked(NamedTuple):
    """What a listing of versions was asked for.

    Attributes:
        model: whose versions; those of all models unless given.
        by: the metric that they are in the order of.
        total: how many versions there are without the limit.
    """

    model: str | None = None
    by: str | None = None
    total: int = 0


class Versions(Listing[Version]):
    """Versions, as `Registry.versions` lists them.

    Attributes:
        asked: what was asked for.
    """

    def __init__(self, rows: Iterable[Version] = (), asked: Asked | None = None) -> None:
        super().__init__(rows)
        self.asked = asked or Asked(total=len(self))

    def __repr__(self) -> str:
        count = f"{len(self):,}"
        if self.asked.total > len(self):
            count += f" of {self.asked.total:,}"
        whose = f" of {self.asked.model}" if self.asked.model else ""
        order = f" by {self.asked.by}" if self.asked.by else ""
        return printable(f"<Versions{whose}{order}: {count}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle

        return bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[Part]:
        # Lazy: start-up.
        from registry.reports.blocks import Column
        from registry.reports.notebook import WHOLE, heading, table

        yield heading(repr(self)[1:-1])
        shown = self[:_MOST_SHOWN]
        had = Counter(name for version in shown for name in version.metrics)
        names = [name for name, _ in had.most_common(_MOST_METRICS) if name != self.asked.by]
        if any(version.loss is not None for version in shown) and self.asked.by != "loss":
            names.insert(0, "loss")
        if self.asked.by:
            names.insert(0, self.asked.by)
        columns = [
            *(Column("Version"), Column("Aliases"), Column("Epoch", is_number=True)),
            *(Column(name, is_number=True, is_given=True) for name in names),
            *(Column("Size", is_number=True), Column("Saved", is_number=True)),
        ]
        bars = [_bars([version.value(name) for version in shown]) for name in names]
        rows: list[list[Cell]] = [
            [
                version.name,
                " ".join((*version.aliases, *version.tags)),
                "" if version.epoch is None else str(version.epoch),
                *(column[i] for column in bars),
                size(version.size),
                ago(version.created),
            ]
            for i, version in enumerate(shown)
        ]
        yield table(columns, rows, total=len(self), room=WHOLE)

    def to_pandas(self) -> pandas.DataFrame:
        """The versions as a table of pandas, a column for each metric.

        A metric that has the name of another column is called `metrics.NAME`.

        Raises:
            Unsupported: if pandas is not installed.
        """
        rows = [_version_row(version) for version in self]
        metrics = {name: None for version in self for name in version.metrics}
        for name in metrics:
            column = f"metrics.{name}" if name in _VERSION_COLUMNS else name
            for row, version in zip(rows, self, strict=True):
                row[column] = version.metrics.get(name)
        return _table(rows, _VERSION_COLUMNS)

    def _part(self, rows: Iterable[Version]) -> Self:
        return type(self)(rows, self.asked)


class Models(Listing[Model]):
    """Models, as `Registry.models` lists them."""

    def __repr__(self) -> str:
        versions = sum(model.versions for model in self)
        return f"<Models: {len(self):,} with {versions:,} version{'' if versions == 1 else 's'}>"

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle

        return bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[Part]:
        # Lazy: start-up.
        from registry.reports.blocks import Column
        from registry.reports.notebook import WHOLE, Bar, heading, shares_of, table

        yield heading(repr(self)[1:-1])
        columns = [
            *(Column("Model"), Column("Versions", is_number=True), Column("Latest"), Column("Best")),
            *(Column("Own size", is_number=True), Column("Updated", is_number=True)),
        ]
        shown = self[:_MOST_SHOWN]
        owns = shares_of([float(model.own) for model in shown])
        rows: list[list[Cell]] = [
            [
                model.name,
                f"{model.versions:,}",
                model.latest.name.partition(":")[2],
                model.best.name.partition(":")[2] if model.best else "",
                Bar(share, size(model.own)),
                ago(model.latest.created),
            ]
            for model, share in zip(shown, owns, strict=True)
        ]
        yield table(columns, rows, total=len(self), room=WHOLE)

    def to_pandas(self) -> pandas.DataFrame:
        """The models as a table of pandas.

        Raises:
            Unsupported: if pandas is not installed.
        """
        rows = [
            {
                "name": model.name,
                "versions": model.versions,
                "latest": model.latest.name,
                "best": model.best.name if model.best else None,
                "own": model.own,
                "updated": model.latest.created,
            }
            for model in self
        ]
        return _table(rows, ("name", "versions", "latest", "best", "own", "updated"))


def select_versions(
    catalog: Reader,
    model: str | None,
    *,
    by: str | None = None,
    smallest: bool | None = None,
    tag: str | None = None,
    before: int | None = None,
    where: str | None = None,
    limit: int | None = None,
) -> Versions:
    """The versions of a model, or of all: the newest first, or the best.

    Args:
        by: a metric or `loss`: only versions that have it, the best first.
        smallest: whether the smallest value is the best; without it the metric's name decides.
        tag: only versions with this tag.
        before: only versions with a smaller number than this one.
        where: only versions that fulfil a condition; see `registry.catalog.conditions.parse_condition`.
        limit: return at most this many.

    Raises:
        NotFound: if no version has the metric, or one that the condition names.
        Invalid: if the metric's name does not tell which value is better, or an argument is malformed.
    """
    for name, given in (("limit", limit), ("before", before)):
        if given is not None and (type(given) is not int or given < 1):
            raise Invalid(f"{name} is {quoted(str(given))}, expected a whole number of 1 or more")
    also = parse_condition(catalog, where, model) if where is not None else ANY
    if before is not None:
        # SQLite has no larger whole numbers.
        number = min(before, 2**63 - 1)
        also &= Condition("v.version < ?", [number])
    if by is None:
        rows, total = list_versions(catalog, model, tag=tag, also=also, limit=limit)
        return Versions(rows, Asked(model, total=total))
    direction = direction_of(catalog, model, by, smallest=smallest)
    rows, total = rank_versions(catalog, model, by, smallest=direction, tag=tag, also=also, limit=limit)
    if not rows and not rank_versions(catalog, model, by, limit=1)[1]:
        raise no_such_metric(catalog, model, by)
    return Versions(rows, Asked(model, by=by, total=total))


_VERSION_COLUMNS = (
    *("name", "model", "version", "created", "epoch", "step", "loss", "size", "tensors"),
    *("aliases", "tags", "run", "parent", "id"),
)
"""The columns of a table of versions, before those of metrics."""


def _bars(values: Sequence[float | None]) -> list[Bar | None]:
    """A column of a metric."""
    # Lazy: start-up.
    from registry.reports.notebook import Bar, shares_of

    return [
        None if value is None else Bar(share, number(value))
        for value, share in zip(values, shares_of(values), strict=True)
    ]


def _version_row(version: Version) -> dict[str, Any]:
    found = {"run": version.record.get("run"), "parent": version.record.get("parent")}
    given = {"name": version.name, **version._asdict(), **found}
    return {column: given[column] for column in _VERSION_COLUMNS}


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    try:
        # Lazy: loads pandas.
        import pandas
    except ImportError:
        raise Unsupported(
            "to_pandas needs pandas, which is not installed", "run: pip install pandas"
        ) from None
    return pandas.DataFrame(list(rows), columns=None if rows else list(columns))
