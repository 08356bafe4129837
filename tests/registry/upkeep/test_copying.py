"""Copying versions between registries: by id, only what is lacking, checked, and repeatable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.store import durable
from registry.store.errors import Conflict, Corrupt, NotFound, StorageError
from registry.store.store import Store
from registry.upkeep import copying


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
    other.remove([other["net"].name])
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


def near(number: int) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(0)
    values, moved = torch.randn(3_000, generator=chance), torch.randn(3_000, generator=chance)
    values[: 200 * number] += 1e-3 * moved[: 200 * number]
    return {"model": {"w": values}}


def depth(registry: Registry, reference: str) -> int:
    """How many differences lead from a version's tensor to a whole one."""
    digest = {path: digest for path, _, _, digest in registry[reference].parameters()}["model/w"]
    found = 0
    while (place := registry.catalog.locate([digest])[digest]).base:
        digest, found = place.base, found + 1
    return found


def test_what_would_lie_too_deep_is_copied_whole(tmp_path: Path) -> None:
    """Each registry adds a difference to what it gets: it would be one more with each copy."""
    before: Registry | None = None
    for number in range(12):
        here = Registry(tmp_path / str(number))
        here.save("net", near(number))
        here.save("net", near(number + 1))
        here.compact()
        assert depth(here, "net:v1") == 1
        if before:
            before.copy_to(here)
        before = here
    assert before is not None
    versions = before.versions("net")
    assert len(versions) == 24
    assert max(depth(before, version.name) for version in versions) == 6
    assert {int(before[version.id].load()["model"]["w"].isfinite().sum()) for version in versions} == {3_000}
    assert before.verify().problems == ()


def test_what_is_compacted_meanwhile_is_copied_all_the_same(
    registry: Registry, other: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [registry.save("net", near(number)) for number in range(1, 6)]
    real = Store.copy_to_new_pack
    calls = []

    def interrupted(self: Store, digests: Any, bases: Any = None, into: Any = None, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            Registry(registry.root).compact()
        return real(self, digests, bases, into, **given)

    monkeypatch.setattr(Store, "copy_to_new_pack", interrupted)
    assert len(registry.copy_to(other)) == 5
    for number, version in enumerate(saved, 1):
        assert torch.equal(other[version.id].load()["model"]["w"], near(number)["model"]["w"])
    assert other.verify().problems == ()


@pytest.mark.parametrize("how", ["removed", "thinned"])
def test_a_version_that_goes_meanwhile_does_not_stop_the_others(
    registry: Registry,
    other: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    optimizer = {"state": {0: torch.randn(2_000)}, "param_groups": []}
    for number in (1, 2, 3):
        registry.save("net", {**state(number), "optimizer": optimizer})
    real = Store.manifest

    def interrupted(self: Store, manifest_id: str) -> Any:
        if self.root == registry.root and manifest_id == second:
            monkeypatch.undo()
            again = Registry(registry.root)
            again.remove("net:v2") if how == "removed" else again.thin("net:v2")
            again.collect_garbage(grace=0)
        return real(self, manifest_id)

    second = registry["net:v2"].id
    monkeypatch.setattr(Store, "manifest", interrupted)
    copied = Registry(registry.root).copy_to(other)  # which has read no manifest yet
    assert [one.source for one in copied] == ["net:v1", *(["net:v2"] if how == "thinned" else []), "net:v3"]
    assert ("net:v2 was removed from" in caplog.text) is (how == "removed")
    assert other.verify().problems == ()


def test_gc_of_the_other_registry_meanwhile_takes_nothing_that_is_copied_onto(
    registry: Registry, other: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.save("base", near(2))
    registry.save("net", near(1))
    registry.save("net", near(2))
    registry.compact()
    assert depth(registry, "net:v1") == 1
    real = copying.publish
    calls = []

    def interrupted(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            again = Registry(other.root)
            again.remove("base:v1")
            again.collect_garbage()
        return real(*given, **more)

    monkeypatch.setattr(copying, "publish", interrupted)
    registry.copy_to(other, ["net:v1"])
    assert torch.equal(other["net"].load()["model"]["w"], near(1)["model"]["w"])
    other.collect_garbage(grace=0)
    assert other.verify().problems == ()
    assert not list(other.root.glob("catalog.sqlite.damaged*"))


def test_a_version_that_is_thinned_in_one_of_them_does_not_come_twice(
    registry: Registry, other: Registry
) -> None:
    optimizer = {"state": {0: torch.randn(2_000)}, "param_groups": []}
    registry.save("net", {**state(1), "optimizer": optimizer})
    registry.copy_to(other)
    registry.thin("net:v1")
    (there,) = registry.copy_to(other)
    assert (there.target, there.is_new) == ("net:v1", False)
    (back,) = other.copy_to(registry)
    assert (back.target, back.is_new) == ("net:v1", False)
    assert len(registry.versions("net")) == len(other.versions("net")) == 1


def test_an_error_names_the_registry_that_cannot_be_written(
    registry: Registry, other: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.save("net", state(1))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.disk, "write_at", full)
    with pytest.raises(StorageError, match=f"^{re.escape(str(other.root))}: no space left"):
        registry.copy_to(other)


def damage(registry: Registry, digest: str) -> None:
    """Flip a byte of a tensor, and let verify note it."""
    place = registry.catalog.locate([digest])[digest]
    path = registry.store.pack_path(place.pack)
    data = bytearray(path.read_bytes())
    data[place.start] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert registry.verify().problems


@pytest.mark.damages
def test_a_copy_lets_nothing_lie_deeper_that_is_there(tmp_path: Path) -> None:
    """Where a pack is damaged in another place, the copy of its tensor counts, though it is a difference."""
    here, far = Registry(tmp_path / "here"), Registry(tmp_path / "far")
    for number in range(1, 13):
        state = near(number)
        if number == 12:
            state["model"]["d"] = torch.arange(5_000.0)
        here.save("a", state)
    here.compact()
    deep = max(range(1, 13), key=lambda number: depth(here, f"a:v{number}"))
    assert depth(here, f"a:v{deep}") >= 3
    digests = {path: digest for path, _, _, digest in here["a:v12"].parameters()}
    damage(here, digests["model/d"])
    assert torch.equal(here[f"a:v{deep}"].load()["model"]["w"], near(deep)["model"]["w"])
    for number in (12, 13, 14):
        far.save("b", near(number))
    far.compact()
    assert depth(far, "b:v1") == 1
    far.copy_to(here, ["b:v1"])
    assert here.catalog.locate([digests["model/w"]])[digests["model/w"]].base is None
    for number in range(1, 12):
        assert torch.equal(here[f"a:v{number}"].load()["model"]["w"], near(number)["model"]["w"])
