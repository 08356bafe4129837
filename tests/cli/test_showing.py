"""`registry show`: one version on one screen."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run
from terminal import on_a_terminal
from torch import nn

from registry import Registry


def shown(text: str) -> dict[str, str]:
    """The facts of a version by their labels."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        label = line[:11].strip() or label
        found[label] = " ".join([*filter(None, [found.get(label)]), line[11:].strip()])
    return found


@pytest.fixture
def trained(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with two runs of a small network, the second resumed from the first."""
    monkeypatch.setattr(sys, "argv", ["/opt/bin/registry", "train", "net", "--note", "two words"])
    from registry.runs import provenance

    provenance.of_process.cache_clear()
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with filled.run("net", config={"lr": 0.1, "steps": [1, 2]}) as run:
        run.save(model=net, optimizer=optimizer)
    with filled.run("net", resume="net:v1") as run:
        run.save(model=net, extra={"seen": 1})
        run.save(model=net)
    provenance.of_process.cache_clear()
    return filled


def test_what_made_a_version_is_told(trained: Registry, run: Run) -> None:
    trained.set_tag("net:v1", "paper")
    text = run("show", "net:v1").out
    facts = shown(text)
    assert re.match(r"net:v1   [0-9a-f]{12}  +\d{4}-\d\d-\d\d \d\d:\d\d$", text.splitlines()[0])
    assert text.splitlines()[1].startswith("Sequential, 24 parameters (0 frozen), float32  ")
    assert facts["tags"] == "paper"
    assert facts["used by"] == "net:v2 (resumed)"
    assert facts["run"] == "net/run-1"
    assert facts["made by"].startswith("registry train net --note 'two words' python 3.")
    assert "no git" in facts["made by"] or "git " in facts["made by"]
    assert re.search(r"run time \d+\.\d s$", facts["made by"])
    assert facts["config"] == "lr 0.1  steps 1, 2"
    assert re.search(r"^model +7 +33 +\d+ B  Sequential$", text, re.MULTILINE)
    assert "no tensors: optimizer (SGD)" in text


def test_where_a_version_came_from_is_told(trained: Registry, run: Run) -> None:
    assert shown(run("show", "net:v2").out)["from"] == "net:v1 (resumed)"
    assert shown(run("show", "net:v3").out)["from"] == "net:v2 (same run, resumed from net:v1)"
    assert "from" not in shown(run("show", "net:v1").out)


def test_of_many_users_some_are_named(filled: Registry, run: Run) -> None:
    edge = {"kind": "transferred-from", "parent": filled["lenet5:v1"].id}
    for i in range(8):
        filled.save(f"net{i}", {"model": {"w": torch.full((1,), float(i))}}, lineage=[edge])
    facts = shown(run("show", "lenet5:v1").out)
    assert facts["used by"].count("(transferred)") == 6
    assert facts["used by"].endswith(", and 2 more")


def test_a_long_configuration_is_cut_on_a_terminal_alone(filled: Registry, run: Run) -> None:
    config = {f"name_of_setting_{i}": i for i in range(40)}
    filled.save("long", {"model": {"w": torch.ones(1)}}, config=config)
    assert "name_of_setting_39 39" in run("show", "long").out
    on_screen = on_a_terminal("show", "long", columns=80).text
    assert "name_of_setting_0 0" in on_screen
    assert "name_of_setting_39" not in on_screen
    assert "all: registry config show long:v1" in on_screen
    assert max(map(len, on_screen.splitlines())) <= 80


def test_alike_modules_share_a_line(filled: Registry, run: Run) -> None:
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 3) for _ in range(12)])})
    filled.save("deep", {"model": layers.state_dict()})
    text = run("show", "deep", "--tree").out
    assert text.splitlines()[-2:] == [
        "MODULE               TENSORS             DTYPE    VALUES   SIZE",
        "model/layers.{0-11}  weight 3×2, bias 3  float32     108  432 B",
    ]
    assert run("show", "deep", "--tree", "--json").json["modules"] == [
        {
            "name": "model/layers.{0-11}",
            "modules": 12,
            "tensors": [
                {"name": "weight", "dtype": "float32", "shape": [3, 2]},
                {"name": "bias", "dtype": "float32", "shape": [3]},
            ],
            "values": 108,
            "bytes": 432,
        }
    ]


@pytest.mark.damages
def test_a_version_with_a_damaged_manifest_is_shown_from_the_catalog(filled: Registry, run: Run) -> None:
    path = next(Path(filled.root).glob(f"manifests/*/{filled['lenet5:v2'].id}.json"))
    path.chmod(0o644)
    path.write_text("{}")
    done = run("show", "lenet5:v2")
    assert done.status == 0
    assert "200 B in 2 tensors" in done.out
    assert "model            2      50  200 B" in done.out
