"""The cost of saving to a training: the stall of a save that does not wait, how far it slows the steps behind which it goes on,
its share of a training, and restoring."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torchvision
from torch import nn
from torch.nn import functional

from benchmarks.floors import second_in_a_row
from benchmarks.measure import (
    Contender,
    Result,
    Scale,
    Section,
    Times,
    middle_half,
    ratio,
    spoken,
    take_turns,
)
from benchmarks.states import flat, gpt2_small_with_adam
from registry import Registry
from registry.models import data
from registry.models.lenet import LeNet5
from registry.models.training import TrainConfig, train

STEPS = 200
"""Steps of a turn beside which a save goes on, at least."""

LASTING = 2.0
"""Seconds that they take at least, so that the save is over before they are."""

EVERY = 10.0
"""Seconds from one save of such a training to the next."""

Step = Callable[[], object]


def measure(folder: Path, scale: Scale) -> Section:
    """Measure a ResNet50, a network of GPT-2 small's shape and many small tensors, all with Adam, and a training on the digits."""
    # dcp warns, in threads of its own, that it runs in one process.
    warnings.simplefilter("ignore")
    found = [_share(folder, 2 if scale.quick else 8)]
    found += _slowed(folder / "behind", scale.rounds)
    small = _small()
    found += _stall(
        "800 small tensors",
        model=small,
        optimizer=_trained(small),
        folder=folder / "small",
        rounds=10 * scale.rounds,
    )
    networks = {"ResNet50 + Adam": _resnet50} | ({} if scale.quick else {"GPT-2 small + Adam": _gpt2_small})
    for name, build in networks.items():
        model = build()
        optimizer = _trained(model)
        found += _stall(name, model=model, optimizer=optimizer, folder=folder / name, rounds=scale.rounds)
        found.append(
            _restore(name, model=model, optimizer=optimizer, folder=folder / name, rounds=scale.rounds)
        )
        shutil.rmtree(folder / name)
    return Section(found)


def _resnet50() -> nn.Module:
    return torchvision.models.resnet50(weights=None)


def _gpt2_small() -> nn.Module:
    tensors = gpt2_small_with_adam()["model"]
    return nn.ParameterDict({name.replace(".", "_"): nn.Parameter(t) for name, t in tensors.items()})


def _small() -> nn.Module:
    """200 parameters, which are 800 tensors with what Adam keeps of each."""
    return nn.ParameterList([torch.randn(64) for _ in range(200)])


def _trained(model: nn.Module) -> torch.optim.Optimizer:
    """Adam after one step, so that it has its moments."""
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _slowed(folder: Path, rounds: int) -> list[Result]:
    """By how much saves of a ResNet50 with Adam slow the steps of another training in the same process."""
    model = _resnet50()
    optimizer = _trained(model)
    tensors = list(flat({"model": model.state_dict(), "optimizer": optimizer.state_dict()}).values())
    kinds = {"steps of Python over small tensors": _python_step(), "steps of LeNet5": _lenet5_step()}
    found = []
    with Registry(folder / "here").run("model", keep_last=1) as run, _apart(folder / "apart") as apart:

        def change() -> None:
            run.wait()
            for tensor in tensors:
                tensor.detach().add_(1)

        for what, step in kinds.items():
            count = _enough(step)

            def alone(step: Step = step, count: int = count) -> None:
                for _ in range(count):
                    step()

            def saving(alone: Step = alone) -> None:
                run.save(model=model, optimizer=optimizer, wait=False)
                alone()
                # What is left of the save then counts, too.
                run.wait()

            def beside(alone: Step = alone) -> None:
                answered = apart()
                alone()
                answered()

            contenders: dict[str, Contender] = {
                "alone": (change, alone),
                "saving": (change, saving),
                "beside": (change, beside),
            }
            times = take_turns(contenders, rounds)
            often = f"every {EVERY:.0f} s"
            found += [
                _slowdown(f"{what}, a ResNet50 + Adam saved behind them {often}", times, "saving", count),
                _slowdown(f"{what}, while another process saves its own {often}", times, "beside", count),
            ]
    shutil.rmtree(folder)
    return found


def _enough(step: Step) -> int:
    """How many steps a turn takes."""
    few = STEPS // 10
    step()
    began = time.perf_counter()
    for _ in range(few):
        step()
    return max(STEPS, math.ceil(LASTING * few / (time.perf_counter() - began)))


def _slowdown(what: str, times: Times, who: str, count: int) -> Result:
    """What a training takes with a save every `EVERY` seconds, of what it takes without.

    Args:
        times: seconds of the steps `alone`, and of the steps with one save beside them. A save is over before the steps are, so
            the seconds that it adds are the same however many steps there are.
        who: whose save: one `saving` behind the steps, which has a goal, or one of another process.
        count: how many steps.
    """
    added = [a - b for a, b in zip(times[who], times["alone"], strict=True)]
    low, high = middle_half([1 + seconds / EVERY for seconds in added])
    saving, alone = (statistics.median(times[name]) for name in (who, "alone"))
    detail = f"{count} steps and one save {spoken(saving)} against {spoken(alone)} of {count} steps"
    value, goal = 1 + statistics.median(added) / EVERY, 1.02 if who == "saving" else None
    return Result(what, value, goal=goal, detail=detail, low=low, high=high)


