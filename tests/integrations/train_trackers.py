"""A program that saves a version, and is killed while MLflow is told of it."""

from __future__ import annotations

from pathlib import Path

import mlflow
import torch
from killed import kill_me
from mlflow import MlflowClient

from registry import Registry
from registry.integrations.mlflow import log


def main(words: list[str]) -> str:
    """Save and log a version; the words are a folder, the store of MLflow, a model, and how to be killed."""
    folder, store, model, *kill = words
    mlflow.set_tracking_uri(store)
    registry = Registry(Path(folder))
    if model not in registry:
        registry.save(model, {"model": {"w": torch.ones(3)}}, loss=0.5)
        registry.set_alias(model, "good")
    for method in kill:
        setattr(MlflowClient, method, lambda *_, **__: kill_me())
    with mlflow.start_run():
        made = log(model, registry)
    return f"{made.version} {' '.join(made.aliases)}" if made else "failed"
