"""Reference networks, their data, and their training loop."""

from registry.models.lenet import LeNet5, LeNet6, LeNetConfig
from registry.models.resnet import ResNet18, ResNet18Config

__all__ = ["LeNet5", "LeNet6", "LeNetConfig", "ResNet18", "ResNet18Config"]
