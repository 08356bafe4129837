"""Saving from a GPU and loading into it: the stall of a save that does not wait, the steps behind it, and verified loads.

Where there is no CUDA device, the section says that it was not run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Contender, Result, Scale, Section, absolute, ratio, take_turns
from registry import Checkpoint, Registry

WIDTH = 8192
"""Rows and columns of each layer: 268 MB in float32."""

LAYERS = 32
STEPS = 10
"""Steps of which it is measured how far a save slows them."""

SMALL = 20_000
FEW = 500
"""Numbers of tensors that are loaded, of the same bytes together."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure saves and loads of a network of 8.6 GB in the memory of a CUDA device."""
    if not torch.cuda.is_available():
        return Section(notes=["It was not run: there is no CUDA device here"])
    return on(torch.device("cuda"), folder, WIDTH, 4 if scale.quick else LAYERS, rounds=scale.rounds)


def on(device: torch.device, folder: Path, width: int, layers: int, *, rounds: int) -> Section:
    """Measure on a device, with a network of `layers` matrices of float32 `[width, width]`."""
    network = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(layers)))
    optimizer = torch.optim.SGD(network.parameters(), 1e-6)
    data = torch.randn(4 * width, width, device=device)
    size = sum(parameter.nbytes for parameter in network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        network(data).square().mean().backward()
        optimizer.step()

    what = f"{size / 1e9:.1f} GB on a device"
    results = _saves(what, device, network, step, folder / "saves", rounds)
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    results += _loads(what, device, tensors, folder / "loads", rounds)
    results.append(_many(device, size // 4, folder / "many", rounds))
    return Section(results)


def _saves(
    what: str, device: torch.device, network: nn.Module, step: Callable[[], None], folder: Path, rounds: int
) -> list[Result]:
    """The stall of a save that does not wait, and the steps right behind it."""
    with Registry(folder).run("model", keep_last=1) as run:
        stalls = []

        def steps() -> None:
            for _ in range(STEPS):
                step()
            _finish(device)

        def saving() -> None:
            began = time.perf_counter()
            run.save(model=network, wait=False)
            stalls.append(time.perf_counter() - began)
            steps()

        def ready() -> None:
            run.wait()
            step()
            _finish(device)

        times = take_turns({"alone": (ready, steps), "saving": (ready, saving)}, rounds)
    shutil.rmtree(folder)
    return [
        absolute(f"{what}: stall of a save that does not wait", stalls[1:], 0.020),
        ratio(f"{what}: the save and {STEPS} steps behind it", times, "saving", "alone", 1.05, "the steps"),
    ]


def _loads(
    what: str, device: torch.device, tensors: Mapping[str, torch.Tensor], folder: Path, rounds: int
) -> list[Result]:
    """Loads into tensors of a device, of a registry and by torch."""
    registry = Registry(folder)
    version = registry.save("model", {"model": dict(tensors)})
    torch.save(dict(tensors), folder / "model.pt")
    live = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def theirs() -> None:
        for name, tensor in torch.load(folder / "model.pt", map_location=device).items():
            live[name].copy_(tensor)
        _finish(device)

    ours = partial(_load, version, live, device)
    times = take_turns({"ours": (lambda: None, ours), "torch.load": (lambda: None, theirs)}, rounds)
    registry.catalog.close()
    shutil.rmtree(folder)
    size = sum(tensor.nbytes for tensor in tensors.values())
    speeds = sorted(size / seconds / 1e9 for seconds in times["ours"])
    return [
        ratio(f"{what}: load into it, verified, warm", times, "ours", "torch.load", 1.0),
        absolute(
            f"{what}: load a gigabyte into it, verified, warm",
            [seconds * 1e9 / size for seconds in times["ours"]],
            1 / 12,
            f"{speeds[len(speeds) // 2]:.1f} GB/s",
        ),
    ]


def _many(device: torch.device, size: int, folder: Path, rounds: int) -> Result:
    """The load of many tensors, against that of few of the same bytes."""
    turns: dict[str, Contender] = {}
    registry = Registry(folder)
    for count in (SMALL, FEW):
        length = max(1, size // 4 // count)
        live = {str(i): torch.full((length,), float(i), device=device) for i in range(count)}
        version = registry.save(f"of-{count}", {"model": live})

        turns[str(count)] = (lambda: None, partial(_load, version, live, device))
    times = take_turns(turns, rounds)
    registry.catalog.close()
    shutil.rmtree(folder)
    what = f"{SMALL:,} tensors, {size / 1e9:.1f} GB: load into a device"
    return ratio(what, times, str(SMALL), str(FEW), 1.0, f"{FEW} tensors of the same bytes")


def _load(version: Checkpoint, live: Mapping[str, torch.Tensor], device: torch.device) -> None:
    version.load_into(model=live)
    _finish(device)


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
