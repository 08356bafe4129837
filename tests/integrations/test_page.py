"""The examples of docs/integrations.md run, with the objects that a training script has."""

from __future__ import annotations

import doctest
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from registry import Registry, integrations
from registry.live import rng

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def test_the_examples_in_the_docstrings_run() -> None:
    names = [name for _, name, _ in pkgutil.iter_modules(integrations.__path__, "registry.integrations.")]
    assert names
    for name in names:
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    downloaded = tmp_path / "artifacts" / "digits:v3"
    downloaded.mkdir(parents=True)
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, downloaded / "model.pt")
    accelerator, net = Accelerator(cpu=True), nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    there = {
        "Trainer": functools.partial(
            Trainer, accelerator="cpu", enable_progress_bar=False, limit_train_batches=2, limit_val_batches=2
        ),
        "module": BoringModel(),
        "train_loader": DataLoader(RandomDataset(32, 8)),
        "accelerator": accelerator,
        "loader": DataLoader(TensorDataset(torch.ones(100, 2))),
        "epochs": 1,
        "loss": torch.tensor(0.5),
        "model": model,
        "generator_optimizer": optimizer,
        "critic_optimizer": optimizer,
        "random_states": [rng.capture()],
        "registry": Registry(),
    }
    # These have tests of their own, with networks of these frameworks.
    apart = r"^## (transformers|PEFT)\n.*?(?=^## )"
    page = re.sub(apart, "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), there)
    registry = Registry()
    assert registry["lenet5"].epoch == 9
    assert registry["digits:v1"].lineage[0]["parent"] == "wandb:digits:v3"
    assert registry["digits:v2"].lineage[0]["parent"].startswith("mlflow:")
    assert registry["net:v1"].step == 100
    assert registry["net@best"].name == "net:v1"
    assert {"model", "optimizers", "gradients"} <= set(registry["net:v2"].components)
