"""transformers: a Trainer that saves into a registry, and resumes from it bit for bit.

    from registry.integrations.transformers import RegistryCallback, checkout

    trainer = Trainer(..., callbacks=[RegistryCallback("bert", monitor="eval_loss", keep_last=3)])
    trainer.train(resume_from_checkpoint=checkout("bert@latest"))

A version has what the Trainer puts into the folder `checkpoint-N`, at the same steps. The Trainer still writes that folder,
and `save_total_limit=1` keeps one of them. Parameters have the names of the live network. The folder has others for
networks such as Mixtral, and a Trainer that resumes from it begins with new experts.

Data that draw random numbers, as an augmentation does, resume exactly with `class MyTrainer(ResumableData, Trainer)`.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from registry.checkpoints.checkpoint import Checkpoint
from registry.integrations import check_release
from registry.integrations.options import check_options, registry_of
from registry.integrations.scrubbing import without_folders
from registry.integrations.storing import recordable
from registry.integrations.trainer_folders import RESUMED, STATE, files_of, write_folder
from registry.live import components, ranks
from registry.live.resumable import ResumableLoader
from registry.log.metrics import is_metric
from registry.log.reference import check_name, parse_reference
from registry.registry import Registry
from registry.runs.run import Run
from registry.store.durable import host
from registry.store.errors import Incompatible, Invalid, NotFound, Unsupported, naming, storage_errors
from registry.store.text import quoted

check_release("transformers")

import transformers.trainer as trainer_module  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.integrations import rewrite_logs  # noqa: E402

_logger = logging.getLogger(__name__)

# The state of the process: `checkout` is given no Trainer, and a Trainer tells no callback what it is about to read.
_networks: weakref.WeakValueDictionary[tuple[Path, str], nn.Module] = weakref.WeakValueDictionary()
"""The network of the last Trainer that was made for each model, by the registry's folder and the model's name."""

_OWNER = "_registry_callback"
"""The attribute of a Trainer's state with the callback that saves its training."""

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")

_SPEEDS = ("_runtime", "_per_second", "_preparation_time", "_compilation_time")
"""What the names of an evaluation's results end in that are no metrics."""


def checkout(reference: str, registry: Registry | None = None) -> str | bool:
    """A folder from which a Trainer resumes: `trainer.train(resume_from_checkpoint=checkout("bert@latest"))`.

    It puts the random numbers back, too, as the Trainer draws some before it reads the folder. So call it after the Trainer
    was made, in each process. The folder is a temporary one, and goes when the program ends; where several processes
    train, those of one machine share it.

    Args:
        reference: a version that `RegistryCallback` has saved.
        registry: where it is; `REGISTRY_ROOT` or `./.registry` unless given.

    Returns:
        The folder; False, with which training begins anew, as long as the model has no version.

    Raises:
        Invalid: if `registry` is none.
        NotFound: if the model has versions, but not this one.
        Incompatible: if the Trainer that was made last with `RegistryCallback` for this model has another network, naming
            what differs.
        Unsupported: if a Trainer cannot go on from it, saying why.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the folder cannot be written.
    """
    registry = registry_of(registry)
    try:
        checkpoint = registry[reference]
    except NotFound as missing:
        if parse_reference(reference).model in registry:
            raise
        _logger.info("training begins anew: %s", missing)
        return False

    def write() -> tuple[str, str]:
        is_first = ranks.count() == 1 or ranks.local() == 0
        return host(), _written(checkpoint) if is_first else ""

    processes = ranks.Ranks()
    try:
        written = processes.gather(write, f"a checkout of {checkpoint.name}")
    finally:
        processes.close()
    network = _networks.get((registry.root, checkpoint.model))
    if network is not None:
        _check_network(checkpoint, network)
    checkpoint.restore(rng=True)
    return next(folder for machine, folder in written if folder and machine == host())


