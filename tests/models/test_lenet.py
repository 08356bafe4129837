"""The reference networks: names and shapes that transfer relies on."""

from __future__ import annotations

import pytest
import torch

from registry.models import LeNet5, LeNet6, LeNetConfig
from registry.store.errors import Invalid

LENET5 = {
    "conv.0.weight": (6, 1, 5, 5),
    "conv.0.bias": (6,),
    "conv.3.weight": (16, 6, 5, 5),
    "conv.3.bias": (16,),
    "fc.1.weight": (120, 400),
    "fc.1.bias": (120,),
    "fc.3.weight": (84, 120),
    "fc.3.bias": (84,),
    "fc.5.weight": (10, 84),
    "fc.5.bias": (10,),
}


def test_names_and_shapes() -> None:
    assert {name: tuple(p.shape) for name, p in LeNet5().named_parameters()} == LENET5
    expected = {
        **LENET5,
        "fc.5.weight": (64, 84),
        "fc.5.bias": (64,),
        "fc.7.weight": (10, 64),
        "fc.7.bias": (10,),
    }
    assert {name: tuple(p.shape) for name, p in LeNet6().named_parameters()} == expected
    wide = LeNet5(LeNetConfig(channels=3, classes=7))
    assert (wide.conv[0].weight.shape[1], wide.fc[5].weight.shape[0]) == (3, 7)


@pytest.mark.parametrize("kind", [LeNet5, LeNet6])
def test_forward_gives_logits_or_loss_and_logits(kind: type[LeNet5]) -> None:
    net = kind().eval()
    x, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    logits = net(x)
    loss, again = net(x, labels)
    assert logits.shape == (4, 10)
    assert torch.equal(logits, again)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_a_malformed_configuration_is_refused() -> None:
    with pytest.raises(Invalid, match="classes is 1"):
        LeNetConfig.from_dict({"classes": 1})
