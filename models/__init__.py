"""Reference networks, their data, and their training loop.

A classifier takes images and gives logits. With labels it also gives the loss. Training is the loop that
`registry train` runs; you can copy it. Measuring gives the loss and the accuracy on held-out data.

It may import every layer below, and not `registry.cli`. To add a network, write one file and add an entry point to
pyproject.toml. To add a data set, extend `load` in `data`.
"""

from registry.models.lenet import LeNet5, LeNet6, LeNetConfig
from registry.models.resnet import ResNet18, ResNet18Config

__all__ = ["LeNet5", "LeNet6", "LeNetConfig", "ResNet18", "ResNet18Config"]
