"""Small trainings, one for each integration, that say which versions were acknowledged and can be stopped before a save.

Run again with the same folder, each goes on from what it finds there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from accelerate import Accelerator
from killed import fingerprint
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - loaded once, not in each process
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import set_verbosity_error

from registry import Registry, ResumableLoader
from registry.checkpoints.checkpoint import Checkpoint
from registry.integrations.accelerate import load_state, save_state
from registry.integrations.lightning import RegistryCheckpoint
from registry.integrations.peft import adapter
from registry.integrations.transformers import RegistryCallback, checkout

STEPS, EVERY = 10, 2
RULES: dict[str, Any] = {"monitor": "loss", "keep_last": 2}


class Saves:
    """The saves of a training, as the test hears of them.

    Args:
        test: where the test listens. It gets the id of each version that was acknowledged.
        stop: the number of the save before which the training waits for the test. Before the one after it, the program ends.
    """

    def __init__(self, test: Connection, stop: int | None) -> None:
        self._test = test
        self._stop = stop
        self._begun = 0

    def begin(self) -> None:
        self._begun += 1
        if self._begun == self._stop:
            self._test.send("ready")
            self._test.recv()
        elif self._stop is not None and self._begun > self._stop:
            os._exit(0)

    def acknowledged(self, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        self._test.send(checkpoint.id)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def data() -> TensorDataset:
    """Five batches of four."""
    return TensorDataset(torch.linspace(-1, 1, 160).reshape(20, 8), torch.arange(20) % 2)


def lightning(root: Path, saves: Saves, **kept: Any) -> str:
    """A checkpoint every two steps, with the pointers `last.ckpt` and one more for each."""

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    class Told(ModelCheckpoint):
        def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
            if self._last_global_step_saved != trainer.global_step:
                saves.begin()
            super()._save_checkpoint(trainer, filepath)
            saves.acknowledged(checkpoint.registry["net@latest"])

    rules = RULES if not kept else {}
    checkpoint = RegistryCheckpoint("net", Registry(root / "registry"), **rules)
    callback = Told(every_n_train_steps=EVERY, save_last=True, **(kept or {"save_top_k": -1}))
    trainer = L.Trainer(
        **checkpoint.for_trainer(
            max_steps=STEPS,
            accelerator="cpu",
            default_root_dir=root,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
    )
    net = Net()
    loader = ResumableLoader(DataLoader(data(), batch_size=4, shuffle=True))
    trainer.fit(net, loader, ckpt_path=checkpoint.latest, weights_only=False)
    return fingerprint(net, *trainer.optimizers)


def lightning_best(root: Path, saves: Saves) -> str:
    """The same, where Lightning removes what is not the best."""
    return lightning(root, saves, monitor="loss", save_top_k=1)


def transformers(root: Path, saves: Saves) -> str:
    """Versions beside the Trainer's own folders, of which one stays."""

    class Told(Trainer):
        def _save_checkpoint(self, *given: Any) -> None:
            saves.begin()
            super()._save_checkpoint(*given)

    class Acknowledged(TrainerCallback):
        def on_save(self, *given: Any, **named: Any) -> None:
            assert callback.run is not None
            saves.acknowledged(callback.run.wait())

    registry = Registry(root / "registry")
    callback = RegistryCallback("net", registry, **RULES)
    arguments = TrainingArguments(
        str(root / "out"),
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(160).reshape(20, 8) % 60]
    trainer = Told(gpt(), arguments, train_dataset=rows, callbacks=[callback, Acknowledged()])
    trainer.train(resume_from_checkpoint=checkout("net@latest", registry))
    return fingerprint(trainer.model, trainer.optimizer, trainer.lr_scheduler)


def accelerate(root: Path, saves: Saves) -> str:
    """The loop of the page."""
    accelerator, net = Accelerator(cpu=True, gradient_accumulation_steps=3), network()
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.AdamW(net.parameters(), 1e-2), DataLoader(data(), batch_size=4, shuffle=True)
    )
    loader = ResumableLoader(loader)
    accelerator.register_for_checkpointing(loader)
    registry = Registry(root / "registry")
    with registry.run("net", resume="net@latest" if "net" in registry else None, **RULES) as run:
        if run.resumed:
            load_state(run.resumed, accelerator)
        for step, (x, y) in _steps(run, loader):
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if step % EVERY == 0:
                saves.begin()
                saves.acknowledged(save_state(run, accelerator, step=step, loss=loss.item()))
    return fingerprint(accelerator.unwrap_model(net), optimizer)


def peft(root: Path, saves: Saves) -> str:
    """An adapter over a base network that is saved once."""
    registry, net = Registry(root / "registry"), gpt(seed=0)
    if "base" not in registry:
        with registry.run("base") as run:
            run.save(model=net)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.2))
    part = adapter(model, base=registry["base"])
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    loader = ResumableLoader(DataLoader(torch.arange(160).reshape(20, 8) % 60, batch_size=4, shuffle=True))
    with registry.run("net", resume="net@latest" if "net" in registry else None, **RULES) as run:
        if run.resumed:
            run.resumed.restore(adapter=part, optimizer=optimizer, loader=loader)
        for step, ids in _steps(run, loader):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % EVERY == 0:
                saves.begin()
                saved = run.save(
                    adapter=part, optimizer=optimizer, loader=loader, step=step, loss=loss.item()
                )
                saves.acknowledged(saved)
    return fingerprint(part, optimizer)


def gpt(seed: int | None = None) -> GPT2LMHeadModel:
    """A tiny network with dropout."""
    if seed is not None:
        torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2, **ends))


def _steps(run: Any, loader: Any) -> Iterator[tuple[int, Any]]:
    """The batches that are left, each with the number of its step."""
    step = run.resumed.step if run.resumed else 0
    while step < STEPS:
        for batch in loader:
            step += 1
            yield step, batch
            if step == STEPS:
                break


TRAININGS: dict[str, Callable[[Path, Saves], str]] = {
    training.__name__: training for training in (lightning, lightning_best, transformers, accelerate, peft)
}


def main(name: str, root: str, test: Connection, stop: int | None) -> None:
    """Train; the test gets a fingerprint of how it ended, last."""
    torch.set_num_threads(1)
    set_verbosity_error()
    # A training that goes on has other random numbers before.
    seed = 777 if Path(root, "registry").exists() else 0
    torch.manual_seed(seed)
    random.seed(seed)
    test.send(TRAININGS[name](Path(root), Saves(test, stop)))
