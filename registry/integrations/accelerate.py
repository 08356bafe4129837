"""Accelerate: `save_state` and `load_state` with a version in the place of a folder, and a tracker.

    from registry.integrations.accelerate import load_state, save_state

    with registry.run("net", resume=latest) as run:
        if run.resumed:
            load_state(run.resumed, accelerator)
        ...
        save_state(run, accelerator, step=step, loss=loss)

All processes call these functions, as they call Accelerate's own. To resume exactly in the middle of an epoch, wrap what
`prepare` has returned, and register it: `loader = ResumableLoader(loader)`, then
`accelerator.register_for_checkpointing(loader)`. docs/integrations.md has the whole loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from registry.checkpoints.checkpoint import Checkpoint
from registry.integrations import check_release
from registry.live.gradients import Gradients
from registry.live.resumable import ResumableLoader
from registry.runs.run import Run
from registry.store.errors import Invalid, Unsupported

check_release("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.tracking import GeneralTracker, on_main_process  # noqa: E402

_logger = logging.getLogger(__name__)

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def save_state(run: Run, accelerator: Accelerator, **fields: Any) -> Checkpoint | None:
    """Save all that an accelerator holds as the next version of a run; every process calls it.

    These are the networks and optimizers that it has prepared, schedulers, a gradient scaler, what was registered with
    `register_for_checkpointing`, the random numbers of each process, and inside a window of accumulated gradients these
    gradients. A single network is the component `model`, several are the list `models`; likewise for the others.

    Args:
        fields: what `Run.save` takes beside components, such as `step`, `loss`, `metrics` and `wait`.

    Raises:
        Invalid: if nothing was prepared, or `run` is none.
        Unsupported: for networks that are sharded over processes; use `run.sharded` for these.
    """
    if not isinstance(run, Run):
        raise Invalid(
            "save_state takes a run first: with registry.run('net') as run: save_state(run, accelerator)"
        )
    components = _components(accelerator)
    if accelerator._dataloaders and not any(map(_is_resumable, accelerator._custom_objects)):
        _logger.warning(
            "the position in the data is not saved; to resume inside an epoch, wrap what prepare returned, and register "
            "it: loader = ResumableLoader(loader); accelerator.register_for_checkpointing(loader)"
        )
    return run.save(**components, **fields)


def load_state(checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Restore what `save_state` saved, all of it or nothing; every process calls it.

    Raises:
        Invalid: if `checkpoint` is none.
        NotFound: if the accelerator holds something that the checkpoint has not.
        Incompatible: saying what differs; nothing was changed.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise Invalid("load_state takes a checkpoint first: load_state(registry['net@latest'], accelerator)")
    checkpoint.restore(**_components(accelerator), rng=True)


class RegistryTracker(GeneralTracker):  # type: ignore[misc]
    """Puts what is logged into the run's TensorBoard events: `Accelerator(log_with=RegistryTracker(run))`."""

    name = "torch-registry"
    requires_logging_directory = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    @property
    def tracker(self) -> Run:
        """The run."""
        return self._run

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Nothing: a run takes its configuration as it begins."""

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add numbers to the events; text goes to the events, too, and anything else is left out."""
        for name, value in values.items():
            if isinstance(value, str):
                self._run.writer.add_text(name, value, step)
            else:
                try:
                    number = float(value)
                except (TypeError, ValueError, RuntimeError):
                    continue
                if not math.isnan(number) or step is not None:
                    self._run.writer.add_scalar(name, number, step)


class _Counter:
    """The number of the present step of an accelerator, which decides where a window of accumulated gradients ends."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._accelerator.step = state["step"]


def _components(accelerator: Accelerator) -> dict[str, Any]:
    """All that an accelerator holds, by component name."""
    kind = accelerator.distributed_type.name
    if kind in _SHARDED:
        raise Unsupported(
            f"networks under {kind} are sharded over processes",
            "save each part with dcp.save(state, storage_writer=run.sharded(...)), see docs/distributed.md",
        )
    # Accelerate has no public way to these.
    models = accelerator._models
    if not models:
        raise Invalid("the accelerator has prepared no network yet", "call accelerator.prepare(...) first")
    found = {
        **_named("model", models),
        **_named("optimizer", [getattr(one, "optimizer", one) for one in accelerator._optimizers]),
        **_named("scheduler", [getattr(one, "scheduler", one) for one in accelerator._schedulers]),
        **_named("registered", accelerator._custom_objects),
        "gradients": [Gradients(model) for model in models],
        "accelerator": _Counter(accelerator),
    }
    return found | ({"scaler": accelerator.scaler} if accelerator.scaler is not None else {})


def _named(name: str, parts: list[Any]) -> dict[str, Any]:
    if len(parts) > 1 or (parts and name == "registered"):
        return {name if name == "registered" else f"{name}s": list(parts)}
    return {name: parts[0]} if parts else {}


def _is_resumable(part: Any) -> bool:
    return isinstance(part, ResumableLoader)
