"""What the trainings beside train: a small network, and samples."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.utils.data import Dataset

SAMPLES = 40


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that may draw random numbers, as an augmentation does."""

    def __init__(self, draws: bool = True) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(8) + random.random() if self.draws else torch.zeros(8)
        return noise + i / SAMPLES, torch.tensor(i % 2)


def network() -> nn.Sequential:
    """A network with BatchNorm and dropout."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
