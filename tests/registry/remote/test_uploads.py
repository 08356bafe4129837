"""Uploads in parts, to a real S3 server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Fault, Layer

from registry.remote import objects
from registry.remote.objects import part_size
from registry.remote.s3 import S3Bucket
from registry.remote.urls import Address

KEY = "packs/ab/x.safetensors"
MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 16 * MIB, 5 << 30, 160 << 30, 5 << 40])
def test_an_upload_of_any_size_has_parts_that_a_store_takes(size: int) -> None:
    part = part_size(size)
    assert 16 * MIB <= part <= 5 << 30
    assert -(-size // part) <= 10_000


def parts_in(layer: Layer) -> int:
    """How many parts were uploaded."""
    return len({match[1] for one in layer.requests if (match := re.match(r"PUT .*partNumber=(\d+)", one))})


def test_parts_grow_with_the_file(
    s3: Layer, bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PART", 5 * MIB)
    monkeypatch.setattr(objects, "_MOST_PARTS", 2)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 * MIB))
    bucket.put_file(KEY, path)
    assert parts_in(s3) == 2
    assert bucket.get(KEY, 20 * MIB) == path.read_bytes()


def test_an_upload_that_was_killed_leaves_nothing_to_see_and_is_repeated(
    s3: Layer, bucket: S3Bucket, address: Address, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(40 * MIB))
    program = (
        "import sys; from pathlib import Path; from registry.remote.s3 import S3Bucket; "
        f"from registry.remote.urls import parse; S3Bucket(parse({str(address)!r})).put_file({KEY!r}, Path(sys.argv[1]))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)])

    def kill() -> None:
        child.send_signal(signal.SIGKILL)
        child.wait()

    s3.faults.append(Fault("PUT", "partNumber=2", before=kill))
    assert child.wait() == -signal.SIGKILL
    assert bucket.head(KEY) is None
    assert [*bucket.list("packs")] == []
    # This client cannot list it; a rule of the bucket ends it, as docs/shared.md says.
    assert bucket.uploads(0) is None
    bucket.put_file(KEY, path)
    assert bucket.get(KEY, 40 * MIB) == path.read_bytes()
