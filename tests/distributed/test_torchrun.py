"""`registry train` under the real torchrun: shares of the data, one voice, interrupts, exact resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from together import together

from registry import Registry, RegistryError
from registry.models.data import Data, load
from registry.models.measuring import evaluate, evaluate_together
from registry.models.training import TrainConfig, train

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
COMMON = ["--set", "samples=192", "--set", "log_every=1", "--set", "workers=0"]


def torchrun(root: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    place = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        "-m",
        "registry.cli",
    ]
    command = [sys.executable, *place, "--root", str(root), "train", *words]
    return subprocess.Popen(
        command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def test_training_in_two_processes(tmp_path: Path) -> None:
    Registry(tmp_path)
    done = torchrun(tmp_path, "lenet5", "--epochs", "20", "--name", "whole", *COMMON)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert out.count("whole/run-1 finished: the best is whole:v") == 1
    numbers = re.findall(r"^ *(\d+)/20 .*  v\d+", out + err, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 21)]  # only one of them speaks
    registry = Registry(tmp_path, create=False)
    log = (tmp_path / "runs" / "whole" / "run-1" / "run.log").read_text()
    assert "training on cpu; processes: 2" in log
    assert "batch[3/3]" in log  # 192 samples in two shares of 96
    last = registry["whole"]
    assert (last.epoch, last.step, last.provenance["processes"]) == (20, 60, 2)

    # interrupted at a batch, and resumed
    running = torchrun(tmp_path, "lenet5", "--epochs", "20", "--name", "half", *COMMON)
    log_file = tmp_path / "runs" / "half" / "run-1" / "run.log"
    deadline = time.monotonic() + 60
    while not (log_file.exists() and "Epochs[1/20] -- batch[1/3]" in log_file.read_text()):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert err.count(f"go on with: registry --root {tmp_path} train --resume half:v") == 1
    assert registry.runs["half/run-1"].state == "interrupted"
    assert (registry["half"].step or 0) < 60
    done = torchrun(tmp_path, "--resume", "half", "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert json.loads(out)["latest"]["epoch"] == 20
    resumed = registry["half"]
    assert resumed.step == 60

    def state(reference: str) -> dict[str, str]:
        parts = ("model/", "optimizer/", "rng/", "ranks/")
        return {
            path: digest
            for path, _, _, digest in registry[reference].parameters()
            if path.startswith(parts) and "/loader/" not in path
        }

    assert state("half") == state("whole")
    assert resumed.metrics == last.metrics

    # what the leading process measured is what the saved network has
    network = registry.build("whole")
    data = load("digits", None, seed=0)
    loss, accuracy, _ = evaluate(network, data.test)
    assert accuracy == pytest.approx(last.metrics["accuracy"], abs=1e-12)
    assert loss == pytest.approx(last.metrics["test_loss"], abs=1e-5)


def test_an_error_is_one_line_of_each_process(tmp_path: Path) -> None:
    Registry(tmp_path)
    # torchrun ends the other process as soon as it sees one that failed, so it is told to look later
    done = torchrun(tmp_path, "lenet5", "--resume", "nothing", options=("--monitor-interval=10",))
    _, err = done.communicate(timeout=120)
    assert done.returncode == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert "registry.store.errors" not in err  # no traceback of ours; torchrun adds its own


def too_many(root: str) -> list[str]:
    data = load("digits", None, seed=0)
    few = Data(
        **{**vars(data), "train": torch.utils.data.Subset(data.train, [0])}  # type: ignore[arg-type]
    )
    network = torch.nn.Module()
    found = []
    try:
        train(Registry(root), TrainConfig(epochs=1), few)
    except RegistryError as error:
        found.append(f"{type(error).__name__}: {error}")
    from registry.live.builders import builder

    torch.manual_seed(torch.distributed.get_rank())
    network = builder("lenet5").build(None)
    for parameter in network.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    one = torch.utils.data.Subset(data.test, [3])
    return [*found, repr(evaluate_together(network, one, 8)), repr(evaluate(network, one)[:2])]


def test_more_processes_than_samples(tmp_path: Path) -> None:
    first, second = together(2, too_many, tmp_path)
    assert first == second
    error, shared, alone = first
    assert error == ("Incompatible: digits has 1 samples to train on, too few for 2 processes; start fewer")
    assert shared == alone  # also where a process has nothing to test
