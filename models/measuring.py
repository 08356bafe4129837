"""Measuring a network on held-out data, in one process or in several together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from registry.live import ranks


@torch.inference_mode()
def evaluate(network: nn.Module, data: Any, batch_size: int = 256) -> tuple[float, float, Tensor]:
    """Measure a network on a data set. The network's mode and the random numbers stay as they were.

    Args:
        network: a network that takes images and labels, and gives the mean loss of the batch and the logits.
        data: a data set of pairs of an image and its class.
        batch_size: samples of a batch.

    Returns:
        The mean loss, the accuracy from 0 to 1, and the logits, float32 [samples, classes] on the CPU.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    losses, right, outputs = 0.0, 0, []
    # A `DataLoader` draws a random number. Evaluation must not change what training draws next.
    with torch.random.fork_rng(devices=()):
        for images, labels in DataLoader(data, batch_size):
            labels = labels.to(device)
            loss, logits = network(images.to(device), labels)
            losses += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            outputs.append(logits.cpu())
    network.train(training)
    count = sum(map(len, outputs))
    return losses / count, right / count, torch.cat(outputs)


def evaluate_together(network: nn.Module, data: Any, batch_size: int = 256) -> tuple[float, float]:
    """Measure a network on a data set, of which each process takes its share.

    Args:
        network, data, batch_size: as for `evaluate`.

    Returns:
        The mean loss, and the accuracy from 0 to 1, over the whole data set.
    """
    count = ranks.count()
    if count == 1:
        return evaluate(network, data, batch_size)[:2]
    # All processes test the network that the leading process saves.
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
    share = range(ranks.mine(), len(data), count)
    loss, accuracy = evaluate(network, Subset(data, share), batch_size)[:2] if share else (0.0, 0.0)
    device = next(network.parameters()).device
    sums = torch.tensor([loss * len(share), accuracy * len(share)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return tuple((sums / len(data)).tolist())


def mean_over_ranks(loss: Tensor, accuracy: Tensor, signal: int) -> tuple[float, float, int | None]:
    """Share between the processes what each measured on a batch, and whether it was told to stop.

    Args:
        loss, accuracy: the scalars of this process.
        signal: the number of a signal that this process received, or 0.

    Returns:
        The mean loss, the mean accuracy, and a signal that any process received; None if none did.
    """
    if ranks.count() == 1:
        return loss.item(), accuracy.item(), signal or None
    mine = torch.stack([loss.detach().float(), accuracy, accuracy.new_tensor(signal)])
    all_of_them = [torch.empty_like(mine) for _ in range(ranks.count())]
    dist.all_gather(all_of_them, mine)
    losses, accuracies, signals = torch.stack(all_of_them).T
    return losses.mean().item(), accuracies.mean().item(), int(signals.max().item()) or None
