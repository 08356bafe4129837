"""A registry with some history, and a server over it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Client, fill

from registry import Registry
from registry.ui.server import Server


@pytest.fixture
def filled(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "r")
    fill(registry)
    return registry


@pytest.fixture
def server(filled: Registry) -> Iterator[Server]:
    with contextlib.closing(Server(filled.root, port=0)) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server)


@pytest.fixture(scope="session")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a registry that no test changes."""
    registry = Registry(tmp_path_factory.mktemp("unchanged") / "r")
    fill(registry)
    with contextlib.closing(Server(registry.root, port=0)) as found:
        yield Client(found)
