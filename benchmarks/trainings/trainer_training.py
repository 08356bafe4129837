"""A training with the Trainer of transformers that resumes from its last checkpoint: of the registry, or with `--native`
its own folder."""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from registry import Registry
from registry.integrations.transformers import RegistryCallback, ResumableData, checkout

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 2,
    "pad_token_id": 0,
}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Samples of which some draw random numbers, as an augmentation does."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(8) * (i + 3)) % 39 + 1
        if self.draws:
            words[torch.randint(8, ())] = torch.randint(1, 40, ())
        return {"input_ids": words, "labels": torch.tensor(i % 2)}


class OurTrainer(ResumableData, Trainer):  # type: ignore[misc]
    """A Trainer for data that draw random numbers."""


parser = argparse.ArgumentParser()
parser.add_argument("--native", action="store_true", help="resume from the Trainer's own folder")
parser.add_argument("--every", type=int, default=7, help="steps between two checkpoints")
parser.add_argument("--mixtral", action="store_true")
parser.add_argument("--draws", action="store_true", help="let the data draw random numbers")
parser.add_argument("--seeded", action="store_true", help="seed a process that resumes otherwise")
args = parser.parse_args()

torch.set_num_threads(1)
set_seed(0)
if args.mixtral:
    more = {"num_local_experts": 4, "num_key_value_heads": 2}
    model = MixtralForSequenceClassification(MixtralConfig(**SMALL, **more, attention_dropout=0.1))
else:
    model = BertForSequenceClassification(BertConfig(**SMALL))
registry = Registry()
native = registry.root / "native"
arguments = TrainingArguments(
    str(native),
    num_train_epochs=3,
    per_device_train_batch_size=4,
    save_steps=args.every,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
kind = OurTrainer if args.draws and not args.native else Trainer
callbacks = [] if args.native else [RegistryCallback("net", registry)]
trainer = kind(model, arguments, train_dataset=Sentences(args.draws), callbacks=callbacks)
has_checkpoint = get_last_checkpoint(str(native)) if native.exists() else None
if args.seeded and has_checkpoint:
    torch.manual_seed(777)
trainer.train(resume_from_checkpoint=has_checkpoint if args.native else checkout("net@latest", registry))
