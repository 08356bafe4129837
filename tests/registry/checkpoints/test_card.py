"""Model cards: what was recorded, and that nothing is guessed."""

from __future__ import annotations

import torch

from registry import Registry
from registry.checkpoints.card import NOT_RECORDED, card
from registry.reports import html, markdown


def test_a_card_says_what_was_recorded(registry: Registry) -> None:
    config = {"lr": 0.1, "patience": None, "license": "MIT", "limitations": "a | b"}
    with registry.run("net", config=config) as run:
        network = torch.nn.Linear(3, 2)
        run.save(model=network, epoch=2, step=20, loss=0.5, metrics={"accuracy": 0.96})
        run.save(model=network, epoch=3, metrics={"accuracy": 0.97})
    registry.add_note("net:v2", "sent to <b>the</b> reviewers")
    text = markdown.render(card(registry, registry["net:v2"]))
    for line in (
        "# Model card of net:v2",
        "Linear, 8 parameters, 0 of them frozen, float32.",
        "| Licence | MIT |",
        r"| Intended use | not recorded |",
        r"| Limitations | a \| b |",
        "| accuracy | 0.97 |",
        "| continued from | net:v1 |",
        "| lr | 0.1 |",
        "| patience | none |",
        "| run | net/run-1 |",
        "    state_dict = checkpoint.state_dict()",
        registry["net:v2"].id,
    ):
        assert line in text
    assert "<b>" not in text
    assert "<b>" not in html.render(card(registry, registry["net:v2"]))


def test_what_was_not_recorded_is_said_to_be_so(registry: Registry) -> None:
    registry.save("net", {"model": {"w": torch.ones(2)}})
    text = markdown.render(card(registry, registry["net"]))
    for title in ("Results", "Settings", "How it was made", "Notes"):
        assert f"## {title}\n\n{NOT_RECORDED}\n" in text
    assert "| data | not recorded |" in text
    assert text.count(NOT_RECORDED) == 10
    registry.save("net", {"model": {}}, meta={"license": "MIT", "network": "resnet18"})
    text = markdown.render(card(registry, registry["net"]))
    assert "| Licence | MIT |" in text
    assert "| network | resnet18 |" in text


def test_a_card_names_what_a_version_was_made_from(registry: Registry) -> None:
    registry.save("base", {"model": {"w": torch.ones(2)}})
    edge = {"kind": "transferred-from", "parent": registry["base"].id}
    registry.save("net", {"model": {"w": torch.zeros(2)}}, lineage=[edge])
    assert "| transferred from | base:v1 |" in markdown.render(card(registry, registry["net"]))
    assert "| used by | net:v1 |" in markdown.render(card(registry, registry["base"]))
