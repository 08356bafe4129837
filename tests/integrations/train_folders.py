"""Trainings that write folders of their own, as their documentation has it: a Trainer, and a loop with Accelerate."""

from __future__ import annotations

import argparse
import random
import sys

import numpy as np
import torch
from accelerate import Accelerator
from killed import fingerprint, kill_me
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from registry import ResumableLoader

EVERY, STEPS = 7, 24

parser = argparse.ArgumentParser()
parser.add_argument("kind", choices=["trainer", "accelerate"])
parser.add_argument("folder")
parser.add_argument("--kill", type=int)
parser.add_argument("--resume")
args = parser.parse_args()
seed = 777 if args.resume else 0
torch.manual_seed(seed)
random.seed(seed)
np.random.seed(seed)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(i, i + 5), "labels": torch.tensor(i % 2)}


def by_trainer() -> str:
    # It loads slowly, and the other training does without.
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Killed(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == args.kill:
                kill_me()

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    arguments = TrainingArguments(
        args.folder,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        max_steps=STEPS,
        save_steps=EVERY,
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=EVERY,
        logging_steps=1,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[Killed()],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return fingerprint(trainer.model, trainer.optimizer.optimizer, trainer.lr_scheduler)


def by_accelerate() -> str:
    """Shuffled, with dropout and noise; Accelerate alone does not keep the position in the data."""
    accelerator = Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(rows, torch.arange(40) % 2), batch_size=4, shuffle=True)
    net, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, loader)
    loader, done = ResumableLoader(loader), Steps()
    accelerator.register_for_checkpointing(loader, done)
    if args.resume:
        accelerator.load_state(args.resume)
    while done.count < STEPS:
        for x, y in loader:
            loss = nn.functional.cross_entropy(net(x + random.random() + np.random.rand()), y)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done.count += 1
            if done.count == args.kill:
                kill_me()
            if done.count % EVERY == 0:
                accelerator.save_state(f"{args.folder}/{done.count}")
            if done.count == STEPS:
                break
    return fingerprint(accelerator.unwrap_model(net), optimizer, scheduler)


class Steps:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


ended = by_trainer() if args.kind == "trainer" else by_accelerate()
sys.stdout.write(f"\nEND {ended}\n")