class RegistryCallback(TrainerCallback):  # type: ignore[misc]
    """Saves a version wherever a Trainer saves a checkpoint: `Trainer(..., callbacks=[RegistryCallback("bert")])`.

    A version holds the network (of PEFT the adapter), the optimizer, the scheduler, the gradient scaler, the random numbers
    of each process, the Trainer's state, and small files such as those of the tokenizer. With `save_only_model` it holds
    the network and the files. `load_best_model_at_end` loads the best network from the registry.

    Each training is a run. Where a training fails, its run ends as the program ends, the callback is given up, or the next
    training begins.

    Args:
        model: the model that gets new versions.
        registry: where they go; `REGISTRY_ROOT` or `./.registry` unless given.
        monitor: the metric that says which version is `best`, such as `eval_loss`. By default the Trainer's
            `metric_for_best_model` and `greater_is_better`, if it has these.
        mode: `min` or `max`; by default the metric's name decides.
        wait: whether training waits until a version is durable. Otherwise it is written behind the training, and a training
            that is killed may lose the last one.
        options: what `Registry.run` takes beside, such as `keep_last`, `keep_best` and `keep_optimizer`.

    Raises:
        Invalid: if an option is none of a run, or the name is malformed.
    """

    def __init__(
        self,
        model: str,
        registry: Registry | None = None,
        *,
        monitor: str | None = None,
        mode: str | None = None,
        wait: bool = True,
        **options: Any,
    ) -> None:
        check_options(options, own=frozenset({"model", "resume", "together", "config", "monitor", "mode"}))
        self._model = check_name(model, "model")
        self._registry = registry_of(registry)
        self._monitor = monitor
        self._mode = mode
        self._wait = wait
        self._options = options
        self._run: Run | None = None
        self._ending: weakref.finalize[Any, Any] | None = None

    @property
    def run(self) -> Run | None:
        """The run of the present training; None while nothing is trained."""
        return self._run

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the network, so that `checkout` can refuse a version of another one."""
        if model is not None:
            _networks[self._registry.root, self._model] = model

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin a run.

        Raises:
            Invalid: if the Trainer has another `RegistryCallback`, which would save everything twice.
            Unsupported: for networks that are sharded over processes.
            NotFound: if the training goes on from a version that is not in this registry.
            Incompatible: if the version is of another network, or an adapter goes on over another base network.
        """
        if self._ending is not None:
            self._ending()
        # Nothing else that callbacks are given is one and the same for all of them, and for this training alone.
        if state.__dict__.setdefault(_OWNER, self) is not self:
            raise Invalid(
                "the Trainer has several callbacks of RegistryCallback, which would save everything several times",
                "keep one",
            )
        kind = AcceleratorState().distributed_type.name
        if kind in _SHARDED:
            raise Unsupported(
                f"networks under {kind} are sharded over processes, which RegistryCallback cannot save",
                "save each part with "
                "dcp.save(state, storage_writer=run.sharded(...)), see docs/distributed.md",
            )
        resumed = self._resumed(state)
        if resumed is not None:
            _check_resumed(resumed, model, state, args)
        monitor, mode = self._monitor, self._mode
        if monitor is None and (metric := args.metric_for_best_model) is not None:
            monitor = metric if metric.startswith("eval_") else f"eval_{metric}"
            mode = "max" if args.greater_is_better else "min"
        config = recordable(without_folders(args.to_dict()))
        run = self._registry.run(
            self._model, config=config, resume=resumed, monitor=monitor, mode=mode, **self._options
        )
        self._run = run.__enter__()
        self._ending = weakref.finalize(self, _end, run)
        if resumed is not None and isinstance(train_dataloader, ResumableLoader):
            _go_on(resumed, train_dataloader)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        """Put numbers into the run's TensorBoard events, under the names that the Trainer gives them there."""
        if self._run is not None:
            for name, value in rewrite_logs(logs).items():
                if isinstance(value, int | float):
                    self._run.writer.add_scalar(name, value, state.global_step)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save a version; every process calls it."""
        assert self._run is not None
        live = _network(model)
        if not args.save_only_model:
            live["optimizer"] = getattr(optimizer, "optimizer", optimizer)
            live["scheduler"] = lr_scheduler
            if (scaler := getattr(optimizer, "scaler", None)) is not None:
                live["scaler"] = scaler
            if isinstance(train_dataloader, ResumableLoader):
                live["loader"] = train_dataloader
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        self._run.save(
            epoch=int(state.epoch),
            step=state.global_step,
            loss=next(losses, None),
            metrics=_metrics(state),
            files=self._files(args, state),
            wait=self._wait,
            **live,
        )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """End the run; with `load_best_model_at_end` the network gets the parameters of the best version."""
        assert self._run is not None
        assert self._ending is not None
        self._run.wait()
        if args.load_best_model_at_end and state.best_global_step is not None:
            self._load_best(state.best_global_step, model)
        self._ending.detach()
        run, self._run, self._ending = self._run, None, None
        run.__exit__(None, None, None)

    def _resumed(self, state: TrainerState) -> Checkpoint | None:
        """The version that training goes on from; None for one that begins anew, or from a Trainer's own folder."""
        made_from = state.stateful_callbacks.pop(RESUMED, None)
        if made_from is None:
            return None
        try:
            return self._registry[made_from["resumed"]]
        except NotFound:
            raise NotFound(
                f"training goes on from a version that is not in the registry at {self._registry.root}",
                "give checkout() and RegistryCallback() the same registry",
            ) from None

    def _files(self, args: TrainingArguments, state: TrainerState) -> dict[str, bytes]:
        """The small files of the Trainer's folder, with its present state."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        with storage_errors(folder):
            found = files_of(folder)
        # The Trainer looks for the folder of the best network again at each save.
        about = without_folders(dataclasses.asdict(state)) | {"best_model_checkpoint": None}
        return found | {STATE: json.dumps(about).encode()}

    def _load_best(self, step: int, model: nn.Module) -> None:
        assert self._run is not None
        chain = self._registry.runs.chain(self._run.name)
        # A shared registry may be away.
        for version in [*self._registry.outbox.versions(self._model), *self._registry.versions(self._model)]:
            if version.step == step and version.record.get("run") in chain:
                self._registry[version.name].restore(**_network(model), rng=False)
                return


class ResumableData:
    """A mixin by which data that draw random numbers resume exactly: `class MyTrainer(ResumableData, Trainer)`.

    The Trainer's own loader fetches a batch before it puts the random numbers back, so an augmentation differs from there
    on. Needed in the middle of an epoch only, with `RegistryCallback` and `checkout`.
    """

    _is_at_position = False

    def get_train_dataloader(self) -> ResumableLoader:
        """The Trainer's loader, with a position that is saved."""
        return ResumableLoader(super().get_train_dataloader())  # type: ignore[misc]

    def _run_epoch(self, **given: Any) -> Any:
        skip = trainer_module.skip_first_batches

        def skip_unless_there(loader: Any, count: int) -> Any:
            if not isinstance(loader, ResumableLoader):
                return skip(loader, count)
            if loader.position != count:
                # The version was saved without a position.
                return skip(loader.loader, count)
            self._load_rng_state(given["resume_from_checkpoint"])
            self._is_at_position = True
            return loader

        # The Trainer has no other place where it can be told that batches need not be skipped.
        trainer_module.skip_first_batches = skip_unless_there
        try:
            return super()._run_epoch(**given)  # type: ignore[misc]
        finally:
            trainer_module.skip_first_batches = skip

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put the random numbers back, but not behind the first batch."""
        if not self._is_at_position:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        self._is_at_position = False


def _written(checkpoint: Checkpoint) -> str:
    """A temporary folder with a checkpoint."""
    folder = tempfile.mkdtemp(prefix=f"{checkpoint.model}-v{checkpoint.version}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with storage_errors(folder):
        write_folder(checkpoint, Path(folder))
    return folder


def _end(run: Run) -> None:
    """End the run of a training that did not come to its end."""
    error = getattr(sys, "last_value", None) or SystemExit()
    run.__exit__(type(error), error, None)


def _check_resumed(
    checkpoint: Checkpoint, model: nn.Module, state: TrainerState, args: TrainingArguments
) -> None:
    """See that a version is of the network that goes on from it."""
    _check_network(checkpoint, model)
    if 0 < args.max_steps <= state.global_step and not float(state.epoch or 0).is_integer():
        _logger.warning(
            "%s is at the last step already, and the Trainer makes one more where that is inside an epoch",
            checkpoint.name,
        )


def _check_network(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a version of another network: the Trainer passes over names that it does not know.

    Raises:
        Incompatible: naming what differs.
    """
    network = _network(model)
    for name in network:
        if name not in checkpoint.components:
            raise Incompatible(
                f"{checkpoint.name} has no component {quoted(name)}",
                f"it has {', '.join(checkpoint.components)}",
            )
    if "adapter" in network:
        network["adapter"].check_base(checkpoint.state_dict("adapter"))
    elif "source" not in checkpoint.record:
        # What was imported has the names of a file, and tied parameters once.
        with naming(checkpoint.name):
            components.check("model", model, checkpoint.state_dict(verify=False), kind=None)


def _go_on(checkpoint: Checkpoint, loader: ResumableLoader) -> None:
    """Go on at the recorded position, if there is one."""
    if "loader" in checkpoint.components:
        checkpoint.restore(loader=loader)
        if loader.position == len(loader):
            # The Trainer never asks for more than the last batch.
            loader.end_epoch()


def _network(model: nn.Module) -> dict[str, Any]:
    """The component of a network: the network, or of PEFT its adapter."""
    if all(kind.__name__ != "PeftModel" for kind in type(model).__mro__):
        return {"model": model}
    # Lazy: loads peft.
    from registry.integrations.peft import adapter

    return {"adapter": adapter(model)}


def _metrics(state: TrainerState) -> dict[str, float]:
    """The results of the evaluations at this step."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {
        name: value
        for name, value in found.items()
        if is_metric(name) and isinstance(value, int | float) and not name.endswith(_SPEEDS)
    }
