"""Hosts over a bucket in a folder, and what must hold on each of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from faulty import At, FaultyBucket, Sees
from support import all_versions, broken_rules, dump

from registry import Registry
from registry.remote import remote
from registry.remote.folder import FolderBucket
from registry.remote.urls import Address


class Team:
    """Hosts with a folder of their own each, over one bucket in a folder.

    Attributes:
        bucket: the bucket.
        url: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bucket = FolderBucket(folder / "bucket")
        self.url = self.bucket.url
        self._fresh = 0

    def home(self, name: str) -> Path:
        """Where a host keeps its folders."""
        return self.folder / f"host-{name}"

    def host(self, name: str, *, at: At = lambda *_: None, sees: Sees = lambda held: held) -> Registry:
        """The registry as a host has it, opened anew.

        Args:
            at, sees: see `FaultyBucket`.
        """
        os.environ["XDG_DATA_HOME"] = str(self.home(name))

        def opened(_: Address) -> FaultyBucket:
            return FaultyBucket(self.bucket, at, sees)

        before, remote._bucket = remote._bucket, opened
        try:
            return Registry(self.url)
        finally:
            remote._bucket = before

    def names(self) -> list[str]:
        """The hosts so far."""
        return [path.name.removeprefix("host-") for path in sorted(self.folder.glob("host-*"))]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back as it was, once the block ends."""
        copy = self.folder.with_name(f"{self.folder.name}-kept")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        try:
            yield
        finally:
            shutil.rmtree(self.folder)
            copy.rename(self.folder)

    def check(self, expected: dict[str, int] | None = None, *, names: Sequence[str] = ()) -> None:
        """Assert that every host, one that comes new among them, sees the same, and that it is whole.

        Args:
            expected: the number of the state of each version that must be there, and of no other.
            names: the hosts; all so far unless given.
        """
        self._fresh += 1
        hosts = [self.host(name) for name in [*(names or self.names()), f"new{self._fresh}"]]
        for registry in hosts:
            registry.catalog.commit(lambda view: [])
        views = [(entries_of(registry), dump(registry)) for registry in hosts]
        for registry, view in zip(hosts, views, strict=True):
            assert view == views[0]
            found = {version.name: version.epoch for version in all_versions(registry)}
            assert expected is None or found == expected
            for name, number in found.items():
                assert value(registry, name) == number
            assert broken_rules(registry) == []
            assert [problem.message for problem in registry.verify().problems] == []
        keys = [held.key for held in self.bucket.list("journal")]
        assert keys == [f"journal/{seq:016d}.zst" for seq in range(1, len(views[0][0]) + 1)]
        shutil.rmtree(self.home(f"new{self._fresh}"))


def state(number: float, size: int = 1000) -> dict[str, Any]:
    """A state of its own for each number, which shares a tensor with all others."""
    return {"model": {"w": torch.full((size,), float(number)), "same": torch.full((size,), 0.5)}}


def save(registry: Registry, number: int, model: str = "net") -> str:
    return registry.save(model, state(number), epoch=number).name


def value(registry: Registry, reference: str) -> float:
    """The number of a version's state."""
    loaded = registry[reference].load()["model"]
    assert torch.equal(loaded["same"], torch.full_like(loaded["same"], 0.5))
    assert torch.equal(loaded["w"], loaded["w"][:1].expand_as(loaded["w"]))
    return float(loaded["w"][0])


def numbers(registry: Registry) -> list[int]:
    """The numbers of the versions of `net`."""
    return sorted(version.version for version in registry.versions("net"))


def entries_of(registry: Registry) -> list[str]:
    """The digests of a host's entries."""
    return [item.entry.digest for item in registry.catalog.journal.read() if item.entry]
