"""LeNet5 and LeNet6 for images of 28 by 28 pixels.

LeNet5 follows LeCun and others, "Gradient-based learning applied to document recognition" (1998), with ReLU and max
pooling. LeNet6 has one more hidden layer. Its first layers can come from a trained LeNet5.
"""

from __future__ import annotations

from typing import overload

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from registry import ModelConfig, register_model


class LeNetConfig(ModelConfig):
    """The configuration of both networks.

    Attributes:
        channels: of the images.
        classes: the number of classes.
    """

    channels: int = Field(default=1, ge=1)
    classes: int = Field(default=10, ge=2)


class _LeNet(nn.Module):
    """The shared part of both networks.

    Args:
        head: the layers after the two hidden layers of 120 and 84 units.
    """

    def __init__(self, config: LeNetConfig | None, head: list[nn.Module]) -> None:
        super().__init__()
        self.config = config or LeNetConfig()
        self.conv = nn.Sequential(
            nn.Conv2d(self.config.channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), *head
        )

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits, and with labels the loss too.

        Args:
            x: images, float32 [batch, channels, 28, 28].
            labels: classes, int64 [batch].

        Returns:
            The logits, float32 [batch, classes]. With labels, a pair: the mean cross entropy, a scalar, and the logits.
        """
        logits: Tensor = self.fc(self.conv(x))
        if labels is None:
            return logits
        return functional.cross_entropy(logits, labels), logits


@register_model("lenet5", config=LeNetConfig)
class LeNet5(_LeNet):
    """LeNet5, with 61,706 parameters for one channel and ten classes.

    Its layers are `conv.0`, `conv.3`, `fc.1` [120,400], `fc.3` [84,120] and `fc.5` [classes,84].
    """

    def __init__(self, config: LeNetConfig | None = None) -> None:
        config = config or LeNetConfig()
        super().__init__(config, [nn.Linear(84, config.classes)])


@register_model("lenet6", config=LeNetConfig)
class LeNet6(_LeNet):
    """LeNet6: as `LeNet5`, but `fc.5` is [64,84], and `fc.7` is [classes,64]."""

    def __init__(self, config: LeNetConfig | None = None) -> None:
        config = config or LeNetConfig()
        super().__init__(config, [nn.Linear(84, 64), nn.ReLU(), nn.Linear(64, config.classes)])
