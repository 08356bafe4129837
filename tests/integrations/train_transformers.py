"""A training with the Trainer of transformers, which can be killed at a step and resumed."""

from __future__ import annotations

import argparse
import logging
import random
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from killed import fingerprint, kill_me
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from registry import Registry
from registry.integrations.transformers import RegistryCallback, ResumableData, checkout


class Data(Dataset[dict[str, torch.Tensor]]):
    """Sentences of random words, 7 batches of 4; they are other words each time if `draws` is true."""

    def __init__(self, draws: bool, has_classes: bool) -> None:
        self.draws = draws
        self.has_classes = has_classes

    def __len__(self) -> int:
        return 28

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = None if self.draws else torch.Generator().manual_seed(i)
        ids = torch.randint(5, 60, (8,), generator=generator)
        labels = torch.tensor(i % 2) if self.has_classes else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def network(kind: str) -> torch.nn.Module:
    """A tiny network with dropout and random parameters; `adapter` is GPT2 under LoRA."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**small, intermediate_size=32))
    if kind == "mixtral":
        experts = {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 24}
        return MixtralForCausalLM(MixtralConfig(**small, **experts, **ends, attention_dropout=0.1))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, **ends))
    if kind == "gpt2":
        return gpt
    return get_peft_model(gpt, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.2))


def arguments(root: Path, **others: Any) -> TrainingArguments:
    """Arguments of a training of three epochs on the CPU."""
    return TrainingArguments(
        str(root / "out"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **others,
    )


def main(words: Sequence[str]) -> str:
    """Train; returns the last step and a fingerprint of network, optimizer and scheduler."""
    args = _parsed(words)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    class Killed(Trainer):
        def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
            if args.kill == self.state.global_step:
                kill_me()
            return super().training_step(*given, **named)

        def _save_rng_state(self, folder: str) -> None:
            if args.inside == self.state.global_step:
                kill_me()
            super()._save_rng_state(folder)

    class Drawing(ResumableData, Killed):
        pass

    set_seed(0)
    model, data = network(args.network), Data(args.draw, has_classes=args.network == "bert")
    root = Path(args.root)
    registry = Registry(root / "registry")
    callback = RegistryCallback("net", registry, monitor="eval_loss", keep_last=2, wait=not args.behind)
    trainer = (Drawing if args.draw and not args.plain else Killed)(
        model,
        arguments(
            root,
            gradient_accumulation_steps=args.window,
            save_strategy="no" if args.silent else "steps",
            save_steps=args.every,
            save_total_limit=1,
            eval_strategy="steps",
            eval_steps=args.every,
            dataloader_num_workers=args.workers,
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[] if args.native or args.silent else [callback],
    )
    start: str | bool = False
    if args.resume:
        set_seed(777)
        random.seed(777)
        start = True if args.native else checkout("net@latest", registry)
    trainer.train(resume_from_checkpoint=start)
    state = trainer.state
    return (
        f"{state.global_step} {state.epoch:.3f} {fingerprint(model, trainer.optimizer, trainer.lr_scheduler)}"
    )


def _parsed(words: Sequence[str]) -> Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--network", choices=("bert", "gpt2", "mixtral", "adapter"), default="bert")
    parser.add_argument("--every", type=int, default=4, help="steps between two saves; an epoch has 7")
    parser.add_argument("--kill", type=int)
    parser.add_argument(
        "--inside", type=int, help="the step at which it is killed while the Trainer writes its folder"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--native", action="store_true", help="the Trainer's own checkpoints, without ours")
    parser.add_argument("--silent", action="store_true", help="save nothing")
    parser.add_argument("--behind", action="store_true", help="do not wait for saves")
    parser.add_argument("--draw", action="store_true", help="the data draw random numbers")
    parser.add_argument("--plain", action="store_true", help="the Trainer's own loader for data that draw")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--window", type=int, default=1, help="batches whose gradients are accumulated")
    return parser.parse_args(words)
