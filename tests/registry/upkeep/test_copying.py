"""Copying versions between registries: by id, only what is lacking, checked, and repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.store.errors import Conflict, Corrupt, NotFound


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


def state(number: float, size: int = 50_000) -> dict[str, Any]:
    return {"model": {"w": torch.full((size,), float(number)), "backbone": torch.arange(size).float()}}


def packed(registry: Registry) -> int:
    return sum(path.stat().st_size for path in registry.root.glob("packs/*/*"))


def test_a_version_keeps_its_id_and_what_was_said_of_it(
    registry: Registry, other: Registry, tmp_path: Path
) -> None:
    saved = registry.save("net", state(1), epoch=3, metrics={"accuracy": 0.5})
    registry.set_tag("net", "sent")
    registry.add_note("net", "the good one")
    (tmp_path / "net.onnx").write_bytes(b"onnx" * 1000)
    registry.attach("net", tmp_path / "net.onnx")
    other.save("net", state(9))
    (copied,) = registry.copy_to(other, ["net"])
    assert (copied.source, copied.target, copied.is_new) == ("net:v1", "net:v2", True)
    there = other["net:v2"]
    assert there.id == saved.id
    assert (there.epoch, there.metrics, there.tags) == (3, {"accuracy": 0.5}, ("sent",))
    assert there.notes[0][1] == "the good one"
    assert there.notes[-1][1] == f"copied from net:v1 of {registry.place}"
    assert other.read_file("net:v2", "net.onnx") == b"onnx" * 1000
    assert torch.equal(there.load()["model"]["w"], state(1)["model"]["w"])
    assert other.verify().problems == ()


def test_only_what_is_lacking_is_copied(registry: Registry, other: Registry) -> None:
    registry.save("net", state(1))
    registry.save("net", state(2))
    first, second = registry.copy_to(other)
    assert first.size > 400_000
    assert 200_000 < second.size < 0.6 * first.size
    assert packed(other) == first.size + second.size


def test_what_is_there_is_not_copied_again_in_either_direction(registry: Registry, other: Registry) -> None:
    registry.save("net", state(1))
    registry.copy_to(other)
    before = packed(other)
    assert [(one.is_new, one.size) for one in registry.copy_to(other)] == [(False, 0)]
    assert [(one.is_new, one.target) for one in other.copy_to(registry)] == [(False, "net:v1")]
    assert packed(other) == before
    assert len(other.versions("net")) == len(registry.versions("net")) == 1


def test_two_registries_are_merged(registry: Registry, other: Registry) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
        other.save("net", state(10 + number))
    registry.copy_to(other)
    other.copy_to(registry)
    ids = [{version.id for version in one.versions("net")} for one in (registry, other)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 4
    for one in (registry, other):
        values = {float(one[f"net:v{number}"].load()["model"]["w"][0]) for number in range(1, 5)}
        assert values == {1, 2, 11, 12}
        assert one.verify().problems == ()


def test_differences_are_copied_with_what_they_rest_on(registry: Registry, other: Registry) -> None:
    torch.manual_seed(0)
    weights, saved = torch.randn(20_000), []
    for _ in range(4):
        weights = weights + 1e-4 * torch.randn(20_000)
        saved.append(weights.clone())
        registry.save("net", {"model": {"w": weights.clone()}})
    assert registry.compact()[0].versions
    registry.copy_to(other, ["net:v2"])
    assert torch.equal(other["net:v1"].load()["model"]["w"], saved[1])
    registry.collect_garbage(grace=0)
    registry.copy_to(other)
    for number, position in ((1, 1), (2, 0), (3, 2), (4, 3)):
        assert torch.equal(other[f"net:v{number}"].load()["model"]["w"], saved[position])
    assert other.verify().problems == ()


def test_thinned_and_removed_versions_are_copied_again(registry: Registry, other: Registry) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    with registry.run("net") as run:
        run.save(model=model, optimizer=optimizer, epoch=1)
        run.save(model=model, optimizer=optimizer, epoch=2)
    registry.copy_to(other, ["net:v1"])
    other.remove(["net:v1"])
    other.collect_garbage(grace=0)
    registry.copy_to(other, ["net:v1"])
    assert torch.equal(other["net"].load()["model"]["weight"], model.weight)
    registry.thin("net:v1")
    registry.copy_to(other, ["net:v1"])
    assert other["net"].components == ("model",)
    assert other.verify().problems == ()


def test_a_damaged_tensor_is_not_copied(registry: Registry, other: Registry) -> None:
    registry.save("net", state(1))
    registry.save("other", {"model": {"w": torch.zeros(3)}})
    path = max(registry.root.glob("packs/*/*"), key=lambda one: one.stat().st_size)
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Corrupt):
        registry.copy_to(other, ["net"])
    assert list(other.models()) == []
    assert list(other.root.glob("packs/*/*")) == []
    registry.copy_to(other, ["other"])
    path.write_bytes(data)


def test_what_is_not_there_is_named(registry: Registry, other: Registry) -> None:
    with pytest.raises(NotFound, match="nothing"):
        registry.copy_to(other, ["nothing"])


def test_the_rules_of_a_run_spare_versions_that_were_copied(registry: Registry, other: Registry) -> None:
    model = torch.nn.Linear(4, 4)
    with registry.run("net") as run:
        run.save(model=model, epoch=1)
        run.save(model=model, epoch=2)
    with other.run("net", keep_last=1) as run:
        run.save(model=model, epoch=10)
        registry.copy_to(other)
        saved = run.save(model=model, epoch=11)
    assert saved is not None
    assert saved.parent == "net:v1"
    assert [version.epoch for version in other.versions("net")] == [11, 2, 1]


def test_a_run_gets_no_name_that_copied_versions_have(registry: Registry, other: Registry) -> None:
    model = torch.nn.Linear(4, 4)
    with registry.run("net") as run:
        run.save(model=model, epoch=1)
    registry.copy_to(other)
    with other.run("net", resume="net", keep_last=1) as run:
        assert run.name == "net/run-2"
        run.save(model=model, epoch=2)
        run.save(model=model, epoch=3)
    assert [version.epoch for version in other.versions("net")] == [3, 1]
    with pytest.raises(Conflict, match="run-1"), other.run("net", name="run-1"):
        pass
