"""Reference networks, their data, and their training loop.

A classifier takes images, and labels if it is to give the loss too. Training: the loop that `registry train` runs, written to
be copied. Measuring: loss and accuracy on held-out data.

It imports everything below, and no `registry.cli`. To add a network: one file, and an entry point in pyproject.toml. To add a
data set: `load` in `data`.
"""

from registry.models.lenet import LeNet5, LeNet6, LeNetConfig
from registry.models.resnet import ResNet18, ResNet18Config

__all__ = ["LeNet5", "LeNet6", "LeNetConfig", "ResNet18", "ResNet18Config"]
