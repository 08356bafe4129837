"""The pictures that training shows in TensorBoard."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from registry.models.data import SIZE, Data

_ROWS, _COLUMNS = 4, 8
"""The grid of sample predictions."""

_POINTS = 1_000
"""The most test images that an embedding shows."""


def draw_graph(writer: Any, network: nn.Module, *, channels: int, device: torch.device) -> None:
    """Show a network as a graph.

    Args:
        writer: a writer of TensorBoard, such as `run.writer`.
        channels: of the images that the network takes.
        device: the device of the network.
    """
    images = torch.zeros(1, channels, SIZE, SIZE, device=device)
    # The tracer that makes the graph warns. It must not change what training draws next.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        writer.add_graph(network, images)


def draw_predictions(writer: Any, data: Data, logits: Tensor, *, epoch: int) -> None:
    """Show some test images with their predictions, and up to 1,000 of them in the space of the logits.

    Args:
        writer: a writer of TensorBoard, such as `run.writer`.
        logits: the logits of the test images in order, float32 [samples, classes].
    """
    writer.add_figure("Testing/Predictions", figure_of_predictions(data, logits), epoch)
    features, labels, images = embedding_of(data, logits)
    writer.add_embedding(features, metadata=labels, label_img=images, global_step=epoch, tag="Testing/Logits")


def figure_of_predictions(data: Data, logits: Tensor) -> Any:
    """A figure of the first test images with their predictions. Mistakes come first, in red.

    Args:
        logits: the logits of the test images in order, float32 [samples, classes].
    """
    # Lazy: loads matplotlib.
    from matplotlib.figure import Figure

    guesses = logits.argmax(1)
    labels = labels_of(data)
    order = torch.argsort((guesses == labels).int(), stable=True)[: _ROWS * _COLUMNS]
    figure = Figure(figsize=(_COLUMNS * 1.1, _ROWS * 1.35), layout="constrained")
    axes = figure.subplots(_ROWS, _COLUMNS)
    for place in axes.flat:
        place.axis("off")
    for place, i in zip(axes.flat, order.tolist(), strict=False):
        image, label = data.test[i]
        guess = int(guesses[i])
        place.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        right = guess == int(label)
        text = data.classes[guess] if right else f"{data.classes[guess]}, is {data.classes[int(label)]}"
        place.set_title(text, fontsize=9, color="black" if right else "crimson")
    return figure


def embedding_of(data: Data, logits: Tensor) -> tuple[Tensor, list[str], Tensor]:
    """The first test images for TensorBoard's projector.

    Args:
        logits: the logits of the test images in order, float32 [samples, classes].

    Returns:
        The logits, float32 [points, classes], the names of the true classes, and the images as sprites, float32
        [points, channels, 28, 28].
    """
    count = min(len(logits), _POINTS)
    images = torch.stack([data.test[i][0] for i in range(count)])
    names = [data.classes[int(label)] for label in labels_of(data)[:count]]
    return logits[:count], names, images


def labels_of(data: Data) -> Tensor:
    """The true classes of the test images, int64 [samples]."""
    return torch.tensor([int(data.test[i][1]) for i in range(len(data.test))])  # type: ignore[arg-type]
