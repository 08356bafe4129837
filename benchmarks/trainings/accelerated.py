"""A training with Accelerate that resumes from its last checkpoint: of the registry, or with `--native` of Accelerate."""

from __future__ import annotations

import argparse
import random

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from small import Rows, network
from torch import nn
from torch.utils.data import DataLoader

from registry import Registry, ResumableLoader
from registry.integrations.accelerate import load_state, save_state

BATCHES, EPOCH = 30, 10


class Progress:
    """How many batches are done."""

    batch = 0

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"]


parser = argparse.ArgumentParser()
parser.add_argument("--native", action="store_true", help="save with accelerator.save_state")
parser.add_argument("--every", type=int, default=7, help="batches between two checkpoints")
parser.add_argument("--window", type=int, default=1, help="batches whose gradients are added up")
parser.add_argument("--stateful", action="store_true", help="let Accelerate take the loader of torchdata")
parser.add_argument("--workers", type=int, default=0)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)
accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=args.window,
    dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=args.stateful),
)
net = network()
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES)
loader = DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=args.workers)
net, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, loader)
done = Progress()
accelerator.register_for_checkpointing(done)
if not args.native:
    loader = ResumableLoader(loader)
    accelerator.register_for_checkpointing(loader)
registry = Registry()
native = registry.root / "native"
before = "net" if "net" in registry else None
skipped = 0
with registry.run("net", resume=before) as run:
    if before:
        load_state(run.resumed, accelerator)
    elif native.exists():
        accelerator.load_state(str(native))
        # The loader of torchdata keeps its position itself.
        skipped = 0 if args.stateful else done.batch % EPOCH
    while done.batch < BATCHES:
        batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        skipped = 0
        for x, y in batches:
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            done.batch += 1
            if done.batch % args.every == 0 and args.native:
                accelerator.save_state(str(native))
            elif done.batch % args.every == 0:
                save_state(run, accelerator, step=done.batch)
            if done.batch == BATCHES:
                break