@contextmanager
def _apart(folder: Path) -> Iterator[Callable[[], Callable[[], object]]]:
    """A process that holds a ResNet50 with Adam. What is yielded lets it save them, and returns a function that waits for it.

    It tells what the save itself takes from the steps, as it shares no interpreter with them: processors, memory and the disk.
    """
    words = [sys.executable, "-m", __name__, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, answers = process.stdin, process.stdout
        answers.readline()

        def save() -> Callable[[], object]:
            told.write("save\n")
            told.flush()
            return answers.readline

        yield save
        told.close()


def _save_when_told(folder: Path) -> None:
    """Save a ResNet50 with Adam for each line that is read, all of it new, and answer with a line."""
    model = _resnet50()
    optimizer = _trained(model)
    with Registry(folder).run("model", keep_last=1) as run:
        print(flush=True)
        for _ in sys.stdin:
            run.save(model=model, optimizer=optimizer)
            print(flush=True)
            for tensor in flat({"model": model.state_dict(), "optimizer": optimizer.state_dict()}).values():
                tensor.detach().add_(1)


def _python_step() -> Step:
    """A step in which the interpreter has more to do than the processor: 2,000 operations on tensors of 64 elements."""
    tensors = [torch.rand(64) for _ in range(1_000)]

    def step() -> None:
        for tensor in tensors:
            tensor.mul_(0.99).add_(0.01)

    return step


def _lenet5_step() -> Step:
    """A step of Adam on 16 images of 28 pixels."""
    network = LeNet5()
    optimizer = torch.optim.Adam(network.parameters())
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(10, (16,))

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _stall(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rounds: int
) -> list[Result]:
    tensors = list(flat({"model": model.state_dict(), "optimizer": optimizer.state_dict()}).values())
    buffers = [torch.zeros_like(tensor) for tensor in tensors]
    pending: list[Any] = []

    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)

    def copy() -> None:
        torch._foreach_copy_(buffers, [tensor.detach() for tensor in tensors])

    def asked() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch._foreach_copy_(buffers, [tensor.detach() for tensor in flat(state).values()])

    with Registry(folder / "stall").run("model", keep_last=1) as run:

        def finish() -> None:
            run.wait()
            for future in pending:
                future.result()
            pending.clear()
            shutil.rmtree(folder / "dcp", ignore_errors=True)
            change()

        def ours() -> None:
            run.save(model=model, optimizer=optimizer, wait=False)

        def theirs() -> None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            pending.append(dcp.async_save(state, checkpoint_id=folder / "dcp", no_dist=True))

        contenders: dict[str, Contender] = {
            "copy": (finish, copy),
            "asked": (finish, asked),
            "save": (finish, ours),
            "async_save": (finish, theirs),
        }
        t = take_turns(contenders, rounds)
        finish()
    what = f"{name}: stall of a save that does not wait"
    return [
        ratio(what, t, ours="save", peer="copy", goal=1.1, name="one copy of the state"),
        ratio(what, t, ours="save", peer="asked", goal=None, name="state_dict() and one copy"),
        ratio(what, t, ours="save", peer="async_save", goal=None, name="DCP's async_save"),
    ]


def _restore(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rounds: int
) -> Result:
    with Registry(folder / "restore").run("model") as run:
        checkpoint = run.save(model=model, optimizer=optimizer)
    assert checkpoint is not None
    folder.mkdir(exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "peer.pt")

    def theirs() -> None:
        state = torch.load(folder / "peer.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    contenders = {
        "torch": second_in_a_row(theirs),
        "verified": second_in_a_row(lambda: checkpoint.restore(model=model, optimizer=optimizer)),
    }
    t = take_turns(contenders, rounds)
    return ratio(
        f"{name}: restore, verified",
        t,
        ours="verified",
        peer="torch",
        goal=1.0,
        name="torch.load + load_state_dict",
    )


def _share(folder: Path, epochs: int) -> Result:
    digits = data.load("digits")
    registry = Registry(folder / "digits")
    # This training warms up.
    train(registry, TrainConfig(epochs=1), digits)
    began = time.perf_counter()
    run = train(registry, TrainConfig(epochs=epochs), digits)
    total = time.perf_counter() - began
    detail = f"{run.seconds_saving * 1e3:.0f} ms of {total:.1f} s"
    return Result(
        "LeNet5 on digits: share of the time spent saving",
        run.seconds_saving / total,
        goal=0.02,
        detail=detail,
    )


if __name__ == "__main__":
    _save_when_told(Path(sys.argv[1]))
