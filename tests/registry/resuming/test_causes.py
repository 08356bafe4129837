"""Scripts in which one thing is wrong are run, killed and resumed, and the check names it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from registry.resuming.checking import ResumeCheck
from registry.resuming.scratch import trace_file
from registry.resuming.trace import Trace

pytestmark = pytest.mark.slow

SCRIPT = """
import random, time
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from registry import Gradients, Registry, ResumableLoader

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
{made}
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
loader = {loader}
parts = {parts}
registry = Registry()
before = "net" if "net" in registry else None
with registry.run("net", resume=before) as run:
    batch = 0
    if before:
        run.resumed.restore(**parts{restore})
        batch = run.resumed.step
    while batch < 12:
        for (x,) in loader:
            loss = net(x).square().mean()
            {batch}
            loss.backward()
            {step}
            batch += 1
            if batch % 4 == 0:
                run.save(**parts, step=batch)
            if batch == 12:
                break
"""

DEFAULTS = {
    "made": "",
    "loader": "ResumableLoader(DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4, shuffle=True))",
    "parts": "{'model': net, 'optimizer': optimizer, 'scheduler': scheduler, 'loader': loader}",
    "restore": "",
    "batch": "",
    "step": "optimizer.step(); scheduler.step(); optimizer.zero_grad()",
}


class Planted(NamedTuple):
    """One thing that is wrong.

    Attributes:
        parts: of the script.
        kind: what differs first.
        cause: part of the cause that is told.
        names: part of the name of what differs first.
        told: part of the advice.
        repeats: whether the script does the same twice.
    """

    parts: dict[str, str]
    kind: str
    cause: str
    names: str = ""
    told: str = ""
    repeats: bool = True


BUFFER = """
class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)
    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean
