"""A training with Lightning as its documentation has it, which can be killed at a step and resumed.

Loading Lightning takes longer than the training, so one call asks for several, with `then` between their words. Each has
a process of its own, forked before anything was computed.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from killed import fingerprint, kill_me
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - loaded once, not in each process
from torchdata.stateful_dataloader import StatefulDataLoader

from registry import Registry, ResumableLoader
from registry.integrations import pointers
from registry.integrations.lightning import RegistryCheckpoint

EPOCHS = 3


class Data(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that draw random numbers, as an augmentation does."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8) + i / 40, torch.tensor(i % 2)


class Net(L.LightningModule):
    def __init__(self, args: argparse.Namespace, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters("lr")
        self.args = args
        self.automatic_optimization = not args.two
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
        )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.args.two:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if self.trainer.fit_loop.total_batch_idx == self.args.kill and not self.args.resume:
            kill_me()

    def configure_optimizers(self) -> Any:
        if self.args.two:
            first, last = self.net[:2].parameters(), self.net[2:].parameters()
            return torch.optim.AdamW(first, self.hparams.lr), torch.optim.SGD(last, self.hparams.lr)
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        if self.args.onecycle:
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def words_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--kill", type=int)
    parser.add_argument(
        "--early", type=int, help="be killed in the save of this step, before its pointer is written"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--silent", action="store_true", help="train without any checkpoint")
    parser.add_argument("--every", type=int, help="save every so many steps, not at the end of each epoch")
    parser.add_argument("--loader", default="plain")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--two", action="store_true", help="two optimizers")
    parser.add_argument("--onecycle", action="store_true")
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--validate", type=float, help="validate inside an epoch, after this part of it")
    parser.add_argument("--top", type=int, default=-1)
    parser.add_argument("--reference", default="net@latest")
    parser.add_argument("--count", type=int, default=1)
    return parser.parse_args(argv)


def loader(args: argparse.Namespace) -> Any:
    kind = StatefulDataLoader if args.loader.endswith("stateful") else DataLoader
    is_wrapped = args.loader.startswith("resumable")
    order: dict[str, Any] = {"shuffle": True}
    if is_wrapped and args.count > 1:
        order = {"sampler": DistributedSampler(Data(), args.count, int(os.environ["RANK"]))}
    made = kind(Data(), batch_size=4, num_workers=args.workers, **order)
    return ResumableLoader(made) if is_wrapped else made


def trainer_of(args: argparse.Namespace) -> L.Trainer:
    keep = {"every_n_train_steps": args.every} if args.every else {}
    monitor = {"monitor": "val/loss"} if args.validate else {}
    callback = ModelCheckpoint(save_last=True, save_top_k=args.top, **monitor, **keep)
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": args.count,
        "default_root_dir": args.root,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": args.window,
        "log_every_n_steps": 2,
        "limit_val_batches": 0 if args.every else 2,
        "val_check_interval": args.validate,
        "strategy": "ddp" if args.count > 1 else "auto",
    }
    if args.silent:
        return L.Trainer(**settings, logger=False, enable_checkpointing=False)
    if args.native:
        return L.Trainer(**settings, logger=False, callbacks=[callback])
    kept = RegistryCheckpoint("net", Registry(Path(args.root, "registry")))
    return L.Trainer(**kept.for_trainer(**settings, callbacks=[callback]))


def main(number: int, argv: list[str]) -> None:
    args = words_of(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Each of several processes has numbers of its own.
    L.seed_everything((777 if args.resume else 0) + int(os.environ.get("RANK", "0")), verbose=False)
    trainer, net = trainer_of(args), Net(args)
    if args.early and not args.resume:
        write_file = pointers.write_file

        def write(*given: Any) -> None:
            if trainer.global_step == args.early:
                kill_me()
            write_file(*given)

        pointers.write_file = write
    reference = None
    if args.resume and args.native:
        reference = str(next(Path(args.root, "checkpoints").glob("last*.ckpt")))
    elif args.resume:
        reference = args.reference
    data = loader(args), DataLoader(Data(), batch_size=8)
    trainer.fit(net, *data, ckpt_path=reference, weights_only=False)
    ended = fingerprint(net, *trainer.optimizers, *(one.scheduler for one in trainer.lr_scheduler_configs))
    # In one piece, as several processes write at once.
    sys.stdout.write(f"\nEND {number:02} {trainer.global_rank} {trainer.global_step} {ended}\n")
    sys.stdout.flush()


def in_child(number: int, argv: list[str]) -> None:
    """Train in a process of its own; the end of one that is killed is a line too."""
    child = os.fork()
    if child == 0:
        # Each training of several processes meets at a place of its own.
        port = int(os.environ.get("MASTER_PORT", "0")) + 1 + number
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        status = 1
        try:
            main(number, argv)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        sys.stdout.write(f"\nEND {number:02} killed\n")
    elif status:
        sys.exit(status)


if __name__ == "__main__":
    groups = itertools.groupby(sys.argv[1:], "then".__eq__)
    for number, argv in enumerate([list(group) for is_mark, group in groups if not is_mark]):
        in_child(number, argv)
