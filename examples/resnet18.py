"""Take ResNet18 from one task to another: from scratch, fine-tuned, and with everything but the new head frozen.

With the pretrained weights of ImageNet, and with CIFAR-10 in a folder:

    registry import torchvision:resnet18 --weights IMAGENET1K_V1 --name resnet18-imagenet
    python examples/resnet18.py --source resnet18-imagenet --cifar10 DIR

The example runs without either. It then trains ResNet18 on the digits 0 to 4, and takes it to the digits 5 to 9.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from registry import Registry, TransferPlan, check_optimizer, frozen_proof, param_groups, plan_transfer
from registry.models import ResNet18, ResNet18Config, data
from registry.models.measuring import evaluate
from registry.transfer.curves import curves, table

Task = tuple[
    TensorDataset | Subset[tuple[Tensor, Tensor]], TensorDataset | Subset[tuple[Tensor, Tensor]], int
]
"""The images to train on, the images to test on, and the number of classes."""


def digits(first: int) -> Task:
    """Five of the digits, as colour images, float32 [3, 32, 32].

    Args:
        first: the first of the five digits. It becomes class 0.
    """
    found = data.load("digits")
    parts = []
    for part in (found.train, found.test):
        images, labels = part.tensors  # type: ignore[attr-defined]
        chosen = (labels >= first) & (labels < first + 5)
        grey = torch.nn.functional.interpolate(images[chosen], size=(32, 32))
        parts.append(TensorDataset(grey.expand(-1, 3, -1, -1), labels[chosen] - first))
    return parts[0], parts[1], 5


def cifar10(folder: Path) -> Task:
    """CIFAR-10, from a folder in torchvision's layout."""
    found = data.load("cifar10", folder)
    return found.train, found.test, 10  # type: ignore[return-value]


def train(
    registry: Registry,
    name: str,
    network: ResNet18,
    task: Task,
    epochs: int,
    plan: TransferPlan | None = None,
) -> None:
    """Train the parameters that are not frozen, and record every epoch.

    Args:
        name: the model to save under.
        plan: the plan by which the network was filled, for the record.
    """
    images, test, _ = task
    loader = DataLoader(images, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(param_groups(network, 1e-3, weight_decay=0.01, rates={"fc.*": 3e-3}))
    assert not check_optimizer(network, optimizer)
    with registry.run(name, plan=plan, monitor="accuracy", mode="max") as run:
        for epoch in range(1, epochs + 1):
            network.train()
            for x, labels in loader:
                loss, _ = network(x, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            test_loss, accuracy, _ = evaluate(network, test)
            run.save(
                model=network,
                optimizer=optimizer,
                epoch=epoch,
                loss=loss,
                metrics={"accuracy": accuracy, "test_loss": test_loss},
            )
            print(f"{name}: epoch {epoch}, accuracy {accuracy:.4f}", flush=True)


def main() -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="a reference or a file with the tensors of ResNet18")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="the folder of CIFAR-10")
    parser.add_argument("--samples", type=int, default=100, help="images to train on in the new task")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data")
    options = parser.parse_args()
    torch.manual_seed(0)
    registry = Registry()

    if options.source is None:
        options.source = "resnet18-source@best"
        network = ResNet18(ResNet18Config(classes=5))
        train(registry, "resnet18-source", network=network, task=digits(0), epochs=options.epochs)

    images, test, classes = cifar10(options.cifar10) if options.cifar10 else digits(5)
    few = torch.randperm(len(images))[: options.samples].tolist()
    task: Task = (Subset(images, few), test, classes)  # type: ignore[arg-type]
    config = ResNet18Config(classes=classes)

    train(registry, "resnet18-scratch", network=ResNet18(config), task=task, epochs=options.epochs)
    for name, freeze in (("resnet18-finetuned", None), ("resnet18-frozen", "loaded")):
        network = ResNet18(config)
        plan = plan_transfer(
            options.source, network, expect={"fc.*": "skip"}, freeze=freeze, registry=registry
        )
        plan.apply(network, registry=registry)
        print(f"\n{name}: {plan.summary} from {plan.source}")
        if freeze:
            with frozen_proof(network) as names:
                train(registry, name, network=network, task=task, epochs=options.epochs, plan=plan)
            print(f"{name}: none of {len(names)} frozen tensors has moved")
        else:
            train(registry, name, network=network, task=task, epochs=options.epochs, plan=plan)

    found = curves(registry, ["resnet18-scratch", "resnet18-finetuned", "resnet18-frozen"], "accuracy")
    head, rows = table(found)
    print()
    for row in (head, *rows):
        print("  ".join(cell.ljust(18) for cell in row).rstrip())


if __name__ == "__main__":
    main()
