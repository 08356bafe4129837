"""Reference networks, their data, and their training loop."""

from registry.models.classifiers import ResNet18, ResNet18Config
from registry.models.lenet import LeNet5, LeNet6, LeNetConfig

__all__ = ["LeNet5", "LeNet6", "LeNetConfig", "ResNet18", "ResNet18Config"]
