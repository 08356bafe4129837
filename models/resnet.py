"""Torchvision's ResNet18 with another number of classes, the usual start of a transfer."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from registry import Config, freeze, register_model
from registry.models.classifiers import replace_head


class ResNet18Config(Config):
    """The configuration of the network.

    Attributes:
        classes: the number of classes.
        channels: of the images.
        frozen: whether all layers but the last are frozen.
    """

    classes: int = Field(default=10, ge=2)
    channels: int = Field(default=3, ge=1)
    frozen: bool = False


@register_model("resnet18", config=ResNet18Config)
class ResNet18(nn.Module):
    """Torchvision's ResNet18 with a last layer of `classes` rows.

    Its tensors have torchvision's names, so torchvision's pretrained weights fit.
    """

    def __init__(self, config: ResNet18Config | None = None) -> None:
        # Lazy: loads torchvision.
        from torchvision.models import resnet18

        super().__init__()
        self.config = config or ResNet18Config()
        network = resnet18(weights=None)
        if self.config.channels != 3:
            network.conv1 = nn.Conv2d(
                self.config.channels, 64, kernel_size=7, stride=2, padding=3, bias=False
            )
        replace_head(network, self.config.classes, "fc")
        for name, part in network.named_children():
            self.add_module(name, part)
        if self.config.frozen:
            freeze(self, "first:-1")

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Compute the logits, and with labels the loss too.

        Args:
            x: images, float32 [batch, channels, height, width], of at least 32 by 32 pixels.
            labels: classes, int64 [batch].

        Returns:
            The logits, float32 [batch, classes]. With labels, a pair: the mean cross entropy, a scalar, and the logits.
        """
        for name, part in self.named_children():
            x = part(torch.flatten(x, 1) if name == "fc" else x)
        logits = x
        return logits if labels is None else (functional.cross_entropy(logits, labels), logits)
