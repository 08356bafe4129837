"""A checkpoint: what the registry knows of one version, and the way to its tensors."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from registry.catalog.ancestry import children
from registry.catalog.resolving import resolve
from registry.catalog.versions import Version, name_of
from registry.log.metrics import with_metrics
from registry.reports.words import counted, number, shape, size, time_of
from registry.store.errors import Corrupt, NotFound, naming
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.home import Home
    from registry.reports.notebook import Part
    from registry.store.store import Store

_logger = logging.getLogger(__name__)

_MOST_USERS = 10
"""Versions that came from one, as a notebook shows them."""


class Checkpoint:
    """An immutable version of a model.

    Get one from a registry: `Registry()["lenet5:v3"]`.

    Attributes:
        store: where its tensors are: the registry's, or its outbox's.

    Args:
        catalog: knows what it came from, and what came from it; None where nobody asks.
    """

    def __init__(self, store: Store, version: Version, catalog: Catalog | None = None) -> None:
        self.store = store
        self._version = version
        self._catalog = catalog

    @classmethod
    def named(cls, home: Home, reference: str) -> Checkpoint:
        """The checkpoint that a reference names.

        Raises:
            Invalid, NotFound, Conflict: as `registry.Registry.__getitem__`.
        """
        if home.remote is not None:
            # Lazy: start-up.
            from registry.upkeep.outbox import Outbox

            outbox = Outbox(home)
            if found := outbox.find(reference):
                return cls(outbox.home.store, found, outbox.home.catalog)
        try:
            return cls(home.store, resolve(home.catalog, reference), home.catalog)
        except NotFound:
            if home.catalog.shared is None:
                raise
            # Another host may have added it a moment ago.
            home.catalog.shared.ask_again()
            return cls(home.store, resolve(home.catalog, reference), home.catalog)

    @property
    def row(self) -> Version:
        """What the catalog has of it."""
        return self._version

    @property
    def id(self) -> str:
        """The digest of the manifest."""
        return self._version.id

    @property
    def model(self) -> str:
        """The model that it is a version of."""
        return self._version.model

    @property
    def version(self) -> int:
        """The number of the version, from 1 on."""
        return self._version.version

    @property
    def name(self) -> str:
        """The reference with the version, such as `lenet5:v3`."""
        return self._version.name

    @property
    def created(self) -> str:
        """Time of the save, in UTC, ISO 8601."""
        return self._version.created

    @property
    def epoch(self) -> int | None:
        """Epochs that were complete, if it was recorded."""
        return self._version.epoch

    @property
    def step(self) -> int | None:
        """Steps that were done, if it was recorded."""
        return self._version.step

    @property
    def loss(self) -> float | None:
        """The loss, if it was recorded; it may be NaN."""
        return self._version.loss

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metric values by name."""
        return self._version.metrics

    @property
    def aliases(self) -> tuple[str, ...]:
        """The aliases that point at it, such as `best`."""
        return self._version.aliases

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that are attached to it."""
        return self._version.tags

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """Time and text of each note."""
        return self._version.notes

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The hyperparameters that were saved with it."""
        return self._version.record.get("config")

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the user recorded beside the fields that have names."""
        return self._version.record.get("meta", {})  # type: ignore[no-any-return]

    @property
    def record(self) -> Mapping[str, Any]:
        """Everything the catalog has of it: source, lineage, versions of the software, component summaries."""
        return self._version.record

    @property
    def run(self) -> str | None:
        """The training session that saved it."""
        return self._version.record.get("run")

    @property
    def parent(self) -> str | None:
        """Name of the checkpoint that training went on from, such as `lenet5:v2`."""
        return self._version.record.get("parent")

    @property
    def lineage(self) -> Sequence[Mapping[str, str]]:
        """Edges to what it came from: each a `kind`, such as `resumed-from`, and a `parent`."""
        return self._version.record.get("lineage", [])  # type: ignore[no-any-return]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How it was made: classes, builder, dataset, seconds since the run began, command, code, software."""
        return self._version.record.get("provenance", {})  # type: ignore[no-any-return]

    @property
    def components(self) -> tuple[str, ...]:
        """The names of its components, such as `model` and `optimizer`."""
        return tuple(self._version.record["components"])

    @property
    def size(self) -> int:
        """Bytes of its distinct tensors, shared ones included."""
        return self._version.size

    def load(
        self, only: str | Sequence[str] | None = None, *, copy: bool = False, verify: bool = True
    ) -> dict[str, Any]:
        """Its components by name; see `registry.store.store.Store.get`."""
        return self.store.get(self.id, only=only, copy=copy, verify=verify, label=self.name)

    def state_dict(self, component: str = "model", *, copy: bool = False, verify: bool = True) -> Any:
        """One component, its tensors mapped copy-on-write from the store.

        Raises:
            NotFound: if the checkpoint has no such component.
            Corrupt: if a byte is not what was saved.
        """
        if component not in self.components:
            # Lazy: loads torch.
            from registry.live.components import missing

            raise missing(component, self.name, self.components)
        return self.load(component, copy=copy, verify=verify)[component]

    def load_into(self, *, verify: bool = True, **components: Any) -> None:
        """Copy stored tensors into live trees of tensors, all or nothing: `load_into(model=net.state_dict())`.

        Raises:
            Incompatible: listing the names, shapes or dtypes that differ; nothing was changed.
        """
        self.store.load_into(self.id, components, verify=verify, label=self.name)

    def restore(self, *, rng: bool | None = None, verify: bool = True, **live: Any) -> None:
        """Put recorded state into live objects, all of them or none: `restore(model=model, optimizer=optimizer)`.

        Wrapped networks (`DataParallel`, `torch.compile` and so on) are matched by the names of the plain network.
        A list of objects is matched with the list that was saved, in its order. The log says what was restored.

        Args:
            live: objects, or lists of them, by component name. None with `rng=True` restores the generators alone.
            rng: restore the random number generators too, and freeze again what was frozen. By default this happens
                if any object is no network, such as an optimizer, a scheduler or a loader: training then goes on.
                Each of several processes gets its own generators, if as many processes saved the checkpoint.
            verify: check every byte against its digest.

        Raises:
            NotFound: if the checkpoint has no component of a name.
            Incompatible: saying what differs; nothing was changed.
            Corrupt: if a byte is not what was saved; nothing was changed.
        """
        # Lazy: loads torch.
        from torch import nn

        # Lazy: loads torch.
        from registry.live import components
        from registry.live import rng as generators
        from registry.live.freezing import check_again, freeze_again

        for name in live:
            if name not in self.components:
                raise components.missing(name, self.name, self.components)
        parts = components.flat(live)
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if rng is None:
            rng = len(networks) < len(parts)
        # Those of which every part is a network.
        lent = [name for name in live if components.flat({name: live[name]}).keys() <= networks.keys()]
        others = [name for name in live if name not in lent]
        if rng and "rng" in self.components:
            others.append("rng")
        frozen = self.provenance.get("frozen", {}) if rng else {}
        for name, network in networks.items():
            check_again(network, frozen.get(name, ()))
        with contextlib.ExitStack() as borrowed:
            states: dict[str, Any] = {}
            if lent:
                read = self.store.borrowed(self.id, lent, verify=verify, label=self.name)
                states |= borrowed.enter_context(read)
            # Objects other than networks keep the tensors that they are given, so they need copies.
            if others:
                states |= self.load(others, copy=True, verify=verify)
                states |= self._of_this_rank(others, verify)
            with naming(self.name):
                components.restore(states, live, self.provenance.get("kinds", {}))
        told = [", ".join(live)] if live else []
        for name, network in networks.items():
            if names := frozen.get(name):
                freeze_again(network, names, self.provenance.get("going_on", {}).get(name, ()))
                told.append(f"{len(names)} tensors of {name} are frozen again")
        if "rng" in states:
            generators.restore(states["rng"])
            told.append("the random numbers go on as they were")
        elif rng:
            told.append("no random numbers were recorded")
        _logger.info("%s was restored: %s", self.name, "; ".join(told))

    @property
    def extra(self) -> Mapping[str, Any]:
        """The plain values and tensors that were saved as `extra`."""
        return self.load("extra")["extra"] if "extra" in self.components else {}

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that an imported folder had beside its parameters, byte for byte, by relative name.

        Raises:
            Corrupt: if the component `files` holds anything else, or a byte is not what was saved.
        """
        found = self.load("files")["files"] if "files" in self.components else {}
        if not isinstance(found, Mapping) or not all(
            isinstance(name, str) and isinstance(data, bytes) for name, data in found.items()
        ):
            raise Corrupt(f"{self.name}: the component files does not hold files")
        return found

    def parameters(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        """Path, dtype, shape and digest of every tensor; no tensor is read.

        A tensor that several processes stored in shards has the digest of the list of its shards.
        """
        for path, info, _ in self.store.manifest(self.id).listed:
            yield path, info.dtype, info.shape, info.digest

    def __repr__(self) -> str:
        return printable(f"Checkpoint({', '.join(f'{key}={value}' for key, value in self._facts())})")

    def __rich_repr__(self) -> Iterator[tuple[str, Any]]:
        yield from self._facts()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle

        return bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[Part]:
        """What a notebook shows of it."""
        # Lazy: start-up.
        from registry.reports import notebook

        yield notebook.heading(self.name, " ".join((self.id[:12], *self.aliases)))
        fields = {"epoch": self.epoch, "step": self.step, "loss": self.loss}
        measured = with_metrics(fields, self.metrics)
        yield notebook.facts(
            [
                *(
                    (key, number(value) if isinstance(value, float) else f"{value:,}")
                    for key, value in measured.items()
                    if value is not None
                ),
                ("tags", ", ".join(self.tags)),
                ("from", ", ".join(self._sources())),
                ("used by", self._users()),
                ("run", self.run),
                ("saved", time_of(self.created)),
                ("size", f"{size(self.size)} in {counted(self._version.tensors, 'tensor')}"),
                *(("note", text) for _, text in self.notes),
            ]
        )
        yield notebook.folded("how to load it", notebook.code(self.how_to_load()), is_open=True)
        tensors: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
        for path, dtype, sizes, _ in self.parameters():
            component, _, name = path.partition("/")
            tensors.setdefault(component, []).append((name, dtype, sizes))
        for component, found in tensors.items():
            yield _tensors_part(self._version, component, found)

    def _sources(self) -> list[str]:
        """What it came from, by name where there is one."""
        found = [f"{self.parent} (same run)"] if self.parent else []
        for edge in self.lineage:
            name = name_of(self._catalog, edge["parent"]) if self._catalog else None
            found.append(f"{name or edge['parent'][:40]} ({edge['kind']})")
        return found

    def _users(self) -> str:
        """What came from it; of many the first alone."""
        if self._catalog is None:
            return ""
        found = [f"{child.name} ({kind})" for child, kind in children(self._catalog, self._version)]
        more = len(found) - _MOST_USERS
        return ", ".join(found[:_MOST_USERS]) + (f" and {more:,} more" if more > 0 else "")

    def how_to_load(self) -> list[str]:
        """Lines of Python that load it from a `registry`."""
        lines = [f"checkpoint = registry[{self.name!r}]", "state_dict = checkpoint.state_dict()"]
        if "model" not in self.components:
            lines[1] = "states = checkpoint.load()"
        elif "network" in self.provenance:
            lines.append(f"network = registry.build({self.name!r})")
        return lines

    def _of_this_rank(self, names: Collection[str], verify: bool) -> dict[str, Any]:
        """The states of this process's own that replace the leading one's, where several train together."""
        # Lazy: loads torch.
        from registry.live import ranks, rng

        before, now, rank = self.provenance.get("processes", 1), ranks.count(), ranks.mine()
        if before != now and "rng" in names:
            _logger.warning(
                "%s was saved by %d processes and goes on with %d: from here on the training is another one",
                self.name,
                before,
                now,
            )
        if not rank or "ranks" not in self.components:
            return {}
        if before != now:
            return {"rng": rng.capture()} if "rng" in names else {}
        own = self.load(f"ranks/{rank}", copy=True, verify=verify)["ranks"][str(rank)]
        return {name: own[name] for name in names if name in own}

    def _facts(self) -> list[tuple[str, Any]]:
        facts: list[tuple[str, Any]] = [("name", self.name), ("id", self.id[:12])]
        fields = {"epoch": self.epoch, "step": self.step, "loss": self.loss}
        named = with_metrics(fields, self.metrics)
        for key, value in named.items():
            if value is not None:
                facts.append((key, f"{value:.5g}" if isinstance(value, float) else value))
        return facts


def _tensors_part(
    version: Version, component: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Part:
    """The tensors of a component; those whose names differ in numbers alone stand in one row."""
    # Lazy: start-up.
    from registry.reports import notebook
    from registry.reports.blocks import Column

    provenance = version.record.get("provenance", {})
    buffers = set(provenance.get("buffers", {}).get(component, ()))
    elements = version.record["components"].get(component, {}).get("elements", 0)
    kind = provenance.get("kinds", {}).get(component, "")
    if component in provenance.get("buffers", {}):
        # What a network holds beside its buffers are its parameters.
        count = elements - sum(math.prod(shape) for name, _, shape in tensors if name in buffers)
        amount = f"{count:,} parameters"
    else:
        amount = f"{elements:,} elements"
    about = [(name, f"{shape(sizes)} {dtype}") for name, dtype, sizes in tensors]
    columns = [Column("Tensor", is_code=True), Column("Shape"), Column("Count", is_number=True)]
    rows = [(name, shape, f"{many:,}") for name, shape, many in notebook.merged(about)]
    head = " ".join(filter(None, (component, kind)))
    return notebook.folded(
        f"{head}: {amount} in {counted(len(tensors), 'tensor')}", notebook.table(columns, rows)
    )
