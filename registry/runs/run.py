"""A run: one training session with its log file, TensorBoard events, provenance and checkpoints.

Where several processes train together, each has the run; the leading one writes, and all agree on how it went.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch

from registry.cache.decorator import used_artifacts
from registry.catalog.runs import INNER, LOG, PROCESS, Runs
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.configs.config import Config
from registry.configs.plain import plain_table
from registry.live import builders, components, rng
from registry.live.freezing import frozen_names, parts_going_on
from registry.live.ranks import Ranks
from registry.log.reference import check_name
from registry.runs import provenance
from registry.runs.logs import run_log
from registry.store.digest import is_digest
from registry.store.durable import host, make_folder, unlink, write_file
from registry.store.errors import Invalid, RegistryError, storage_errors
from registry.store.saving import Arena, Encoded
from registry.store.text import quoted
from registry.transfer.plan import TransferPlan, plan_document
from registry.upkeep.compaction import compact
from registry.upkeep.garbage import collect_garbage
from registry.upkeep.retention import Retention

if TYPE_CHECKING:
    from argparse import Namespace

    from torch.utils.tensorboard import SummaryWriter

    from registry.catalog.versions import Version
    from registry.checkpoints.sharded import RegistryWriter
    from registry.home import Home

_RESERVED = ("rng", "extra", "ranks")

_logger = logging.getLogger(__name__)


class Run:
    """One training session, as a context; made by `Registry.run`.

    While it is open, what the program logs goes to its log file too, and SIGTERM ends the program only after the
    save that is in flight. Leaving the context waits for that save, and records how the run ended.

    Processes that train together (`torchrun`) make the run together, and call `save` and `wait` together. The
    leading one writes checkpoints, events and the log; what `writer` is told on the others goes nowhere.
    """

    def __init__(
        self,
        home: Home,
        model: str,
        *,
        config: Config | Mapping[str, Any] | Namespace | None,
        name: str | None,
        dataset: str | None,
        builder: str | None,
        resumed: Checkpoint | None,
        plan: TransferPlan | None,
        retention: Retention,
        compact: bool,
        timeout: float,
    ) -> None:
        self._home = home
        self._runs = Runs(home.catalog, home.root)
        self.model = check_name(model, "model")
        self.resumed = resumed
        self._plan = plan
        self._config = config
        self._values = config.to_dict() if isinstance(config, Config) else plain_table(config or {}, "config")
        self._builder = builder
        self._retention = retention
        self._compact = compact
        if name is not None:
            check_name(name, "run")
        if dataset is not None and not is_digest(dataset):
            raise Invalid(f"dataset is {quoted(dataset)}, expected a digest of 64 hex digits")
        self._dataset = dataset
        self._arena: Arena | None = None
        self._saver = ThreadPoolExecutor(1, "registry-save")
        self._in_flight: Future[Checkpoint] | None = None
        self._last: Checkpoint | None = None
        self._writer: SummaryWriter | None = None
        self._open = contextlib.ExitStack()
        self._started = time.monotonic()
        self._pid = os.getpid()
        self._stalled = 0.0
        self._unmonitored: int | None = 0
        """Saves without the value that is monitored; None once one had it."""
        self._ranks = Ranks(timeout)
        about = {
            "config": self._values,
            **self._data(),
            **self._together(),
            "resumed": resumed.id if resumed else None,
            **provenance.of_process(),
        }
        self._about = {key: value for key, value in about.items() if value not in (None, {}, [])}
        try:
            self.name = self._ranks.leader(
                lambda: self._runs.begin(self.model, name, self._about), f"a run of {self.model}"
            )
        except BaseException:
            self._ranks.close()
            raise
        self.folder = home.root / "runs" / self.name

    @property
    def registry(self) -> Home:
        """The registry that the run saves into."""
        return self._home

    @property
    def log_file(self) -> Path:
        """What the program logged while the run was open."""
        return self.folder / LOG

    @property
    def seconds_saving(self) -> float:
        """How long the program has waited in `save` and `wait`, in seconds."""
        return self._stalled

    @property
    def writer(self) -> SummaryWriter:
        """TensorBoard's own writer, on the run's folder."""
        if self._writer is None:
            if not self._ranks.leads:
                return cast("SummaryWriter", _Mute())
            from torch.utils.tensorboard import SummaryWriter

            make_folder(self.folder, inner=INNER)
            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def __repr__(self) -> str:
        return f"Run({self.name})"

    # -- the context -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with storage_errors(self.folder), contextlib.ExitStack() as stack:
            if self._ranks.leads:
                make_folder(self.folder, inner=INNER)
                tmp = self._home.root / "tmp"
                write_file(self.folder / PROCESS, _this_process().encode(), folder=tmp, inner=INNER)
                stack.enter_context(run_log(self.log_file, inner=INNER))
            stack.enter_context(_sigterm_as_exit())
            self._open = stack.pop_all()
        if self._ranks.leads:
            self._introduce()
        return self

    def _introduce(self) -> None:
        _logger.info("run %s began", self.name)
        config = self._config if isinstance(self._config, Config) else Config()
        config.log(_logger)
        if not isinstance(self._config, Config):
            for key, value in self._values.items():
                _logger.info("# %s = %s", key, value)
        if self.resumed:
            _logger.info("resumed from %s", self.resumed.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return  # A child that was forked inside the block leaves it; the run is its parent's.
        try:
            if error is None:
                self.wait()
            elif self._in_flight is not None and self._ranks.leads:  # the others may not be here any more
                self._in_flight.result()
        except RegistryError as failed:
            if error is None:
                error = failed
                raise
            _logger.error("the last save failed: %s", failed)
        finally:
            state = "finished" if error is None else _ending(error)
            if self._ranks.leads:
                _logger.info("run %s %s", self.name, state)
            if self._writer is not None:
                self._writer.close()
            self._saver.submit(self._home.catalog.close)  # its own connection
            self._saver.shutdown()
            if self._ranks.leads:
                unlink(self.folder / PROCESS, inner=INNER)
                self._runs.end(self.name, state)
            self._ranks.close()
            if self._compact and self._ranks.leads and error is None:
                self._store_differences()
            self._open.close()

    def _store_differences(self) -> None:
        try:
            (done,) = compact(self._home.catalog, self._home.store, [self.model])
            collect_garbage(self._home.catalog, self._home.store)
        except RegistryError as failed:  # every version is as it was
            _logger.warning("%s was not compacted: %s", self.model, failed)
        else:
            if done.problem:
                _logger.warning("%s was not compacted wholly: %s", self.model, done.problem)
            _logger.info("compacted %d versions: %d bytes became %d", done.versions, done.before, done.after)

    # -- saving ----------------------------------------------------------------------------------------------

    def save(
        self,
        *,
        epoch: int | None = None,
        step: int | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        wait: bool = True,
        **live: Any,
    ) -> Checkpoint | None:
        """Record the state of live objects as the next version of the run's model.

        What is recorded is the state at the time of the call; training on never changes it. The state of the
        random number generators is recorded with it.

        Args:
            epoch: epochs that are complete, from 0 or 1 on as your loop counts; likewise `step`.
            loss, metrics: plain numbers, or tensors of one element. NaN is recorded and never counts as best.
            extra: plain values and tensors of yours.
            wait: return when the version is durable. Otherwise return as soon as the state is copied to host
                memory; hashing and writing go on behind the training, at most one save at a time.
            live: components by name: anything with `state_dict()` and `load_state_dict()`, such as
                `model=model, optimizer=optimizer, ema=ema`. Of several processes each records its own random
                state, and its own state of components with a true attribute `per_rank`; everything else is the
                leading one's.

        Returns:
            The checkpoint, in each process; None with `wait=False`.

        Raises:
            Invalid, Unsupported: if something cannot be recorded, naming it; nothing is written.
            StorageError: if the disk refuses, also for the save before that did not wait.
            Conflict: if one of several processes does not come to the save in time, naming it.
        """
        began = time.monotonic()
        try:
            self.wait()
            return self._save(epoch, step, loss, metrics, extra, wait, live)
        finally:
            self._stalled += time.monotonic() - began

    def wait(self) -> Checkpoint | None:
        """Wait for the save that is in flight, and return the last checkpoint of the run.

        Raises:
            RegistryError: if that save failed; once.
        """
        if self._in_flight is not None:
            pending, self._in_flight = self._in_flight, None
            self._last = self._everywhere(pending.result, f"{self.name}: the save before")
        return self._last

    def _save(
        self,
        epoch: int | None,
        step: int | None,
        loss: Any,
        metrics: Mapping[str, Any] | None,
        extra: Mapping[str, Any] | None,
        wait: bool,
        live: Mapping[str, Any],
    ) -> Checkpoint | None:
        for name in _RESERVED:
            if name in live:
                raise Invalid(f"{name!r} is not the name of a component of yours; choose another")
        if not live:
            raise Invalid("there is nothing to save; name components, such as save(model=model)")
        fields = self._fields(epoch, step, loss, metrics)
        what = f"{self.name}: a save"
        own = self._ranks.gather(lambda: self._own(live), what)
        if wait:
            self._last = self._everywhere(
                lambda: self._publish(*self._encoded(live, own, extra), fields), what
            )
            return self._last

        def begin() -> None:
            if self._arena is None:
                self._arena = Arena()
            state, about = self._encoded(live, own, extra)
            copied = self._arena.snapshot(state)
            self._in_flight = self._saver.submit(self._publish, copied, about, fields)

        self._in_flight = Future()  # of the leading process
        try:
            self._ranks.leader(begin, what)
        except BaseException:
            self._in_flight = None
            raise
        return None

    def _fields(self, epoch: Any, step: Any, loss: Any, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        if not isinstance(metrics, Mapping | None):
            raise Invalid(f"metrics is a {type(metrics).__name__}, expected a dict of numbers by name")
        values = {key: _plain_number(value, f"metric {key}") for key, value in (metrics or {}).items()}
        loss = _plain_number(loss, "loss")
        loss = values.get("loss") if loss is None else loss
        self._look_for_monitored(loss, values)
        return {"epoch": epoch, "step": step, "loss": loss, "metrics": values}

    def _look_for_monitored(self, loss: float | None, values: Mapping[str, float]) -> None:
        """Say once if saves do not have what decides which version is the best; one alone may be in mid-epoch."""
        by = self._retention.monitor
        if by is None or self._unmonitored is None:
            return
        if (loss if by.metric == "loss" else values.get(by.metric)) is not None:
            self._unmonitored = None
            return
        self._unmonitored += 1
        if self._unmonitored == 2:
            there = [*(["loss"] if loss is not None else []), *values]
            _logger.warning(
                "monitor=%r: no save has had such a value (this one has %s); until one has, there is no best version, and "
                "keep_best removes nothing",
                *(by.metric, ", ".join(map(quoted, there)) or "none"),
            )

    def _own(self, live: Mapping[str, Any]) -> dict[str, Any]:
        """What differs between the processes of a training."""
        parts = {name: part for name, part in live.items() if getattr(part, "per_rank", False)}
        captured = {name: components.capture(name, part) for name, part in parts.items()}
        return {"rng": rng.capture(), **captured}

    def _encoded(
        self, live: Mapping[str, Any], own: Sequence[dict[str, Any]], extra: Mapping[str, Any] | None
    ) -> tuple[Encoded, dict[str, Any]]:
        shared = {name: part for name, part in live.items() if name not in own[0]}
        trees = {name: components.capture(name, part) for name, part in shared.items()} | own[0]
        if len(own) > 1:
            trees["ranks"] = {str(rank): part for rank, part in enumerate(own) if rank}
        if extra:
            trees["extra"] = dict(extra)
        state = self._home.store.encode(trees)
        tensors = [leaf.source for leaf in state.leaves if isinstance(leaf.source, torch.Tensor)]
        return state, self._record(live, tensors)

    def _everywhere(self, step: Callable[[], Checkpoint], what: str) -> Checkpoint:
        """The checkpoint that the leading process has made, in each process."""
        if self._ranks.count == 1:
            return step()

        def row() -> Version:
            made = step().row
            return made._replace(metrics=dict(made.metrics))

        return Checkpoint(self._home.store, self._ranks.leader(row, what))

    def _together(self) -> dict[str, Any]:
        return {"processes": self._ranks.count} if self._ranks.count > 1 else {}

    def _record(self, live: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        model = live.get("model")
        builder = self._builder or (builders.name_for(model) if model is not None else None)
        network = builders.config_of(model) if model is not None else None
        is_unrecorded = model is not None and network is None
        found = {
            "kinds": {name: components.kind_of(component) for name, component in live.items()},
            "buffers": {
                name: [buffer for buffer, _ in components.plain_module(component).named_buffers()]
                for name, component in live.items()
                if isinstance(component, torch.nn.Module)
            },
            "frozen": {
                name: list(frozen)
                for name, component in live.items()
                if isinstance(component, torch.nn.Module) and (frozen := frozen_names(component))
            },
            "going_on": {
                name: list(parts)
                for name, component in live.items()
                if isinstance(component, torch.nn.Module) and (parts := parts_going_on(component))
            }
            or None,
            "builder": builder or self.model,
            "network": network,
            "unrecorded": builders.config_kind(model) if is_unrecorded else None,
            "config_digest": self._config.digest() if isinstance(self._config, Config) else None,
            **self._data(),
            **self._together(),
            "seconds": round(time.monotonic() - self._started, 3),
            "devices": provenance.devices(tensors),
            **provenance.of_process(),
        }
        return {key: value for key, value in found.items() if value not in (None, {}, [])}

    def _data(self) -> dict[str, Any]:
        """The data set that was named, or else the artifacts that the program has used; the only one is the data set."""
        if self._dataset:
            return {"dataset": self._dataset}
        used = used_artifacts(self._home.root)
        return {"dataset": used[0] if len(used) == 1 else None, "artifacts": used}

    def _publish(self, state: Encoded, about: Mapping[str, Any], fields: Mapping[str, Any]) -> Checkpoint:
        described = Facts(**fields, **self._origin(about))
        saved = save(self._home, self.model, state, described, best_by=self._retention.monitor)
        self._retain()
        return saved

    def _retain(self) -> None:
        """Remove, and thin, what the run's rules no longer keep."""
        chain = self._runs.chain(self.name)
        self._retention.apply(self._home.catalog, self._home.store, chain, self.model)

    def _origin(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What the next version records of where it comes from."""
        before = self._last or self.resumed
        lineage = []
        if self.resumed and not self._last:
            lineage.append({"kind": "resumed-from", "parent": self.resumed.id})
        if self._plan and not self._last:
            lineage.append({"kind": "transferred-from", "parent": self._plan.source_id or self._plan.source})
            about = {**about, "plan": plan_document(self._plan)}
        return {
            "config": self._values or None,
            "lineage": lineage,
            "run": self.name,
            "parent": before.name if before else None,
            "provenance": about,
        }

    def sharded(
        self,
        *,
        epoch: int | None = None,
        step: int | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        network: torch.nn.Module | None = None,
    ) -> RegistryWriter:
        """A writer for `dcp.save`, by which each process saves its part of the run's next version.

            dcp.save({"model": ..., "optimizer": ...}, storage_writer=run.sharded(epoch=1, loss=0.4))

        Args:
            epoch, step, loss, metrics: as for `save`.
            network: lets `Registry.build` find the builder and the configuration.
        """
        from registry.checkpoints.sharded import RegistryWriter

        fields = self._fields(epoch, step, loss, metrics)
        tensors = list(network.parameters()) if network is not None else []
        about = self._record({"model": network} if network is not None else {}, tensors)

        def saved(checkpoint: Checkpoint) -> None:
            self._last = checkpoint
            self._retain()

        best_by = self._retention.monitor
        origin = self._origin(about)
        return RegistryWriter(self._home, self.model, saved=saved, best_by=best_by, **fields, **origin)


class _Mute:
    """Stands in for a `SummaryWriter` where nothing is to be written: takes everything, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _plain_number(value: Any, what: str) -> Any:
    """A tensor of one element as its number; `Registry.save` checks the rest."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value


def _ending(error: BaseException) -> Literal["interrupted"] | str:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted"
    return f"failed: {type(error).__name__}"


def _this_process() -> str:
    return f"{host()} {os.getpid()}\n"


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that contexts are left, unless the program handles it itself."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
