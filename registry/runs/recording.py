"""Recording: what a run saves with a version: the state of live objects, how they were made, and their origin."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from registry.cache.decorator import used_artifacts
from registry.configs.config import Config
from registry.configs.plain import plain_table
from registry.live import builders, components, rng
from registry.live.freezing import frozen_names, parts_going_on
from registry.runs import provenance
from registry.store.digest import is_digest
from registry.store.errors import Invalid
from registry.store.saving import Encoded
from registry.store.text import quoted
from registry.transfer.plan import TransferPlan, plan_document

if TYPE_CHECKING:
    from argparse import Namespace

    from registry.checkpoints.checkpoint import Checkpoint
    from registry.home import Home
    from registry.log.metrics import Monitor

_RESERVED = ("rng", "extra", "ranks", "files")
"""Components that a run makes itself."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What a save is given.

    Attributes:
        live: objects, or lists of them, by component name.
        states: trees of plain values and tensors by component name, such as state dicts.
        kinds: the class of what has such a state, where it is known.
        extra: plain values and tensors of the user.
        rng: the random number generators, or those of each process; None for their present state.
        files: contents of small files by relative name, such as those of a tokenizer.

    Raises:
        Invalid: if there is nothing to save, or a name is one that a run uses itself or is given twice.
    """

    live: Mapping[str, Any]
    states: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] | None = None
    rng: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    files: Mapping[str, bytes] | None = None

    def __post_init__(self) -> None:
        for name in _RESERVED:
            if name in self.live or name in self.states:
                raise Invalid(f"{name!r} is not the name of a component of yours", "choose another")
        if not self.live and not self.states:
            raise Invalid("there is nothing to save", "name components, such as save(model=model)")
        for name in self.live:
            if name in self.states:
                raise Invalid(f"{name} is given as an object and as a state", "give one of them")
        for name, kind in self.kinds.items():
            if name.partition("/")[0] not in self.states or not isinstance(kind, str):
                raise Invalid(
                    f"kinds names {name}", "it gives the class of a state, as in kinds={'optimizer': 'AdamW'}"
                )
        for name, data in (self.files or {}).items():
            if not isinstance(name, str) or not isinstance(data, bytes):
                raise Invalid(
                    f"files gives {quoted(str(name))} a {type(data).__qualname__}, expected the bytes of a file by its name"
                )
        if self.rng is not None:
            for one in [self.rng] if isinstance(self.rng, Mapping) else self.rng:
                rng.check(one)


class Recording:
    """Collects what the next version of a run is saved with, from live objects and from what the user says of them.

    Args:
        home: the registry that the run saves into.
        model: the model that gets new versions.
        config: the hyperparameters, as `Registry.run` takes them.
        dataset: digest of the data, if it was named.
        builder: name under which the network is registered, if it is not found by its class.
        resumed: the checkpoint that training goes on from.
        plan: the transfer by which the network got its first parameters.
        monitor: what decides which version is the best.
        processes: how many processes train together.

    Attributes:
        values: the hyperparameters as plain values.

    Raises:
        Invalid: if the configuration has no plain values, or `dataset` is no digest.
    """

    def __init__(
        self,
        home: Home,
        model: str,
        *,
        config: Config | Mapping[str, Any] | Namespace | None,
        dataset: str | None,
        builder: str | None,
        resumed: Checkpoint | None,
        plan: TransferPlan | None,
        monitor: Monitor | None,
        processes: int,
    ) -> None:
        self._home = home
        self._model = model
        self._config = config
        self.values = config.to_dict() if isinstance(config, Config) else plain_table(config or {}, "config")
        if dataset is not None and not is_digest(dataset):
            raise Invalid(f"dataset is {quoted(dataset)}, expected a digest of 64 hex digits")
        self._dataset = dataset
        self._builder = builder
        self._resumed = resumed
        self._plan = plan
        self._monitor = monitor
        self._processes = processes
        self._started = time.monotonic()
        self._unmonitored: int | None = 0
        """How many saves lacked the monitored value; None once a save had it."""

    def log_config(self, logger: logging.Logger) -> None:
        """Put the hyperparameters into the log, one line each."""
        config = self._config if isinstance(self._config, Config) else Config()
        config.log(logger)
        if not isinstance(self._config, Config):
            for key, value in self.values.items():
                logger.info("# %s = %s", key, value)

    def session(self) -> dict[str, Any]:
        """What the log keeps of the run itself when it begins."""
        by = self._monitor
        found = {
            "config": self.values,
            **self._data(),
            **self._together(1),
            "resumed": self._resumed.id if self._resumed else None,
            "monitor": [by.metric, "min" if by.smallest else "max"] if by else None,
            **provenance.of_process(),
        }
        return _said(found)

    def fields(
        self, *, epoch: Any, step: Any, loss: Any, metrics: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The fields of a version, as `Facts` takes them; a tensor of one element becomes its number.

        Raises:
            Invalid: if `metrics` is no dict.
        """
        if not isinstance(metrics, Mapping | None):
            raise Invalid(f"metrics is a {type(metrics).__name__}, expected a dict of numbers by name")
        values = {key: _plain_number(value) for key, value in (metrics or {}).items()}
        loss = _plain_number(loss)
        loss = values.get("loss") if loss is None else loss
        self._look_for_monitored(loss, values)
        return {"epoch": epoch, "step": step, "loss": loss, "metrics": values}

    def own(self, saved: Saved) -> list[dict[str, Any]]:
        """This process's own part of the state, which differs between processes that train together.

        Returns:
            One, or one for each process where a single process saves for all of them.
        """
        captured = {
            name: components.capture(name, part)
            for name, part in saved.live.items()
            if any(getattr(one, "per_rank", False) for one in components.flat({name: part}).values())
        }
        given = saved.rng
        if given is None:
            return [{"rng": rng.capture(), **captured}]
        first, *others = [given] if isinstance(given, Mapping) else given
        return [{"rng": first, **captured}, *({"rng": other} for other in others)]

    def encoded(self, saved: Saved, own: Sequence[dict[str, Any]]) -> tuple[Encoded, dict[str, Any]]:
        """The state of live objects, ready to be written, and its provenance.

        Args:
            own: what `own` gave in each process.

        Raises:
            Unsupported: if something cannot be stored, naming it.
        """
        shared = {name: part for name, part in saved.live.items() if name not in own[0]}
        trees = {name: components.capture(name, part) for name, part in shared.items()}
        trees |= {**saved.states, **own[0]}
        if len(own) > 1:
            trees["ranks"] = {str(rank): part for rank, part in enumerate(own) if rank}
        if saved.extra:
            trees["extra"] = dict(saved.extra)
        if saved.files:
            trees["files"] = dict(saved.files)
        state = self._home.store.encode(trees)
        tensors = [leaf.source for leaf in state.leaves if isinstance(leaf.source, torch.Tensor)]
        return state, self.provenance_of(saved.live, tensors, kinds=saved.kinds, processes=len(own))

    def provenance_of(
        self,
        live: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        *,
        kinds: Mapping[str, str] | None = None,
        processes: int = 1,
    ) -> dict[str, Any]:
        """How a version was made, as plain values.

        Args:
            live: components by name.
            tensors: the tensors of these components; the kinds of their devices are recorded.
            kinds: classes of the components that were given as states.
            processes: how many of them have a part of their own in the version.
        """
        model = live.get("model")
        networks = {
            name: part for name, part in components.flat(live).items() if isinstance(part, torch.nn.Module)
        }
        going_on = {name: list(parts) for name, part in networks.items() if (parts := parts_going_on(part))}
        builder, network = builders.recorded(model) if model is not None else (None, None)
        if self._builder is not None:
            builder, network = self._builder, builders.config_of(model) if model is not None else None
        is_unrecorded = isinstance(model, torch.nn.Module) and network is None
        bases = [getattr(part, "adapter_of", None) for part in components.flat(live).values()]
        found = {
            "kinds": components.kinds_of(live) | dict(kinds or {}),
            "buffers": {
                name: [buffer for buffer, _ in components.plain_module(part).named_buffers()]
                for name, part in networks.items()
            },
            "frozen": {
                name: list(frozen) for name, part in networks.items() if (frozen := frozen_names(part))
            },
            "going_on": going_on,
            "builder": builder or self._model,
            "network": network,
            "unrecorded": builders.config_kind(model) if is_unrecorded else None,
            "lineage": [{"kind": "adapter-of", "parent": base} for base in bases if isinstance(base, str)],
            "config_digest": self._config.digest() if isinstance(self._config, Config) else None,
            **self._data(),
            **self._together(processes),
            "seconds": round(time.monotonic() - self._started, 3),
            "devices": provenance.devices(tensors),
            **provenance.of_process(),
        }
        return _said(found)

    def origin(self, about: Mapping[str, Any], *, run: str, last: Checkpoint | None) -> dict[str, Any]:
        """The fields of a version that say where it comes from, as `Facts` takes them.

        Args:
            about: its provenance, and under `lineage` the edges to what its components adapt.
            run: the name of the run.
            last: the version that the run saved before, if there is one.
        """
        before = last or self._resumed
        about = dict(about)
        lineage = list(about.pop("lineage", ()))
        if self._resumed and not last:
            lineage.append({"kind": "resumed-from", "parent": self._resumed.id})
        if self._plan and not last:
            lineage.append({"kind": "transferred-from", "parent": self._plan.source_id or self._plan.source})
            about["plan"] = plan_document(self._plan)
        return {
            "config": self.values or None,
            "lineage": lineage,
            "run": run,
            # A pending version has no name yet that others know.
            "parent": (before.row.record.get("parent") if before.row.is_pending else before.name)
            if before
            else None,
            "provenance": about,
        }

    def _look_for_monitored(self, loss: float | None, values: Mapping[str, float]) -> None:
        """Warn if the first two saves lack the monitored value; a single one may be in mid-epoch."""
        by = self._monitor
        if by is None or self._unmonitored is None:
            return
        if by.value(loss, values) is not None:
            self._unmonitored = None
            return
        self._unmonitored += 1
        if self._unmonitored == 2:
            there = [*(["loss"] if loss is not None else []), *values]
            _logger.warning(
                "monitor=%r: no save has this metric (this one has %s); "
                "until one has it, there is no best version, and keep_best removes nothing",
                by.metric,
                ", ".join(map(quoted, there)) or "none",
            )

    def _together(self, processes: int) -> dict[str, Any]:
        found = max(self._processes, processes)
        return {"processes": found} if found > 1 else {}

    def _data(self) -> dict[str, Any]:
        """The named data set, or else the artifacts that the program has used; a single one counts as the data set."""
        if self._dataset:
            return {"dataset": self._dataset}
        used = used_artifacts(self._home.root)
        return {"dataset": used[0] if len(used) == 1 else None, "artifacts": used}


def _plain_number(value: Any) -> Any:
    """A tensor of one element as its number; `Facts.record` checks everything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value


def _said(found: Mapping[str, Any]) -> dict[str, Any]:
    """The items that have a value."""
    return {key: value for key, value in found.items() if value not in (None, {}, [])}
