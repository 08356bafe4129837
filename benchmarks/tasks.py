"""Small networks with something real to learn, for the series of checkpoints that are measured.

A series tells little if most of a network never gets a gradient: its moments stay zero, and any coding looks good. Digits of
32 pixels leave a ResNet18 maps of a single pixel, so that eight of nine taps of its late kernels are idle; at 64 pixels all of
them learn. So does a transformer over the bytes that its text has.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from registry.models import data
from registry.models.resnet import ResNet18, ResNet18Config

BATCH = 32
"""Images of a batch."""

STEPS = 3
"""Steps from one checkpoint of a series to the next."""

_LENGTH = 128
"""Bytes of a text that the transformer sees at a time."""

_TEXTS = 8
"""Texts of a batch."""

State = dict[str, Any]
Loss = Callable[[nn.Module, int], torch.Tensor]
"""Gives the loss of a network on a batch, by the batch's number."""


@dataclass(frozen=True, slots=True)
class Task:
    """A network that was trained for a while, and what it learns.

    Attributes:
        name: of the network, for tables.
        settling: steps with a new optimizer before the first checkpoint of a series.
    """

    name: str
    network: nn.Module
    loss: Loss
    settling: int


def digits(pixels: int) -> Task:
    """A ResNet18 that has seen 40 batches of handwritten digits, scaled to some pixels a side."""
    torch.manual_seed(0)
    found = data.load("digits", None, seed=0)
    loader = torch.utils.data.DataLoader(found.train, BATCH, shuffle=True, drop_last=True)
    batches = [(_scaled(images, pixels), labels) for images, labels in loader]

    def loss(network: nn.Module, number: int) -> torch.Tensor:
        images, labels = batches[number % len(batches)]
        return functional.cross_entropy(network(images), labels)

    network = ResNet18(ResNet18Config(channels=1))
    _train(network, torch.optim.AdamW(network.parameters(), 1e-3), loss, range(40))
    return Task(f"ResNet18, {pixels} pixels", network, loss, settling=STEPS)


def _scaled(images: torch.Tensor, pixels: int) -> torch.Tensor:
    return functional.interpolate(images, (pixels, pixels), mode="bilinear", align_corners=False)


def text() -> Task:
    """A transformer of 4.8 million parameters that has seen 120 batches of the source of Python's standard library."""
    torch.manual_seed(0)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = b"".join(path.read_bytes() for path in sources)[:1_000_000]
    # Only bytes that occur, as the row of another one would never get a gradient.
    known, codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).unique(return_inverse=True)
    chance = torch.Generator().manual_seed(1)
    places = torch.randint(len(codes) - _LENGTH - 1, (1_000, _TEXTS), generator=chance)

    def loss(network: nn.Module, number: int) -> torch.Tensor:
        starts = places[number % len(places)]
        read = torch.stack([codes[start : start + _LENGTH + 1] for start in starts.tolist()])
        return functional.cross_entropy(network(read[:, :-1]).flatten(0, 1), read[:, 1:].flatten())

    network = Transformer(len(known))
    _train(network, torch.optim.AdamW(network.parameters(), 1e-3), loss, range(120))
    return Task("GPT, bytes", network, loss, settling=60)


class Transformer(nn.Module):
    """A decoder of six layers, as in GPT-2, over symbols int64 [batch, length]; gives float32 [batch, length, symbols]."""

    def __init__(self, symbols: int, width: int = 256, layers: int = 6) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Embedding(_LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, read: torch.Tensor) -> torch.Tensor:
        """The logits of the symbol behind each."""
        length = read.shape[1]
        hidden = self.symbol(read) + self.place(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        logits: torch.Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return logits


def frozen(task: Task) -> Iterator[State]:
    """Checkpoints of a ResNet18 of which only the last layer is trained on. BatchNorm layers stay as they are."""
    model = copy.deepcopy(task.network)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    model.eval()
    head: Any = model.fc
    return _checkpoints(model, torch.optim.AdamW(head.parameters(), 1e-3), task.loss)


def fine_tuned(task: Task, rate: float) -> Iterator[State]:
    """Checkpoints of a network that AdamW trains on, wholly. Each is valid until the next one.

    Args:
        rate: the learning rate.
    """
    model = copy.deepcopy(task.network)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    _train(model, optimizer, task.loss, range(task.settling - STEPS))
    return _checkpoints(model, optimizer, task.loss)


def parameters_as(state: State, dtype: torch.dtype) -> State:
    """A checkpoint's network alone, with its floats in another type."""
    model = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state["model"].items()}
    return {"model": model}


def _checkpoints(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> Iterator[State]:
    done = 0
    while True:
        _train(model, optimizer, loss, range(done, done + STEPS))
        yield {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        done += STEPS


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, batches: range) -> None:
    for number in batches:
        value = loss(model, number)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
