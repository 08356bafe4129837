"""Devices: choosing from those that are there, and spreading a network over several."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from registry.live import ranks
from registry.store.errors import Invalid, NotFound
from registry.store.text import quoted

_logger = logging.getLogger(__name__)

_NUMBERS = re.compile(r"\d{1,4}(,\d{1,4})*\Z")


def get_devices(wanted: int | Sequence[int] | str | torch.device | None = None) -> list[torch.device]:
    """Choose the devices to train on, of those that are there. The choice is logged.

    Under `torchrun` each process gets one device: the one in the place of its local rank.

    Args:
        wanted: None for every accelerator, or the CPU if there is none; a number for this many accelerators, or as
            many as there are; numbers such as `[0, 3]` for these; or a name: `cpu`, `mps`, `cuda`, `cuda:1`, `2`,
            `0,3`.

    Returns:
        At least one device: accelerators of one kind, or the CPU alone.

    Raises:
        Invalid: if the request cannot be read.
        NotFound: if a device that is named is not there, saying which ones are.
    """
    chosen = _choose(_parsed(wanted))
    if ranks.started() > 1 and chosen[0].type == "cuda":
        place = ranks.local()
        if place >= len(chosen):
            raise NotFound(
                f"process {place} of this machine has no device: {_shown(chosen)} for "
                f"{ranks.local_count()} processes",
                f"start fewer with --nproc-per-node={len(chosen)}",
            )
        chosen = [chosen[place]]
    _logger.info("training on %s", _shown(chosen))
    return chosen


def parallelize(
    model: nn.Module, devices: Sequence[torch.device] | None = None, *, exact: bool = False
) -> nn.Module:
    """Put a network on devices, so that all of them work on each batch.

    Several devices in one process give a `DataParallel`, whose forward pass returns one loss for each device: take
    the mean. Batches must not be smaller than the number of devices, or some of them have nothing to do. Several
    processes (`torchrun`) give a `DistributedDataParallel`, which is the faster of the two. With one device and one
    process it is the network itself.

    Args:
        devices: the devices; by default those of `get_devices()`.
        exact: make resumed training equal uninterrupted training bit for bit, also with more than two processes.
            Without it, `DistributedDataParallel` sums gradients in one order in its first step and in another one
            after it. With more than two processes, this costs a walk over the graph in each step
            (`find_unused_parameters`).
    """
    devices = get_devices() if devices is None else list(devices)
    model.to(devices[0])
    if ranks.count() > 1:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            # There are no gradients to share.
            return model
        ids = devices if devices[0].type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, find_unused_parameters=exact and ranks.count() > 2
        )
    if len(devices) == 1:
        return model
    _logger.warning(
        "each batch is split over %d devices: a batch must not be smaller than %d samples",
        len(devices),
        len(devices),
    )
    return DataParallel(model, device_ids=devices)


def _parsed(wanted: int | Sequence[int] | str | torch.device | None) -> int | list[int] | str | None:
    """What was asked for: None for everything, how many, which numbers, or a name.

    Raises:
        Invalid: if it is none of these.
    """
    if wanted is None:
        return None
    if isinstance(wanted, torch.device):
        return str(wanted)
    if isinstance(wanted, str):
        if not _NUMBERS.match(wanted):
            return wanted
        numbers = [int(number) for number in wanted.split(",")]
        wanted = numbers if "," in wanted else numbers[0]
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
        return wanted
    if isinstance(wanted, list | tuple) and wanted and all(type(n) is int and n >= 0 for n in wanted):
        if len(set(wanted)) < len(wanted):
            raise Invalid(f"devices are {list(wanted)}, which names one of them twice")
        return list(wanted)
    raise Invalid(
        f"devices are {quoted(str(wanted))}, expected how many (1 or more), a list of numbers such as [0, 3], or a "
        "name such as cpu or cuda:1"
    )


def _choose(wanted: int | list[int] | str | None) -> list[torch.device]:
    """The devices that are there, of those that were asked for."""
    there = _accelerators()
    if wanted is None:
        return there or [torch.device("cpu")]
    if isinstance(wanted, int):
        if len(there) < wanted:
            _logger.warning(
                "%d devices were asked for, there are %s", wanted, _shown(there) or "none but cpu"
            )
        return there[:wanted] or [torch.device("cpu")]
    if isinstance(wanted, list):
        return [_named(f"cuda:{number}", there) for number in wanted]
    return [_named(wanted, there)]


def _named(name: str, there: Sequence[torch.device]) -> torch.device:
    """The device of a name.

    Raises:
        NotFound: if it is not there.
    """
    everything = [torch.device("cpu"), *there]
    for device in everything:
        if name in (str(device), device.type):
            return device
    raise NotFound(f"there is no device {quoted(name)}", f"there is {_shown(everything)}")


def _accelerators() -> list[torch.device]:
    """Every accelerator of this machine, all of one kind."""
    if torch.cuda.is_available():
        return [torch.device("cuda", place) for place in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [torch.device("mps")]
    return []


def _shown(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))