net.insert(1, Mean())
"""
KERNEL = """
torch.set_num_threads(2)
places = torch.zeros(2_000_000, dtype=torch.long)
noise = torch.rand(2_000_000)
"""

PLANTED = {
    "scheduler": Planted(
        {"parts": "{'model': net, 'optimizer': optimizer, 'loader': loader}"},
        "learning rates",
        "a scheduler that is not saved",
        "AdamW/group 0: lr",
        "net:v1 has model, optimizer",
    ),
    "optimizer": Planted(
        {"parts": "{'model': net, 'scheduler': scheduler, 'loader': loader}"},
        "optimizer state",
        "an optimizer that is not saved",
        "Sequential/0.weight: step",
    ),
    "random numbers": Planted(
        {"restore": ", rng=False"}, "random numbers", "random numbers that are not restored", "torch"
    ),
    "loader": Planted(
        {
            "loader": "DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4, shuffle=True)",
            "parts": "{'model': net, 'optimizer': optimizer, 'scheduler': scheduler}",
        },
        "batches",
        "a loader without a state",
    ),
    "buffer": Planted({"made": BUFFER}, "buffers", "a buffer that is not saved", "Sequential/1.mean"),
    "EMA": Planted(
        {
            "made": "ema = torch.optim.swa_utils.AveragedModel(net)",
            "step": DEFAULTS["step"] + "; ema.update_parameters(net)",
        },
        "other networks",
        "an EMA",
        "AveragedModel/",
    ),
    "window": Planted(
        {"step": "\n            if batch % 3 == 2: " + DEFAULTS["step"]},
        "gradients",
        "an unfinished window of accumulated gradients",
    ),
    "generator": Planted(
        {"made": "own = np.random.default_rng(0)", "batch": "loss = loss * float(own.random())"},
        "gradients",
        "a draw from a generator that is not captured",
    ),
    "position": Planted(
        {"batch": "batch -= batch == 11 and before is not None"},
        "steps",
        "the position in the training",
    ),
    "kernels": Planted(
        {
            "made": KERNEL,
            "batch": "loss = loss * torch.zeros(1).index_put((places,), noise, accumulate=True).squeeze()",
        },
        "gradients",
        "nondeterministic kernels",
        repeats=False,
    ),
    "time": Planted(
        {"loader": "[(torch.full((4, 4), float(time.time_ns() % 999)),)] * 5", "parts": "{'model': net}"},
        "batches",
        "values that depend on the time",
        repeats=False,
    ),
    "start": Planted(
        {"made": "net[0].bias.data.fill_(random.random())"}, "parameters", "an unseeded start", repeats=False
    ),
}


def written(folder: Path, **parts: str) -> Path:
    """A script of which some parts are other ones."""
    script = folder / "train.py"
    script.write_text(SCRIPT.format(**DEFAULTS | parts))
    return script


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_found_and_named(
    tmp_path: Path, name: str, check_resume: Callable[..., ResumeCheck]
) -> None:
    planted = PLANTED[name]
    steps = 4 if name == "window" else 12
    found = check_resume(written(tmp_path, **planted.parts), at=steps // 2)
    assert found.difference is not None, str(found)
    assert found.repeats is planted.repeats, str(found)
    assert found.difference.kind == planted.kind, str(found)
    assert planted.cause in found.difference.cause, str(found)
    assert any(planted.names in one for one in found.difference.names or [""]), str(found)
    assert planted.told in " ".join(str(found).split())
    assert max(map(len, str(found).splitlines())) <= 80
    with pytest.raises(AssertionError, match="Usual cause"):
        found.assert_exact()


RANKS = """
import os
import torch
import torch.distributed as dist
from torch import nn
from registry import Registry

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
torch.manual_seed(rank)
model = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(net.parameters(), 1e-2)
registry = Registry()
before = "net" if "net" in registry else None
dist.barrier()
with registry.run("net", resume=before, together=False, name=f"rank-{rank}-{os.getpid()}") as run:
    step = 0
    if before:
        run.resumed.restore(model=net, optimizer=optimizer)
        step = run.resumed.step
    while step < 6:
        loss = model(torch.full((4, 4), step + 1.0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step == 2 and rank == 0:
            run.save(model=net, optimizer=optimizer, step=step)
        dist.barrier()
dist.destroy_process_group()
"""


def test_the_random_numbers_of_another_process_are_missed(
    tmp_path: Path, check_resume: Callable[..., ResumeCheck]
) -> None:
    """One process saves for both, so the other one gets its random numbers."""
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    found = check_resume(script, at=3, processes=2)
    assert found.difference is not None
    assert (found.resumed, found.difference.rank, found.difference.kind) == (2, 1, "random numbers")
    assert found.difference.cause == "dropout on another rank"
    assert "random numbers at step 3 in process 1: torch" in str(found)


LOOKED_AT = """
import sys
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from registry.live import rng
from registry.resuming.observing import digest_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 8), nn.Linear(8, 1), nn.BatchNorm1d(8)

    def forward(self, *, x):
        return self.second(nn.functional.dropout(self.norm(checkpoint(self.first, x, use_reentrant=False))))


torch.manual_seed(int(sys.argv[1]))
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
loss = nn.MSELoss()
for step in range(5):
    optimizer.zero_grad()
    loss(net(x=torch.randn(4, 4)), torch.ones(4, 1)).backward()
    optimizer.step()
    with torch.no_grad():
        net(x=torch.ones(4, 4))
    net.eval()
    net(x=torch.ones(4, 4))
    net.train()
print(digest_of([net.state_dict(), optimizer.state_dict(), torch.get_rng_state()]), __name__, __file__)
sys.exit(0)
"""


def test_a_training_is_the_same_while_it_is_looked_at(tmp_path: Path) -> None:
    """Batches are those of training alone: no evaluation, and no second call of a layer in the backward pass."""
    script = tmp_path / "train.py"
    script.write_text(LOOKED_AT)
    traced = ["-m", "registry.resuming.traced", str(tmp_path), "0"]
    said = [
        subprocess.run(
            [sys.executable, *words, script, "3"], capture_output=True, text=True, check=True
        ).stdout
        for words in ([], traced)
    ]
    assert said[0] == said[1]
    trace = Trace.read(trace_file(tmp_path, 0))
    assert [len(one.batches) for one in trace.steps] == [1] * 5
    assert trace.end is not None
    names = {name.partition("/")[0] for name in trace.steps[1].seen}
    assert names == {"parameter", "buffer", "gradient", "optimizer", "schedule", "random"}
    assert [name for name in trace.end.seen if name.startswith("random")] == ["random/torch"]
