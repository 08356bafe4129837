"""Lightning: a `Trainer` that saves versions in the place of files, and resumes exactly.

    from registry.integrations.lightning import RegistryCheckpoint

    kept = RegistryCheckpoint("lenet5", monitor="val/loss")
    trainer = Trainer(**kept.for_trainer(max_epochs=10))
    trainer.fit(net, loader, ckpt_path=kept.latest)

Lightning asks its file system for checkpoints: it lists folders and compares times. So where it expects a file lies a
pointer, a small file with the id of the version. A reference such as `lenet5@best` goes wherever a path goes.

`RegistryCheckpoint` is a callback and has two other parts, a `CheckpointIO` and a `Logger`. They are objects of their own
because Lightning calls methods of the same name on each, with other arguments.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.layouts import LIGHTNING, LIGHTNING_LISTS
from registry.integrations import check_release, pointers
from registry.integrations.lightning_loaders import Positions
from registry.integrations.lightning_states import (
    dict_of,
    is_live,
    is_same,
    items_of,
    with_paths,
    without_paths,
)
from registry.integrations.options import check_options, registry_of
from registry.integrations.storing import recordable, storable
from registry.live import components, ranks, rng
from registry.live.gradients import Gradients
from registry.log.metrics import is_metric
from registry.log.reference import check_name
from registry.registry import Registry
from registry.remote.bucket import Unreachable
from registry.runs.process import Mute
from registry.runs.run import Run
from registry.runs.session import Session
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound, Unsupported, naming
from registry.upkeep.retention import Retention

check_release("lightning")

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO  # noqa: E402
from lightning.fabric.utilities.rank_zero import rank_zero_only  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.strategies import (  # noqa: E402
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402
from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: E402

_logger = logging.getLogger(__name__)

_OWN = "torch-registry"
"""The key under which a checkpoint dict of Lightning has what this module adds to it, until it is saved."""

_PASSING = (".lr_find_", ".scale_batch_size_")
"""What the names of files begin with that a `Tuner` writes, reads back and removes; they are no checkpoints."""

_RULES = ("monitor", "mode", "keep_last", "keep_best", "keep_optimizer")


@dataclass
class _Moment:
    """A save, and what tells whether the next one is of the same moment.

    Attributes:
        saved: the version.
        checkpoint: step, epoch and loops of the dict that it was made of, and its random numbers.
    """

    saved: Checkpoint
    checkpoint: Mapping[str, Any]


class RegistryCheckpoint(Callback):  # type: ignore[misc]
    """Saves the checkpoints of a `Trainer` into a registry, and lets a training that was killed go on exactly.

        kept = RegistryCheckpoint("lenet5", monitor="val/loss", keep_last=3, keep_best=1)
        trainer = Trainer(**kept.for_trainer(max_epochs=10))

    A `fit` is a run of the registry: it has a log, TensorBoard events, an end, and the rules of what stays. What is
    logged by `self.log` in the first process goes to the events. A `ModelCheckpoint` decides when to save, and what it
    removes is removed from the registry, unless an alias, a tag, a descendant or another pointer holds it. Saved are the
    network, optimizers, schedulers, the position of loops and loaders, what callbacks keep, and the random numbers of
    each process.

    To resume inside an epoch, wrap the `DataLoader`: `ResumableLoader(loader)`.

    Args:
        model: the model that gets new versions.
        registry: the registry that gets them; the default one unless given.
        options: what `Registry.run` takes, such as `monitor`, `mode`, `keep_last`, `keep_best`, `config`. Without
            `monitor` it is that of the trainer's `ModelCheckpoint`; without `config` the module's `hparams`.

    Raises:
        Invalid: if an option is none of a run, or a name or a rule is malformed.
    """

    def __init__(self, model: str, registry: Registry | None = None, **options: Any) -> None:
        self.model = check_name(model, "model")
        self.registry = registry_of(registry)
        check_options(options, own=frozenset({"model", "resume", "together"}))
        if options.get("monitor"):
            Retention.of(**{rule: options.get(rule) for rule in _RULES})
        self._options = options
        self._io = _RegistryIO(self)
        self._log = _RegistryLogger(self)
        self._trainer: Trainer | None = None
        self._ranks: ranks.Ranks | None = None
        self._run: Run | None = None
        self._session: Session | None = None
        self._is_open = False
        self._error: BaseException | None = None
        self._loaded: Checkpoint | None = None
        self._moment: _Moment | None = None
        self._pointers = pointers.Pointers(self.registry)
        self._positions: Positions | None = None

    @property
    def run(self) -> Run | None:
        """The run of the present or the last `fit`, in the process that saves; None before it and in others."""
        return self._run

    @property
    def latest(self) -> str | None:
        """The reference to the model's newest version, for `ckpt_path`; None where there is none, to begin anew."""
        reference = f"{self.model}@latest"
        return reference if reference in self.registry else None

    def for_trainer(self, **settings: Any) -> dict[str, Any]:
        """The arguments of a `Trainer`: yours, with the parts of this object added to callbacks, plugins and loggers.

        Without a `ModelCheckpoint` of yours, one is added that saves at the end of each epoch and removes nothing; what
        stays is then a matter of `keep_last` and `keep_best`.

        Raises:
            Invalid: if there is a `RegistryCheckpoint` among your callbacks, or `barebones=True` among your settings.
        """
        if settings.get("barebones"):
            raise Invalid(
                "barebones=True measures speed without checkpoints and logs, so nothing would be saved",
                "leave it out, or make that Trainer without for_trainer()",
            )
        callbacks, plugins = _listed(settings.get("callbacks")), _listed(settings.get("plugins"))
        if any(isinstance(one, RegistryCheckpoint) for one in callbacks):
            raise Invalid("the callbacks have a RegistryCheckpoint already; a Trainer takes one")
        if settings.get("enable_checkpointing") is not False and not any(
            isinstance(one, ModelCheckpoint) for one in callbacks
        ):
            callbacks.append(ModelCheckpoint(save_top_k=-1))
        found = {**settings, "callbacks": [self, *callbacks], "plugins": [*plugins, self._io]}
        logger = settings.get("logger")
        if logger is not False:
            found["logger"] = [self._log, *_listed(None if logger is True else logger)]
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training starts, what could not be saved.

        Raises:
            Unsupported: for strategies that shard the network over processes.
            Invalid: if the trainer lacks the other parts of this object.
            Conflict: if another trainer is in training with this object.
        """
        kind = type(trainer.strategy).__name__
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise Unsupported(
                f"{kind} shards the network over processes, which RegistryCheckpoint cannot save",
                "use strategy='ddp', "
                "or save each part with dcp.save(state, storage_writer=run.sharded(...)), see docs/distributed.md",
            )
        if trainer.strategy.checkpoint_io is not self._io:
            raise Invalid(
                "the trainer lacks parts of RegistryCheckpoint", "make it with Trainer(**kept.for_trainer())"
            )
        if self._is_open and trainer is not self._trainer:
            raise Conflict(
                f"this RegistryCheckpoint is in use by another Trainer, whose run is {self._run and self._run.name}",
                "make one each",
            )
        self._trainer = trainer
        self._loaded = self._moment = self._positions = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers are those whose states were loaded.

        Raises:
            Incompatible: saying what differs.
        """
        if self._loaded is None:
            return
        checkpoint = self._loaded
        live = trainer.optimizers
        name, states = items_of(checkpoint, "optimizer")
        with naming(checkpoint.name):
            if len(live) != len(states):
                raise Incompatible(f"the module has {len(live)} optimizers, the checkpoint {len(states)}")
            kinds = checkpoint.provenance.get("kinds", {})
            for i, state in enumerate(states):
                own = name if len(states) == 1 else f"{name}/{i}"
                components.check(own, live[i], state, kind=kinds.get(own))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the run, and put loaders and random numbers where they were.

        Raises:
            Invalid: if the data of a `ResumableLoader` is not split over the processes.
            Incompatible: if the loaders are not those that were saved.
        """
        self._positions = Positions(trainer)
        if trainer.fast_dev_run:
            return
        # Lightning has its handler of SIGTERM by now, which lets a batch end; the run leaves it there.
        timeout = self._options.get("timeout", ranks.TIMEOUT)
        self._ranks = ranks.Ranks(timeout)
        self._ranks.leader(lambda: self._begin(trainer), f"a run of {self.model}")
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            _logger.warning(
                "Lightning saves at the end of an epoch before a ReduceLROnPlateau takes its step, and leaves that step out when "
                "it resumes; to resume exactly, save inside epochs (every_n_train_steps)"
            )
        if self._loaded is not None:
            self._positions.put_back(self._loaded)
            if "gradients" in self._loaded.components:
                Gradients(pl_module).load_state_dict(self._loaded.state_dict("gradients"))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out: the random numbers of each process, and its loaders."""
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", [])
        orders = self._positions.orders() if self._positions else []
        own = {"rng": rng.capture(), "loaders": loaders, "orders": orders}
        everyone = self._ranks.gather(lambda: own, "a checkpoint") if self._ranks else [own]
        # All processes take part in reducing the metrics.
        checkpoint[_OWN] = {"ranks": everyone, "metrics": dict(trainer.callback_metrics)}
        is_inside = self._is_open and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_inside and not loaders and self._moment is None:
            _logger.warning(
                "a save inside an epoch lacks the position in the data; to resume exactly, wrap the loader: "
                "ResumableLoader(loader) from registry"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what the run ends by."""
        self._error = exception

    def _begin(self, trainer: Trainer) -> None:
        """Begin a run; in the process that saves."""
        self._run = self._made_run(trainer, resume=self._loaded, config=_hyperparameters(trainer))
        self._run.__enter__()
        self._is_open, self._error = True, None

    def _made_run(self, trainer: Trainer, **others: Any) -> Run:
        """A run that has not begun. What stays of it is decided here, as a pointer goes before its version.

        Args:
            others: options of a run that the user's have precedence over.
        """
        options = others | self._options
        by = next((one for one in trainer.checkpoint_callbacks if getattr(one, "monitor", None)), None)
        if "monitor" not in options and by is not None:
            options |= {"monitor": by.monitor, "mode": by.mode}
        kept = {rule: options.pop(rule, None) for rule in ("keep_last", "keep_best")}
        rules = Retention.of(options.get("monitor"), options.get("mode"), keep_optimizer=None, **kept)
        run = self.registry.run(self.model, together=False, **options)
        self._session = Session(run.name, self.model, rules)
        return run

    def _end(self) -> None:
        """End the run; called in every case in which Lightning leaves the training."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        if self._run is not None and self._is_open:
            self._is_open = False
            error = self._error
            self._run.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _save(self, checkpoint: dict[str, Any], path: str) -> None:
        """Save a checkpoint dict as a version, and point at it; in the process that saves."""
        assert self._trainer is not None
        trainer = self._trainer
        own = checkpoint.pop(_OWN, {})
        last = [one for one in trainer.checkpoint_callbacks if getattr(one, "last_model_path", None) == path]
        if last and self._moment is not None and is_same(self._moment.checkpoint, {**checkpoint, **own}):
            saved = self._moment.saved
        else:
            saved = self._saved(trainer, checkpoint, own)
        if last:
            self._set_last(saved)
        keys = ("global_step", "epoch", "loops")
        self._moment = _Moment(saved, {key: checkpoint[key] for key in keys} | own)
        self._pointers.write(path, saved)
        assert self._session is not None
        saved_in = self.registry.outbox.home if saved.row.is_pending else self.registry
        self._pointers.remove_all(self._session.superfluous(self.registry, saved_in))
        self._session.retain(self.registry, saved_in)

    def _set_last(self, saved: Checkpoint) -> None:
        """Point the alias `last` at a version. Where a shared registry is away, the file alone says which one is the last."""
        try:
            if not saved.row.is_pending:
                self.registry.set_alias(saved.id, "last")
        except Unreachable as error:
            _logger.warning("%s; the alias 'last' stays where it is until the next save", error)

    def _saved(self, trainer: Trainer, checkpoint: dict[str, Any], own: Mapping[str, Any]) -> Checkpoint:
        """A new version."""
        if self._run is None:
            self._run = self._made_run(trainer)
            with self._run:
                pass
        rest = dict(checkpoint)
        module = trainer.lightning_module
        state = rest.pop("state_dict")
        # A module may leave something out of its checkpoints, and a callback put in an average of the parameters. Then the
        # state is what they say, not what the module has.
        is_whole = is_live(components.capture("model", module), state)
        states = {} if is_whole else {"model": state}
        kinds = {} if is_whole else {"model": components.kind_of(module)}
        live = {
            "optimizer": trainer.optimizers,
            "scheduler": [one.scheduler for one in trainer.lr_scheduler_configs],
        }
        for key, name in LIGHTNING_LISTS.items():
            items = rest.pop(key, None)
            rest[name] = None if items is None else len(items)
            if items:
                single = len(items) == 1
                states[name if single else f"{name}s"] = items[0] if single else items
                for i, one in enumerate(live[name]):
                    kinds[name if single else f"{name}s/{i}"] = components.kind_of(one)
        everyone = own.get("ranks", [])
        if everyone:
            states["loaders"] = [{key: one[key] for key in ("loaders", "orders")} for one in everyone]
        if self._is_open and trainer.fit_loop._should_accumulate():
            states |= self._gradients(module)
        states[LIGHTNING] = storable(without_paths(rest, trainer))
        measured = own.get("metrics", trainer._logger_connector._callback_metrics)
        saved = self._run.save(
            **({"model": module} if is_whole else {}),
            states=states,
            kinds=kinds,
            rng=[one["rng"] for one in everyone] or None,
            epoch=checkpoint["epoch"],
            step=checkpoint["global_step"],
            metrics={name: value for name, value in measured.items() if is_metric(name)},
        )
        assert saved is not None
        return saved

    def _gradients(self, module: LightningModule) -> dict[str, Any]:
        """What an unfinished window has added up; in several processes each has other gradients until it ends."""
        if ranks.count() == 1:
            return {"gradients": Gradients(module).state_dict()}
        _logger.warning(
            "saved inside a window of accumulated gradients, which are not saved in several processes; to resume exactly, "
            "save where a window ends"
        )
        return {}

    def _load(self, path: str, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
        """The checkpoint dict of a version, or of a file of Lightning's own; in every process."""
        assert self._trainer is not None
        pointer = pointers.read(path)
        if pointer is None and os.path.isfile(path):
            return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)  # type: ignore[no-any-return]
        checkpoint = self._named(path, pointer)
        found = dict_of(checkpoint)
        self._check(checkpoint, found)
        self._loaded = checkpoint if self._trainer.state.fn == TrainerFn.FITTING else None
        return with_paths(found, self._trainer, last=checkpoint.id)

    def _named(self, path: str, pointer: tuple[str, str] | None) -> Checkpoint:
        """The checkpoint that a pointer or a reference names."""
        if pointer is None:
            if os.path.isabs(path) or path.endswith(".ckpt"):
                raise NotFound(
                    f"there is no file {path}", f"give one, or a reference such as {self.model}@best"
                )
            return self.registry[path]
        found = pointers.checkpoint_at(self.registry, pointer)
        if found is None:
            raise NotFound(
                f"{path} points at {pointer[0]}, which is not, or no longer, in the registry {self.registry.root}"
            )
        return found

    def _check(self, checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
        """See that a checkpoint is one of this network, before anything is changed."""
        assert self._trainer is not None
        module = self._trainer.lightning_module
        is_resumed = self._trainer.state.fn == TrainerFn.FITTING
        if is_resumed and not all(key in found for key in LIGHTNING_LISTS):
            raise Incompatible(
                f"{checkpoint.name} has no state of optimizers (save_weights_only, or thinned); training cannot go on from it"
            )
        if not module.strict_loading or is_overridden("on_load_checkpoint", module, LightningModule):
            return
        with naming(checkpoint.name):
            components.check("model", module, found["state_dict"], kind=None)


class _RegistryIO(CheckpointIO):  # type: ignore[misc]
    """What Lightning writes, reads and removes checkpoints by."""

    def __init__(self, kept: RegistryCheckpoint) -> None:
        self._kept = kept

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if _is_passing(path):
            own = {key: value for key, value in checkpoint.items() if key != _OWN}
            TorchCheckpointIO().save_checkpoint(own, path)
        else:
            self._kept._save(checkpoint, os.fspath(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self._kept._load(os.fspath(path), map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        if _is_passing(path):
            TorchCheckpointIO().remove_checkpoint(path)
        else:
            self._kept._pointers.remove(os.fspath(path))

    def teardown(self) -> None:
        self._kept._end()


class _RegistryLogger(Logger):  # type: ignore[misc]
    """Puts what is logged into the TensorBoard events of the run; outside `fit` nothing is recorded.

    Lightning keeps its checkpoints in `name/version/checkpoints` below the trainer's folder, or here their pointers. It
    is the same folder for each run of a model, as a `ModelCheckpoint` goes on only in the folder where it was.
    """

    def __init__(self, kept: RegistryCheckpoint) -> None:
        super().__init__()
        self._kept = kept

    @property
    def name(self) -> str:
        return "lightning_logs"

    @property
    def version(self) -> str:
        return self._kept.model

    @property
    def experiment(self) -> Any:
        """The run's `SummaryWriter`."""
        return self._kept._run.writer if self._kept._run and self._kept._is_open else Mute()

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run has taken them as its configuration."""


def _is_passing(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of a `Tuner`, which finds a learning rate or a batch size before a training."""
    return os.path.basename(path).startswith(_PASSING)


def _listed(given: Any) -> list[Any]:
    """What a `Trainer` takes as one object, several or none, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """The hyperparameters of the module and of its data, as plain values."""
    found: dict[str, Any] = {}
    for part in (trainer.datamodule, trainer.lightning_module):
        found |= dict(getattr(part, "hparams_initial", None) or {})
    return recordable(found)
