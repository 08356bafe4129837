"""Saving: from state trees to the next version of a model."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.catalog.commit import check_size, publish, publish_version
from registry.catalog.naming import point_best
from registry.catalog.resolving import resolve
from registry.catalog.versions import version_of
from registry.checkpoints.checkpoint import Checkpoint
from registry.configs.plain import plain_table
from registry.log import facts
from registry.log.entries import now
from registry.log.metrics import check_metric
from registry.log.reference import MAX_EDGE, check_name, check_text, check_version_name
from registry.progress import Progress, silent
from registry.release import VERSION
from registry.remote.bucket import Unreachable
from registry.store.errors import Invalid, NotFound
from registry.store.saving import Encoded
from registry.store.store import Written
from registry.store.text import quoted
from registry.upkeep.outbox import Outbox

if TYPE_CHECKING:
    from registry.catalog.transactions import View
    from registry.home import Home
    from registry.log.entries import Record
    from registry.log.metrics import Monitor

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is recorded of a version beside its tensors; `registry.Registry.save` explains each field."""

    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    metrics: Mapping[str, float] | None = None
    config: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] | None = None
    lineage: Sequence[Mapping[str, str]] = ()
    source: Mapping[str, Any] | None = None
    run: str | None = None
    parent: str | None = None
    provenance: Mapping[str, Any] | None = None
    dcp: Mapping[str, Any] | None = None

    def record(self, model: str) -> dict[str, Any]:
        """What the manifest records of a version that is saved now.

        Raises:
            Invalid: if a field has the wrong form.
        """
        found: dict[str, Any] = {
            "kind": "checkpoint",
            "model": model,
            "created": now(),
            "epoch": _whole(self.epoch, "epoch"),
            "step": _whole(self.step, "step"),
            "loss": None if self.loss is None else _number(self.loss, "loss"),
            "metrics": {check_metric(k): _number(v, f"metric {k}") for k, v in (self.metrics or {}).items()},
            "config": None if self.config is None else plain_table(self.config, "config"),
            "meta": plain_table(self.meta or {}, "meta"),
            "lineage": [_edge(edge) for edge in self.lineage],
            "source": self.source,
            "run": self.run,
            "parent": None if self.parent is None else check_version_name(self.parent),
            "provenance": self.provenance,
            "dcp": self.dcp,
        }
        found = {key: value for key, value in found.items() if value not in (None, {}, [])}
        if odd := facts.malformed(found):
            raise Invalid(f"{odd} is not of the kind that is documented for it, so it cannot be recorded")
        return found | {"torch-registry": VERSION}


def save(
    home: Home,
    model: str,
    components: Mapping[str, Any] | Encoded | Written,
    about: Facts,
    *,
    best_by: Monitor | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Save named state trees as the next version of a model.

    When this returns, the version survives a crash or a power cut. Tensors that are stored already are not written
    again.

    Args:
        home: the registry that gets the version.
        model: name of the model family.
        components: state trees by component name, or what `store.encode` or `store.add` made of them.
        about: what is recorded of the version.
        best_by: move the alias `best` to the version with the best value of this metric.
        progress: told the bytes done and the bytes in all.

    Raises:
        Invalid: if a name or a number has the wrong form.
        Unsupported: if a value cannot be stored, naming its path and type; nothing is written.
        StorageError: if the disk is full or refuses; no version is made. Where a shared registry cannot be reached, the
            version is kept on this computer, see `registry.upkeep.outbox`.
    """
    check_name(model, "model")
    state = components if isinstance(components, Encoded | Written) else None
    for component in state.components if state else components:  # type: ignore[union-attr]
        check_name(component, "component")
    record = about.record(model)
    if state is None:
        state = home.store.encode(components)  # type: ignore[arg-type]

    def records(view: View, manifest_id: str, text: Mapping[str, str]) -> list[Record]:
        if home.remote is not None:
            # Also where its outbox takes the version, which could never be shared.
            check_size([text], model)
        found = [publish_version(view, model, manifest_id, text=text)]
        if best_by is None:
            return found
        value = best_by.value(record.get("loss"), record.get("metrics", {}))
        return [*found, *point_best(view, model, best_by, manifest_id=manifest_id, value=value)]

    def saved_in(home: Home) -> Checkpoint:
        saved, made = publish(
            home.catalog, home.store, state, record=record, records=records, what=model, progress=progress
        )
        (version,) = (one["version"] for one in made if one["op"] == "publish")
        try:
            return Checkpoint(home.store, resolve(home.catalog, f"{model}:v{version}"), home.catalog)
        except NotFound:
            # The catalog could not be written, or others have removed the version already.
            manifest = home.store.just_written(saved) or home.store.manifest(saved)
            row = version_of(saved, model, version, manifest=manifest)
            return Checkpoint(home.store, row, home.catalog)

    if home.remote is None:
        return saved_in(home)
    # The shards of several processes lie in this registry already.
    return _shared_or_kept(home, saved_in, model, best_by, can_wait=not isinstance(state, Written))


def _shared_or_kept(
    home: Home,
    saved_in: Callable[[Home], Checkpoint],
    model: str,
    best_by: Monitor | None,
    *,
    can_wait: bool,
) -> Checkpoint:
    """Save in a shared registry, or in its outbox where it cannot be reached.

    Args:
        saved_in: saves in one of the two.
        can_wait: whether the outbox may take it.
    """
    assert home.remote is not None
    outbox = Outbox(home)
    try:
        if home.remote.log.rests() and outbox:
            raise Unreachable(f"{home.place}: the store did not answer a moment ago")
        # What was saved before gets its number before.
        outbox.share()
        return saved_in(home)
    except Unreachable as error:
        if not can_wait or not outbox.takes():
            raise
        if best_by:
            outbox.watch(model, best_by)
        saved = saved_in(outbox.home)
        kept = Checkpoint(outbox.home.store, saved.row._replace(is_pending=True), outbox.home.catalog)
        _logger.warning(
            "%s; the version is kept on this computer as %s, and shared later", error.message, kept.name
        )
        return kept


def _edge(edge: Mapping[str, str]) -> dict[str, str]:
    if set(edge) != {"kind", "parent"}:
        raise Invalid("lineage: an edge has the keys kind and parent")
    return {key: check_text(edge[key], f"lineage {key}", MAX_EDGE) for key in ("kind", "parent")}


def _whole(value: Any, what: str) -> int | None:
    """A count; 0-dimensional tensors and scalars of NumPy are taken, too."""
    if value is None:
        return None
    # Tensors of several elements raise these.
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        number = operator.index(value)
        if not isinstance(value, bool) and 0 <= number < 1 << 63:
            return number
    raise Invalid(f"{what} is {quoted(str(value))}, expected a whole number of 0 or more")


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        shown = quoted(str(value))
        raise Invalid(f"{what} is {shown}, expected a number") from None
