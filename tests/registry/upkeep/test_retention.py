"""Retention: which version is the best, and which versions stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_network import copied, equal, made, step
from torch import nn

from registry import Registry
from registry.catalog.versions import list_versions
from registry.store.errors import Invalid, NotFound


def saved(registry: Registry, values: list[float], **rules: Any) -> list[str]:
    """The names of the versions that stay after saves with these accuracies."""
    net, optimizer = made()
    with registry.run("net", monitor="accuracy", **rules) as run:
        for epoch, value in enumerate(values, 1):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer, epoch=epoch, metrics={"accuracy": value})
    return [version.name.partition(":")[2] for version in list_versions(registry.catalog, "net")[0]][::-1]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([0.1, 0.3, 0.2], "max", 2),
        ([0.1, 0.3, 0.2], "min", 1),
        ([0.1, 0.3, 0.2], None, 2),
        ([NAN, 0.1, NAN], "max", 2),
        ([NAN, 0.1, NAN], "min", 2),
        ([0.5, 0.5, 0.5], "max", 1),
        ([0.1, float("inf"), 0.2], "max", 2),
    ],
)
def test_best_follows_the_metric(
    registry: Registry, values: list[float], mode: str | None, best: int
) -> None:
    saved(registry, values, mode=mode)
    assert registry["net@best"].version == best
    assert registry["net@latest"].version == len(values)


def test_nothing_but_nan_makes_no_best(registry: Registry) -> None:
    saved(registry, [NAN, NAN])
    with pytest.raises(NotFound, match="no alias 'best'"):
        registry["net@best"]


def test_the_smallest_loss_is_the_best(registry: Registry) -> None:
    net, _ = made()
    with registry.run("net", monitor="loss") as run:
        for loss in (0.5, 0.2, 0.3):
            run.save(model=net, loss=loss)
    assert registry["net@best"].loss == 0.2


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, ["v1", "v2", "v3", "v4", "v5", "v6"]),
        ({"keep_last": 2}, ["v2", "v5", "v6"]),
        ({"keep_best": 1}, ["v2", "v6"]),
        ({"keep_last": 1, "keep_best": 2}, ["v2", "v4", "v6"]),
        ({"keep_last": 9}, ["v1", "v2", "v3", "v4", "v5", "v6"]),
    ],
    ids=str,
)
def test_the_rules_of_what_stays_unite(registry: Registry, rules: dict[str, int], left: list[str]) -> None:
    assert saved(registry, [0.1, 0.9, 0.3, 0.8, NAN, 0.2], **rules) == left
    assert registry["net@best"].name == "net:v2"


def test_an_alias_a_tag_and_a_descendant_keep_a_version(registry: Registry) -> None:
    net, optimizer = made()
    with registry.run("net", keep_last=1) as run:
        for number in range(1, 6):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer, epoch=number)
            if number == 1:
                registry.set_alias("net:v1", "good")
            if number == 2:
                registry.set_tag("net:v2", "paper")
            if number == 3:
                with registry.run("other", resume="net:v3") as other:
                    other.save(model=net)
    names = [version.name for version in list_versions(registry.catalog, "net")[0]]
    assert names == ["net:v5", "net:v3", "net:v2", "net:v1"]
    assert registry["other"].lineage == [{"kind": "resumed-from", "parent": registry["net:v3"].id}]


def test_other_runs_versions_are_left_alone(registry: Registry) -> None:
    saved(registry, [0.1, 0.2, 0.3])
    assert saved(registry, [0.1, 0.2, 0.3], keep_last=1) == ["v1", "v2", "v3", "v6"]


def test_versions_of_the_run_that_was_resumed_count(registry: Registry) -> None:
    net, optimizer = made()
    with registry.run("net", keep_last=2) as run:
        for _ in range(3):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    with registry.run("net", keep_last=2, resume="net") as run:
        for _ in range(2):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    names = [version.name for version in list_versions(registry.catalog, "net")[0]]
    assert names == ["net:v5", "net:v4", "net:v3"]  # v3 has a descendant


def test_older_versions_keep_their_weights_alone(registry: Registry) -> None:
    torch.manual_seed(0)
    net = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(net.parameters())
    states = []
    registry_size = []
    with registry.run("net", monitor="accuracy", keep_optimizer=2) as run:
        for number in range(5):
            optimizer.zero_grad()
            net(torch.randn(5, 100)).square().sum().backward()
            optimizer.step()
            states.append(copied(net))
            run.save(model=net, optimizer=optimizer, metrics={"accuracy": -number})
            if number == 0:
                registry.set_tag("net:v1", "paper")
                registry.add_note("net:v1", "first")
            registry.collect_garbage(grace=0)
            registry_size.append(registry.status().stored)
    for number, state in enumerate(states, 1):
        checkpoint = registry[f"net:v{number}"]
        assert equal(checkpoint.state_dict(), state)
        assert ("optimizer" in checkpoint.components) == (number >= 4)
    assert registry["net@best"].name == "net:v1"
    assert (registry["net:v1"].tags, registry["net:v1"].notes[0][1]) == (("paper",), "first")
    assert registry.verify().problems == ()
    weights = 4 * 10_100
    assert registry_size[-1] < 5 * weights + 2 * 2 * weights + 60_000  # 5 weights, 2 states of an optimizer
    assert registry.rebuild().damaged == ()
    assert equal(registry["net:v1"].state_dict(), states[0])


def test_thinning_spares_what_others_descend_from(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    with registry.run("net", resume="net:v1", keep_optimizer=1) as run:
        for _ in range(2):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    assert "optimizer" in registry["net:v1"].components
    assert "optimizer" not in registry.thin("net:v3").components


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"mode": "up", "monitor": "a"}, "mode is 'up', expected 'min' or 'max'"),
        ({"keep_best": 2}, "needs a metric: monitor="),
        ({"keep_last": 0}, "keep_last is '0', expected a whole number of 1 or more"),
        ({"keep_last": True}, "keep_last is 'True'"),
        ({"monitor": "a\nb"}, "cannot be the name of a metric"),
        ({"name": "../x"}, "cannot be the name of a run"),
        ({"dataset": "mnist"}, "expected a digest"),
        ({"resume": "net:v9"}, "no model 'net'"),
    ],
)
def test_rules_that_make_no_sense_are_refused(registry: Registry, rules: dict[str, Any], told: str) -> None:
    with pytest.raises((Invalid, NotFound), match=told):
        registry.run("net", **rules)
    assert registry.runs.find() == []


@pytest.mark.parametrize(
    ("monitor", "saved"),
    [("val_loss", {"metrics": {"val/loss": 0.1}}), ("accuracy", {"loss": 0.1}), ("loss", {})],
)
def test_nothing_is_removed_before_the_monitored_value_appears(
    registry: Registry, caplog: pytest.LogCaptureFixture, monitor: str, saved: dict[str, Any]
) -> None:
    net = nn.Linear(2, 2)
    with registry.run("x", monitor=monitor, keep_best=1, keep_last=1) as run:
        for _ in range(3):
            run.save(model=net, **saved)
    assert len(registry.versions("x")) == 3
    told = [record.message for record in caplog.records if "no save has this metric" in record.message]
    assert len(told) == 1
    assert f"monitor='{monitor}'" in told[0]


@pytest.mark.damages
def test_an_old_version_that_is_damaged_fails_no_save(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The rules of a run are applied once the new version is there: what they meet is said, and the training goes on."""
    net = nn.Linear(4, 400)
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer)
    with registry.run("net", keep_optimizer=1) as run:
        run.save(model=net, optimizer=optimizer, epoch=1)
        (pack,) = registry.store.packs.glob("*/*")
        info = registry.store.pack_info(pack.stem)
        pack.chmod(0o644)
        data = bytearray(pack.read_bytes())
        for place in info.places.values():
            data[place.start] ^= 1
        pack.write_bytes(data)
        for epoch in (2, 3):
            step(net, optimizer)
            saved = run.save(model=net, optimizer=optimizer, epoch=epoch)
            assert saved is not None
            assert saved.version == epoch
        assert "the rules of the run fail" in caplog.text
        step(net, optimizer)
        run.save(model=net, optimizer=optimizer, epoch=4, wait=False)
    rows = list_versions(registry.catalog, "net")[0]
    assert [(row.version, row.record.get("parent")) for row in rows] == [
        (4, "net:v3"),
        (3, "net:v2"),
        (2, "net:v1"),
        (1, None),
    ]
