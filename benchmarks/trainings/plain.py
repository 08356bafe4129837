"""A plain training loop that resumes from its last checkpoint: of the registry, or with `--native` of `torch.save`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

import torch
from small import SAMPLES, Rows, network
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from registry import Gradients, Registry, ResumableLoader

BATCH, BATCHES = 4, 30


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """A stream with a cursor and an epoch of its own, on which its order depends."""

    def __init__(self) -> None:
        self.epoch = self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < SAMPLES:
            self.at += 1
            i = order[self.at - 1]
            yield torch.zeros(8) + i / SAMPLES, torch.tensor(i % 2)
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


parser = argparse.ArgumentParser()
parser.add_argument("--native", action="store_true", help="save with torch.save")
parser.add_argument("--every", type=int, default=7, help="batches between two checkpoints")
parser.add_argument("--window", type=int, default=1, help="batches whose gradients are added up")
parser.add_argument("--loader", choices=("torch", "torchdata"), default="torch")
parser.add_argument("--data", choices=("plain", "draw", "stream"), default="draw")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--generator", action="store_true", help="give the loader a generator of its own")
args = parser.parse_args()


def loader_of(data: Any) -> Any:
    """The loader, in a `ResumableLoader` where the registry saves."""
    kind: Any = DataLoader
    if args.loader == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader as kind
    given = {"shuffle": True} if args.data != "stream" else {}
    if args.generator:
        given["generator"] = torch.Generator().manual_seed(0)
    made = kind(data, batch_size=BATCH, num_workers=args.workers, **given)
    return made if args.native else ResumableLoader(made)


torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)
net = network()
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES)
loader = loader_of(Stream() if args.data == "stream" else Rows(args.data == "draw"))
parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
if hasattr(loader, "state_dict"):
    parts["loader"] = loader
if not args.native and args.window > 1:
    parts["gradients"] = Gradients(net)
registry = Registry()
native = registry.root / "native.pt"
batch = 0
before = "net" if "net" in registry else None
with registry.run("net", resume=before) as run:
    if before:
        run.resumed.restore(**parts)
        batch = run.resumed.step
    elif native.exists():
        state = torch.load(native, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        batch = state["batch"]
    while batch < BATCHES:
        for x, y in loader:
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            batch += 1
            if batch % args.window == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if batch % args.every == 0 and args.native:
                state = {name: part.state_dict() for name, part in parts.items()}
                numbers = {"torch": torch.get_rng_state(), "python": random.getstate()}
                torch.save({**state, **numbers, "batch": batch}, native)
            elif batch % args.every == 0:
                run.save(**parts, step=batch)
            if batch == BATCHES:
                break
