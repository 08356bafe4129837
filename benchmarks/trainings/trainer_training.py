"""A training with the Trainer of transformers that resumes from its last checkpoint: of the registry, or with `--native` a folder."""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from registry import Registry
from registry.integrations.transformers import RegistryCallback, ResumableData, checkout

WORDS = 64


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Sentences of 8 words; they are other words each time if they are drawn."""

    def __init__(self, draws: bool, has_classes: bool) -> None:
        self.draws = draws
        self.has_classes = has_classes

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = None if self.draws else torch.Generator().manual_seed(i)
        words = torch.randint(WORDS, (8,), generator=generator)
        return {"input_ids": words, "labels": torch.tensor(i % 2) if self.has_classes else words}


class TrainerOfDrawnData(ResumableData, Trainer):
    """A Trainer whose loader is a `ResumableLoader`."""


def tiny(kind: str) -> nn.Module:
    """A network with dropout and random parameters; `lora` is BERT under an adapter of PEFT."""
    small = {"vocab_size": WORDS, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    if kind == "mixtral":
        experts = {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 32}
        return MixtralForCausalLM(MixtralConfig(**small, **experts, attention_dropout=0.1))
    bert = BertForSequenceClassification(BertConfig(**small, intermediate_size=32))
    if kind == "bert":
        return bert
    return get_peft_model(bert, LoraConfig(target_modules=["query", "value"], lora_dropout=0.1))


parser = argparse.ArgumentParser()
parser.add_argument("--native", action="store_true", help="resume from the Trainer's own folders")
parser.add_argument("--every", type=int, default=7, help="steps between two checkpoints")
parser.add_argument("--network", choices=("bert", "mixtral", "lora"), default="bert")
parser.add_argument("--data", choices=("plain", "draw"), default="plain")
parser.add_argument("--loader", choices=("trainer", "resumable"), default="trainer")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--seed", type=int, help="a seed that is set before training is resumed")
args = parser.parse_args()

torch.set_num_threads(1)
set_seed(0)
registry = Registry()
native = registry.root / "native"
folder = get_last_checkpoint(native) if native.is_dir() else None
kind = TrainerOfDrawnData if args.loader == "resumable" and not args.native else Trainer
trainer = kind(
    tiny(args.network),
    TrainingArguments(
        str(native),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        save_steps=args.every,
        dataloader_num_workers=args.workers,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=Sentences(args.data == "draw", has_classes=args.network != "mixtral"),
    callbacks=[] if args.native else [RegistryCallback("net", registry)],
)
if args.seed is not None and folder:
    set_seed(args.seed)
trainer.train(resume_from_checkpoint=folder if args.native else checkout("net@latest", registry))
