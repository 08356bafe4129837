"""A pack takes the place of another only if it has everything that is needed, and rests on nothing that goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import broken_rules

from registry import Registry
from registry.log.entries import Record
from registry.store import differences
from registry.store.pack import PackInfo
from registry.upkeep.repacking import _replacement, needed_of, repack

VALUES = torch.randn(3_000, generator=torch.Generator().manual_seed(0))


def near(number: int) -> torch.Tensor:
    """A tensor that is a small difference from the others."""
    return VALUES + number * 1e-6


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Each version has a tensor of its own in a pack of its own, and version 1 another one beside it."""
    found = Registry(tmp_path / "r")
    for number in (1, 2, 3):
        tensors = {"w": near(number), **({"extra": torch.arange(100.0)} if number == 1 else {})}
        found.save("net", {"model": tensors}, epoch=number)
    return found


def digest_of(registry: Registry, version: int, name: str = "model/w") -> str:
    return next(digest for path, _, _, digest in registry[f"net:v{version}"].parameters() if path == name)


def pack_with(registry: Registry, digest: str) -> str:
    return registry.catalog.locate([digest])[digest].pack


def pack_of(registry: Registry, version: int) -> str:
    return pack_with(registry, digest_of(registry, version))


def proposed(registry: Registry, old: str, new: PackInfo) -> list[Record]:
    """What would be recorded; nothing is."""
    found: list[list[Record]] = []

    def compute(view: object) -> list[Record]:
        found.append(_replacement(view, old, new))  # type: ignore[arg-type]
        return []

    registry.catalog.commit(compute)
    return found[-1]


def check_values(registry: Registry, count: int) -> None:
    assert broken_rules(registry) == []
    assert registry.verify().problems == ()
    for number in range(1, count + 1):
        assert torch.equal(registry[f"net:v{number}"].state_dict()["w"], near(number))


def whole_copy(registry: Registry, version: int) -> tuple[str, PackInfo]:
    old = pack_of(registry, version)
    needed = needed_of(registry.catalog.query, registry.store, old)
    return old, registry.store.copy_to_new_pack(needed)


def test_a_whole_copy_takes_the_place(registry: Registry) -> None:
    old, new = whole_copy(registry, 1)
    assert [record["op"] for record in proposed(registry, old, new)] == ["pack", "replace"]


def test_a_copy_that_lacks_something_does_not(registry: Registry) -> None:
    old = pack_of(registry, 1)
    new = registry.store.copy_to_new_pack([digest_of(registry, 1)])
    assert proposed(registry, old, new) == []


def test_a_copy_of_a_pack_that_is_gone_does_not(registry: Registry) -> None:
    old, new = whole_copy(registry, 1)
    needed = needed_of(registry.catalog.query, registry.store, old)
    assert repack(registry.catalog, registry.store, old, needed) is not None
    assert proposed(registry, old, new) == []


@pytest.mark.parametrize("spoil", [os.unlink, lambda path: os.truncate(path, 100)], ids=["gone", "cut"])
def test_a_copy_that_is_not_whole_on_the_disk_does_not(
    registry: Registry, spoil: Callable[[Path], None]
) -> None:
    old, new = whole_copy(registry, 1)
    path = registry.store.pack_path(new.digest)
    path.chmod(0o644)
    spoil(path)
    assert proposed(registry, old, new) == []


def test_a_difference_from_what_the_old_pack_alone_has_does_not(registry: Registry) -> None:
    both = registry.store.copy_to_new_pack([digest_of(registry, 2), digest_of(registry, 3)])
    registry.catalog.commit(
        lambda view: [
            {"op": "pack", "digest": both.digest, "size": both.size},
            {"op": "replace", "old": pack_of(registry, 2), "new": both.digest},
            {"op": "replace", "old": pack_of(registry, 3), "new": both.digest},
        ]
    )
    first, second = digest_of(registry, 2), digest_of(registry, 3)
    new = registry.store.copy_to_new_pack([second], {second: [first]})
    assert new.tensors[0].base == first  # which lies in the pack that would go
    assert proposed(registry, both.digest, new) == []


