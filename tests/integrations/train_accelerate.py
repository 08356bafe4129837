"""A training with Accelerate as its documentation has it, which can be killed at a step and resumed."""

from __future__ import annotations

import argparse
import logging
import random
import sys

import torch
from accelerate import Accelerator
from killed import fingerprint, kill_me
from torch import nn
from torch.utils.data import DataLoader, Dataset

from registry import Registry, ResumableLoader
from registry.integrations.accelerate import RegistryTracker, load_state, save_state

STEPS, EVERY = 24, 5


class Data(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that draw random numbers, as an augmentation does."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8) + i / 40 + random.random(), torch.tensor(i % 2)


parser = argparse.ArgumentParser()
parser.add_argument("root")
parser.add_argument("--kill", type=int)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--native", action="store_true")
parser.add_argument("--plain", action="store_true")
parser.add_argument("--silent", action="store_true", help="save nothing")
parser.add_argument("--early", action="store_true", help="do not wait for the last save before the kill")
parser.add_argument("--workers", type=int, default=0)
args = parser.parse_args()
logging.disable(logging.INFO)

torch.manual_seed(777 if args.resume else 0)
random.seed(777 if args.resume else 0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
loader = DataLoader(Data(), batch_size=4, shuffle=True, num_workers=args.workers)
net, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, loader)
if not args.plain:
    loader = ResumableLoader(loader)
    accelerator.register_for_checkpointing(loader)
registry = Registry(args.root)
folder = f"{args.root}-native"

with registry.run("net", resume="net" if args.resume and not args.native else None) as run:
    tracker = RegistryTracker(run)
    step = 0
    if args.resume and args.native:
        accelerator.load_state(folder)
        step = args.kill // EVERY * EVERY
    elif args.resume:
        load_state(registry["net@latest"], accelerator)
        step = registry["net@latest"].step
    while step < STEPS:
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            tracker.log({"loss": loss.item()}, step=step)
            if step == args.kill and not args.resume:
                if not args.early:
                    run.wait()
                kill_me()
            if step % EVERY == 0 and args.native:
                accelerator.save_state(folder)
            elif step % EVERY == 0 and not args.silent:
                save_state(run, accelerator, step=step, loss=loss.item(), wait=False)
            if step == STEPS:
                break
ended = fingerprint(accelerator.unwrap_model(net), optimizer, scheduler)
# In one piece, as several processes write at once.
sys.stdout.write(f"\nEND {accelerator.process_index} {ended}\n")
