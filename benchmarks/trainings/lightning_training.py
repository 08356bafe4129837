"""A training with Lightning that resumes from its last checkpoint: of the registry, or with `--native` a file of Lightning."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Rows, network
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from registry import Registry, ResumableLoader
from registry.integrations.lightning import RegistryCheckpoint

EPOCHS, EPOCH = 3, 10


class Net(LightningModule):
    """A small network with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * EPOCH)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


parser = argparse.ArgumentParser()
parser.add_argument("--native", action="store_true", help="save files of Lightning")
parser.add_argument("--every", type=int, default=7, help="steps between two checkpoints")
parser.add_argument("--loader", choices=["plain", "stateful", "resumable", "both"], default="plain")
parser.add_argument("--workers", type=int, default=0)
args = parser.parse_args()

torch.set_num_threads(1)
seed_everything(0, verbose=False)
loader: Any = (StatefulDataLoader if args.loader in ("stateful", "both") else DataLoader)(
    Rows(), batch_size=4, shuffle=True, num_workers=args.workers
)
registry = Registry()
native = registry.root / "native"
saving = ModelCheckpoint(native, save_top_k=-1, every_n_train_steps=args.every)
settings = {
    "max_epochs": EPOCHS,
    "accelerator": "cpu",
    "callbacks": [saving],
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
if args.native:
    trainer = Trainer(**settings, logger=False)
    latest = max(native.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
else:
    kept = RegistryCheckpoint("net", registry)
    trainer = Trainer(**kept.for_trainer(**settings))
    latest = kept.latest
    if args.loader in ("resumable", "both"):
        loader = ResumableLoader(loader)
trainer.fit(Net(), loader, ckpt_path=latest)