def test_a_difference_from_what_has_become_one_meanwhile_does(registry: Registry) -> None:
    first, second, third = (digest_of(registry, number) for number in (1, 2, 3))
    coded = registry.store.copy_to_new_pack([third], {third: [second]})
    repack(registry.catalog, registry.store, pack_of(registry, 2), [second], {second: [first]})
    assert registry.catalog.locate([second])[second].base == first
    assert coded.tensors[0].base == second  # which was plain when the copy was made
    assert [record["op"] for record in proposed(registry, pack_of(registry, 3), coded)] == ["pack", "replace"]


def test_a_difference_of_what_others_rest_on_does(registry: Registry) -> None:
    first, second, third = (digest_of(registry, number) for number in (1, 2, 3))
    repack(registry.catalog, registry.store, pack_of(registry, 3), [third], {third: [second]})
    assert registry.catalog.locate([third])[third].base == second
    repack(registry.catalog, registry.store, pack_of(registry, 2), [second], {second: [first]})
    assert registry.catalog.locate([second])[second].base == first
    registry.collect_garbage(grace=0)
    check_values(registry, 3)


def test_a_difference_that_would_close_a_circle_does_not(registry: Registry) -> None:
    first, second, third = (digest_of(registry, number) for number in (1, 2, 3))
    back = registry.store.copy_to_new_pack([second], {second: [third]})
    assert back.tensors[0].base == third
    repack(registry.catalog, registry.store, pack_of(registry, 3), [third], {third: [second]})
    assert proposed(registry, pack_of(registry, 2), back) == []
    # A longer one, as three compactions at once would make it.
    to_first = registry.store.copy_to_new_pack([second], {second: [first]})
    around = registry.store.copy_to_new_pack([first, digest_of(registry, 1, "model/extra")], {first: [third]})
    assert next(tensor.base for tensor in around.tensors if tensor.digest == first) == third
    old = pack_of(registry, 2)
    registry.catalog.commit(lambda view: _replacement(view, old, to_first))
    assert registry.catalog.locate([second])[second].base == first
    assert proposed(registry, pack_of(registry, 1), around) == []
    registry.collect_garbage(grace=0)
    check_values(registry, 3)


def test_nothing_is_coded_against_what_rests_on_it(registry: Registry) -> None:
    second, third = digest_of(registry, 2), digest_of(registry, 3)
    repack(registry.catalog, registry.store, pack_of(registry, 3), [third], {third: [second]})
    assert registry.store.copy_to_new_pack([second], {second: [third]}).tensors[0].base is None


def test_differences_lie_no_more_than_six_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from what rests on the new one, too."""
    monkeypatch.setattr(differences, "DEEPEST", 100)
    registry = Registry(tmp_path / "r")
    for number in range(1, 13):
        registry.save("net", {"model": {"w": near(number)}}, epoch=number)
    digests = {number: digest_of(registry, number) for number in range(1, 13)}

    def rests(number: int, base: int) -> bool:
        bases = {digests[number]: [digests[base]]}
        pack = pack_of(registry, number)
        return repack(registry.catalog, registry.store, pack, [digests[number]], bases) is not None

    assert all(rests(number, number - 1) for number in range(2, 8))
    assert not rests(8, 7)  # which is six deep
    assert rests(8, 6)
    assert all(rests(number, number - 1) for number in (10, 11, 12))
    assert not rests(9, 4)  # 12 would be seven deep
    assert rests(9, 3)
    registry.collect_garbage(grace=0)
    check_values(registry, 12)


def test_what_a_difference_in_another_pack_rests_on_is_needed(registry: Registry) -> None:
    second, third = digest_of(registry, 2), digest_of(registry, 3)
    repack(registry.catalog, registry.store, pack_of(registry, 3), [third], {third: [second]})
    registry.remove(["net:v2"], force=True)
    assert second in needed_of(registry.catalog.query, registry.store, pack_with(registry, second))
