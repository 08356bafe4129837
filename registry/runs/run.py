"""A run: one training session with its log file, TensorBoard events, provenance and checkpoints.

Processes that train together each have a `Run`. The leading one writes; all get the same result, or the same error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from registry.catalog.runs import INNER, LOG, PROCESS, Runs
from registry.catalog.versions import by_id
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.configs.config import Config
from registry.live import ranks
from registry.log.reference import check_name
from registry.remote.bucket import Unreachable
from registry.reports.notebook import Part, bundle, sentence
from registry.runs.logs import run_log
from registry.runs.process import Mute, ending, sigterm_as_exit, this_process
from registry.runs.recording import Recording, Saved
from registry.runs.session import Session
from registry.store.durable import make_folder, unlink, write_file
from registry.store.errors import Conflict, Invalid, RegistryError, storage_errors
from registry.store.pausing import collector_off
from registry.store.saving import Arena, Encoded
from registry.store.text import printable
from registry.transfer.plan import TransferPlan
from registry.upkeep.compaction import compact
from registry.upkeep.garbage import collect_garbage
from registry.upkeep.outbox import Outbox
from registry.upkeep.retention import Retention

if TYPE_CHECKING:
    from argparse import Namespace

    from torch.utils.tensorboard import SummaryWriter

    from registry.catalog.versions import Version
    from registry.checkpoints.sharded_writer import RegistryWriter
    from registry.home import Home

_logger = logging.getLogger(__name__)


class Run:
    """One training session, as a context; made by `Registry.run`.

    While it is open, what the program logs goes to its log file too, and SIGTERM ends the program only after the
    save that is in flight. Leaving the context waits for that save, and records how the run ended.

    Processes that train together (`torchrun`) make the run together, and call `save` and `wait` together. The
    leading one writes checkpoints, events and the log; `writer` does nothing in the others.

    Attributes:
        name: the full name, such as `lenet5/run-12`.
        model: the model that gets new versions.
        resumed: the checkpoint that training goes on from, if there is one.
        folder: where the log file and the events are.
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
        together: bool,
    ) -> None:
        self._home = home
        self._runs = Runs(home.catalog, home.root)
        self.model = check_name(model, "model")
        self.resumed = resumed
        self._compact = compact
        self._recording = Recording(
            home,
            model,
            config=config,
            dataset=dataset,
            builder=builder,
            resumed=resumed,
            plan=plan,
            monitor=retention.monitor,
            processes=ranks.count() if together else 1,
        )
        if name is not None:
            check_name(name, "run")
        self._arena: Arena | None = None
        self._saver = ThreadPoolExecutor(1, "registry-save")
        self._in_flight: Future[Checkpoint] | None = None
        self._last: Checkpoint | None = None
        self._writer: SummaryWriter | None = None
        self._open = contextlib.ExitStack()
        self._pid = os.getpid()
        self._stalled = 0.0
        self._state = "running"
        self._ranks = ranks.Ranks(timeout, together=together)
        about = self._recording.session()
        try:
            self.name = self._ranks.leader(
                lambda: self._runs.begin(self.model, name, about), f"a run of {self.model}"
            )
        except BaseException:
            self._ranks.close()
            raise
        self._session = Session(self.name, model, retention)
        self._has_sharded = False
        self.folder = home.root / "runs" / self.name

    @property
    def registry(self) -> Home:
        """The registry that the run saves into."""
        return self._home

    @property
    def log_file(self) -> Path:
        """The file with what the program logged while the run was open."""
        return self.folder / LOG

    @property
    def saved(self) -> Checkpoint | None:
        """The run's last checkpoint that is stored, without waiting for the one in flight; see `wait`.

        Only the leading process of several knows it at once.
        """
        flying = self._in_flight
        if flying is not None and flying.done() and flying.exception() is None:
            return flying.result()
        return self._last

    @property
    def seconds_saving(self) -> float:
        """How long the program has waited in `save` and `wait`, in seconds."""
        return self._stalled

    @property
    def writer(self) -> SummaryWriter:
        """The `SummaryWriter` of torch, on the run's folder; scalars go to `scalars.jsonl`, too."""
        if self._writer is None:
            if not self._ranks.leads:
                return cast("SummaryWriter", Mute())
            # Lazy: loads torch.utils.tensorboard.
            from registry.runs.writer import RunWriter

            make_folder(self.folder, inner=INNER)
            self._writer = RunWriter(self.folder)
        return self._writer

    def __repr__(self) -> str:
        # One that could not begin has no name.
        name = getattr(self, "name", self.model)
        saved = f", saved {self.saved.name}" if self.saved else ""
        return printable(f"<Run {name}: {self._state}{saved}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[Part]:
        yield from self._runs[self.name].parts()
        if self.saved is not None:
            yield sentence(f"saved {self.saved.name} last")

    def __enter__(self) -> Self:
        with storage_errors(self.folder), contextlib.ExitStack() as stack:
            if self._ranks.leads:
                make_folder(self.folder, inner=INNER)
                tmp = self._home.root / "tmp"
                write_file(self.folder / PROCESS, this_process().encode(), folder=tmp, inner=INNER)
                stack.enter_context(run_log(self.log_file, inner=INNER))
            stack.enter_context(sigterm_as_exit())
            self._open = stack.pop_all()
        if self._ranks.leads:
            self._introduce()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            # A child that was forked inside the block leaves it; the run is its parent's.
            return
        try:
            if error is None:
                self.wait()
            elif self._in_flight is not None and self._ranks.leads:
                # The other processes may not be here any more.
                self._in_flight.result()
        except RegistryError as failed:
            if error is None:
                error = failed
                raise
            _logger.error("the last save failed: %s", failed)
        finally:
            state = self._state = "finished" if error is None else ending(error)
            if self._ranks.leads:
                _logger.info("run %s %s", self.name, state)
            if self._writer is not None:
                self._writer.close()
            # The thread that saves has a connection of its own. When the interpreter ends, it is gone by now.
            with contextlib.suppress(RuntimeError):
                self._saver.submit(self._home.catalog.close)
            self._saver.shutdown()
            if self._ranks.leads:
                unlink(self.folder / PROCESS, inner=INNER)
                try:
                    self._runs.end(self.name, state)
                except Unreachable as failed:
                    _logger.warning("%s; the registry does not know that run %s %s", failed, self.name, state)
            self._ranks.close()
            if self._compact and self._ranks.leads and error is None:
                _store_differences(self._home, self.model)
            self._open.close()

    def save(
        self,
        *,
        epoch: int | None = None,
        step: int | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        states: Mapping[str, Any] | None = None,
        kinds: Mapping[str, str] | None = None,
        rng: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        files: Mapping[str, bytes] | None = None,
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
            states: components as states in hand instead of live objects, such as `{"model": net.state_dict()}`.
            kinds: the class of what has such a state, as in `{"optimizer": "AdamW"}`; `restore` compares it.
            rng: random numbers of another moment, as `registry.live.rng.capture()` gave them. With `together=False`
                a list has those of each process.
            files: contents of files by relative name, such as those of a tokenizer, to be kept byte for byte.
            wait: return when the version is durable. Otherwise return as soon as the state is copied to host
                memory; hashing and writing go on behind the training, at most one save at a time. A CUDA device copies on
                its current stream, behind the work that it has and ahead of what it gets later, and is not waited for. Other
                streams of yours must wait for that one before they change what is saved.
            live: components by name: anything with `state_dict()` and `load_state_dict()`, such as
                `model=model, optimizer=optimizer, ema=ema`, and lists of such objects. Each of several processes records its own random
                state, and its own state of components whose attribute `per_rank` is true. Everything else comes
                from the leading process.

        Returns:
            The checkpoint, in each process; None with `wait=False`.

        Raises:
            Invalid, Unsupported: if something cannot be recorded, naming it; nothing is written.
            StorageError: if the disk refuses this save, or the one before that did not wait.
            Conflict: if one of several processes does not come to the save in time, naming it.
        """
        began = time.monotonic()
        try:
            self.wait()
            fields = {"epoch": epoch, "step": step, "loss": loss, "metrics": metrics}
            saved = Saved(
                live=live, states=states or {}, kinds=kinds or {}, extra=extra, rng=rng, files=files
            )
            return self._save(fields, saved, wait=wait)
        finally:
            self._stalled += time.monotonic() - began

    def wait(self) -> Checkpoint | None:
        """Wait for the save that is in flight, and return the last checkpoint of the run.

        Raises:
            RegistryError: if that save failed; only the first call raises it.
            Conflict: in a process that was forked since the run began; likewise `save`.
        """
        self._check_process()
        if self._in_flight is not None:
            pending, self._in_flight = self._in_flight, None
            self._last = self._everywhere(pending.result, f"{self.name}: the save before")
        return self._last

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
        # Lazy: loads torch.distributed.checkpoint.
        from registry.checkpoints.sharded_writer import RegistryWriter

        fields = self._recording.fields(epoch=epoch, step=step, loss=loss, metrics=metrics)
        tensors = list(network.parameters()) if network is not None else []
        about = self._recording.provenance_of({"model": network} if network is not None else {}, tensors)

        def saved(checkpoint: Checkpoint) -> None:
            self._last = checkpoint

        self._has_sharded = True
        return RegistryWriter(
            self._home,
            self.model,
            saved=saved,
            best_by=self._session.retention.monitor,
            session=self._session,
            **fields,
            **self._recording.origin(about, run=self.name, last=None),
        )

    def _check_process(self) -> None:
        """Refuse to save in a process that was forked since the run began."""
        if os.getpid() != self._pid:
            raise Conflict(
                f"{self.name} is the run of process {self._pid}, which forked this one",
                "save there, or begin a run here",
            )

    def _introduce(self) -> None:
        _logger.info("run %s began", self.name)
        self._recording.log_config(_logger)
        if self.resumed:
            _logger.info("resumed from %s", self.resumed.name)

    def _save(self, given: Mapping[str, Any], saved: Saved, *, wait: bool) -> Checkpoint | None:
        recording = self._recording
        fields = recording.fields(**given)
        what = f"{self.name}: a save"
        own = self._own(saved, what)
        if wait:
            self._last = self._everywhere(lambda: self._publish(*recording.encoded(saved, own), fields), what)
            return self._last

        def begin() -> None:
            with collector_off():
                copied, about = self._copied(saved, own)
            # Freeing tensors waits for a thread that is at work, so they are freed before one is.
            own.clear()
            self._in_flight = self._saver.submit(self._publish, copied, about, fields)

        # In the processes that do not lead, this stands for the save of the leading one.
        self._in_flight = Future()
        try:
            self._ranks.leader(begin, what)
        except BaseException:
            self._in_flight = None
            raise
        return None

    def _copied(self, saved: Saved, own: Sequence[dict[str, Any]]) -> tuple[Encoded, dict[str, Any]]:
        """The state of live objects, copied to host memory, and its provenance."""
        if self._arena is None:
            self._arena = Arena()
        state, about = self._recording.encoded(saved, own)
        return self._arena.snapshot(state), about

    def _own(self, saved: Saved, what: str) -> list[dict[str, Any]]:
        """The parts of a state that differ between processes, by rank."""
        if self._ranks.count == 1:
            return self._recording.own(saved)
        if saved.rng is not None and not isinstance(saved.rng, Mapping):
            raise Invalid(
                "rng is a list, but each process saves its own", "give one state, or run(..., together=False)"
            )
        return self._ranks.gather(lambda: self._recording.own(saved)[0], what)

    def _everywhere(self, step: Callable[[], Checkpoint], what: str) -> Checkpoint:
        """The checkpoint that the leading process has made, in each process."""
        if self._ranks.count == 1:
            return step()

        def row() -> Version:
            made = step().row
            return made._replace(metrics=dict(made.metrics))

        return Checkpoint(self._home.store, self._ranks.leader(row, what), self._home.catalog)

    def _publish(self, state: Encoded, about: Mapping[str, Any], fields: Mapping[str, Any]) -> Checkpoint:
        if self._last is not None and self._last.row.is_pending:
            Outbox(self._home).share_if_possible()
            if shared := by_id(self._home.catalog, self._last.id):
                self._last = Checkpoint(self._home.store, shared, self._home.catalog)
        origin = self._recording.origin(about, run=self.name, last=self._last)
        if self._has_sharded:
            # Another process may have published the last version.
            origin = self._session.origin(self._home, origin)
        described = Facts(**fields, **origin)
        best_by = self._session.retention.monitor
        saved = save(self._home, self.model, state, about=described, best_by=best_by)
        self._session.retain(self._home, Outbox(self._home).home if saved.row.is_pending else self._home)
        return saved


def _store_differences(home: Home, model: str) -> None:
    """Compact a model and free the space; a failure is only logged, as the run has finished well."""
    try:
        (done,) = compact(home.catalog, home.store, [model])
        collect_garbage(home.catalog, home.store)
    except RegistryError as failed:
        # Every version is as it was.
        _logger.warning("%s was not compacted: %s", model, failed)
    else:
        if done.problem:
            _logger.warning("%s was compacted only in part: %s", model, done.problem)
        _logger.info("compacted %d versions: %d bytes became %d", done.versions, done.before, done.after)
