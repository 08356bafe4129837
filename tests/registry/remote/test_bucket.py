"""What every bucket promises, on a folder and on a real S3 server; and what S3 answers under faults."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from servers import KEYS, Fault, Layer

from registry import Registry
from registry.remote.azure import AzureBucket
from registry.remote.bucket import Bucket, Denied, Unreachable, check_key
from registry.remote.folder import FolderBucket
from registry.remote.keys import find_keys
from registry.remote.objects import Forked, ObjectBucket
from registry.remote.probe import probe
from registry.remote.s3 import S3Bucket
from registry.remote.urls import Address, is_url, parse
from registry.store.errors import Corrupt, Invalid, NotFound, StorageError

ENTRY = "journal/0000000000000001.zst"


@pytest.fixture(params=["folder", "s3", "az"])
def any_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    """Each kind of bucket."""
    if request.param == "folder":
        return FolderBucket(tmp_path / "bucket")
    if request.param == "az":
        return AzureBucket(request.getfixturevalue("azure"))
    bucket: S3Bucket = request.getfixturevalue("bucket")
    return bucket


def test_an_object_is_created_once(any_bucket: Bucket) -> None:
    assert any_bucket.get(ENTRY, 100) is None
    assert any_bucket.head(ENTRY) is None
    assert any_bucket.create(ENTRY, b"first")
    assert not any_bucket.create(ENTRY, b"second")
    assert any_bucket.get(ENTRY, 5) == b"first"
    held = any_bucket.head(ENTRY)
    assert held is not None
    assert (held.key, held.size) == (ENTRY, 5)


def test_one_of_many_creates_it(any_bucket: Bucket) -> None:
    barrier = threading.Barrier(6)
    won: list[int] = []

    def create(number: int) -> None:
        barrier.wait()
        if any_bucket.create(ENTRY, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # On a busy machine the winner's answer may come too late for it to know.
    assert len(won) == 1 or (not won and isinstance(any_bucket, ObjectBucket))
    assert any_bucket.get(ENTRY, 10) in [b"%d" % number for number in won or range(6)]


def test_a_file_goes_up_and_comes_back(any_bucket: Bucket, tmp_path: Path) -> None:
    data = os.urandom((33 << 20) + 7)
    (tmp_path / "pack").write_bytes(data)
    told: list[tuple[int, int]] = []
    for _ in range(2):
        any_bucket.put_file("packs/ab/x", tmp_path / "pack", lambda done, total: told.append((done, total)))
    assert told[-1] == (len(data), len(data))
    assert any_bucket.get("packs/ab/x", len(data)) == data
    assert any_bucket.get_range("packs/ab/x", 1000, 50) == data[1000:1050]
    assert any_bucket.get_range("packs/ab/x", len(data) - 5, 50) == data[-5:]
    assert any_bucket.get_range("packs/ab/x", len(data) + 5, 50) == b""
    assert any_bucket.get_range("packs/ab/y", 0, 50) is None


def test_an_empty_file_goes_up(any_bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    any_bucket.put_file("packs/ab/x", tmp_path / "empty")
    assert any_bucket.get("packs/ab/x", 0) == b""


def test_an_object_that_is_too_large_is_refused(any_bucket: Bucket) -> None:
    any_bucket.create(ENTRY, b"12345")
    with pytest.raises(Corrupt, match=r"journal/0+1\.zst: the object is larger than 4 bytes"):
        any_bucket.get(ENTRY, 4)


def test_objects_are_listed_by_folder_and_sorted(any_bucket: Bucket) -> None:
    for number in (3, 1, 10, 2):
        any_bucket.create(f"journal/{number:04d}.zst", b"x" * number)
    any_bucket.create("journals/1.zst", b"")
    found = list(any_bucket.list("journal"))
    assert [(held.key[8:12], held.size) for held in found] == [
        ("0001", 1),
        ("0002", 2),
        ("0003", 3),
        ("0010", 10),
    ]
    assert [held.key[8:12] for held in any_bucket.list("journal", after="journal/0002.zst")] == [
        "0003",
        "0010",
    ]
    assert list(any_bucket.list("nothing")) == []


def test_objects_are_deleted(any_bucket: Bucket) -> None:
    any_bucket.create("packs/1", b"")
    any_bucket.delete(["packs/1", "packs/2"])
    any_bucket.delete(["packs/1"])
    any_bucket.delete([])
    assert list(any_bucket.list("packs")) == []


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/a", "a//b", "", "a/", "a b", "a\nb", ".tmp/x", "x" * 201]
)
def test_a_key_that_may_name_something_else_is_refused(any_bucket: Bucket, key: str) -> None:
    with pytest.raises(Invalid, match="is no key"):
        any_bucket.get(key, 1)
    with pytest.raises(Invalid, match="is no key"):
        any_bucket.create(key, b"")
    with pytest.raises(Invalid):
        check_key(key)


def test_a_folder_is_not_left_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"secret")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "packs").symlink_to(tmp_path / "outside")
    bucket = FolderBucket(tmp_path / "bucket")
    with pytest.raises((StorageError, Corrupt)):
        bucket.get("packs/x", 10)
    with pytest.raises((StorageError, Corrupt)):
        bucket.delete(["packs/x"])
    assert (tmp_path / "outside" / "x").exists()


# -- the probe ---------------------------------------------------------------------------------------------


def test_the_probe_finds_nothing_against_a_store_that_is_atomic(any_bucket: Bucket) -> None:
    assert probe(any_bucket) is None
    assert list(any_bucket.list("probe")) == []


@pytest.mark.parametrize(("do", "said"), [("blind", "overwrites"), ("race", "not create objects atomically")])
def test_the_probe_finds_a_store_that_is_not(s3: Layer, bucket: S3Bucket, do: str, said: str) -> None:
    s3.faults.append(Fault("PUT", "/probe/", do, times=1_000))
    assert said in str(probe(bucket))


def test_the_probe_is_not_misled_by_lost_answers(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults += [
        Fault("PUT", "/probe/", "lose", skip=3, times=2),
        Fault("PUT", "/probe/", "503", skip=9, times=3),
    ]
    assert probe(bucket) is None


def test_the_probe_says_that_the_right_to_list_is_missing(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults.append(Fault("GET", "/probe/missing", "403", times=9))
    assert "lack the right to list" in str(probe(bucket))


# -- what S3 answers ---------------------------------------------------------------------------------------


def test_a_lost_answer_is_not_taken_for_a_failure_or_a_success(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults.append(Fault("PUT", ENTRY, "lose"))
    assert not bucket.create(ENTRY, b"mine")
    assert bucket.get(ENTRY, 10) == b"mine"


def test_a_conflict_without_an_object_is_not_taken_for_one(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults.append(Fault("PUT", ENTRY, "409"))
    assert not bucket.create(ENTRY, b"mine")
    assert bucket.get(ENTRY, 10) is None
    assert bucket.create(ENTRY, b"mine")


def test_a_busy_store_is_asked_again(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults += [Fault("PUT", ENTRY, "503", times=2), Fault("GET", ENTRY, "503", times=2)]
    assert bucket.create(ENTRY, b"mine")
    assert bucket.get(ENTRY, 10) == b"mine"


def test_a_right_that_is_missing_is_named(s3: Layer, bucket: S3Bucket) -> None:
    s3.faults.append(Fault("PUT", ENTRY, "403", times=9))
    with pytest.raises(Denied, match=rf"{ENTRY}: these keys lack the right PutObject \(AccessDenied\)"):
        bucket.create(ENTRY, b"")


def test_a_store_that_does_not_answer_is_named(
    s3: Layer, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        Unreachable, match=r"the store at http://127.0.0.1:1 does not answer \(connection refused\)"
    ):
        S3Bucket(address).get(ENTRY, 1)


def test_a_bucket_that_is_not_there_is_named(s3: Layer) -> None:
    with pytest.raises(NotFound, match="there is no bucket nothing-there"):
        S3Bucket(Address("s3", "nothing-there", "x")).get("registry.toml", 10)


def test_wrong_keys_are_named_and_not_repeated(
    s3: Layer, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-SECRET")
    bucket = S3Bucket(address)
    with pytest.raises(Denied, match=r"does not take these keys \(SignatureDoesNotMatch\)") as refused:
        bucket.get(ENTRY, 1)
    assert "CANARY" not in str(refused.value) + repr(bucket) + repr(find_keys())
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(find_keys())
    assert b"CANARY" not in pickle.dumps(bucket)


def test_a_forked_child_is_refused_and_does_not_hang(bucket: S3Bucket) -> None:
    bucket.create(ENTRY, b"")
    child = os.fork()
    if not child:
        try:
            bucket.get(ENTRY, 1)
        except Forked:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


# -- keys --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without keys, and the folder of the user's files."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_no_keys_is_an_error_that_names_the_variables(no_keys: Path) -> None:
    with pytest.raises(Invalid, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        find_keys()


def test_half_of_the_keys_is_an_error(no_keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    with pytest.raises(Invalid, match="AWS_SECRET_ACCESS_KEY is not set"):
        find_keys()


def test_keys_come_from_a_profile(no_keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_keys / "credentials").write_text("[team]\naws_access_key_id = A\naws_secret_access_key = B%C\n")
    (no_keys / "config").write_text(
        "[profile team]\nregion = eu-north-1\nendpoint_url = https://s3.example.org\n"
    )
    with pytest.raises(Invalid):
        find_keys()
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert find_keys().options == {
        "access_key_id": "A",
        "secret_access_key": "B%C",
        "region": "eu-north-1",
        "endpoint": "https://s3.example.org",
    }
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "X")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Y")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert find_keys().options["access_key_id"] == "X"
    assert find_keys().options["region"] == "us-west-2"


def test_a_file_of_keys_that_cannot_be_read_is_named_and_not_repeated(no_keys: Path) -> None:
    (no_keys / "credentials").write_text("CANARY = 1\n")
    with pytest.raises(
        Invalid, match=r"credentials: cannot be read \(MissingSectionHeaderError\)"
    ) as refused:
        find_keys()
    assert "CANARY" not in str(refused.value)


def test_an_endpoint_without_tls_is_refused(no_keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")
    with pytest.raises(Invalid, match=r"10\.0\.0\.1 has no TLS"):
        S3Bucket(Address("s3", "reg", "x"))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    S3Bucket(Address("s3", "reg", "x"))


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "minio", "https://", "https://key:CANARY@127.0.0.1:1"]
)
def test_a_malformed_endpoint_is_refused_and_not_repeated(
    endpoint: str, no_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(Invalid, match="expected https://HOST") as refused:
        S3Bucket(Address("s3", "reg", "x"))
    assert "CANARY" not in str(refused.value)


# -- URLs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("s3://models/team/vision", ("s3", "models", "team/vision"), "s3://models/team/vision"),
        ("s3://models/team/", ("s3", "models", "team"), "s3://models/team"),
        ("S3://models", ("s3", "models", ""), "s3://models"),
        ("file:///srv/shared models", ("file", "", "/srv/shared models"), "file:///srv/shared%20models"),
        ("file:///srv/a%20b", ("file", "", "/srv/a b"), "file:///srv/a%20b"),
    ],
)
def test_a_url_names_a_place(text: str, address: tuple[str, str, str], shown: str) -> None:
    assert is_url(text)
    assert parse(text) == Address(*address)
    assert str(parse(text)) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://key:CANARY@models/x", "without keys"),
        ("s3://models/x?secret=CANARY", "without keys"),
        ("http://models/x", "no kind of place"),
        ("s3:///x", "names no bucket"),
        ("s3://Models/x", "names no bucket"),
        ("s3://models/../x", "the prefix may have"),
        ("s3://models/%2e%2e/x", "the prefix may have"),
        ("file://host/x", "three slashes"),
        ("s3:/key:CANARY@models/x", "two slashes behind s3:"),
        ("S3:models/x", "two slashes behind s3:"),
        ("file:/srv/models", "two slashes behind file:"),
    ],
)
def test_a_malformed_url_is_refused_and_no_secret_repeated(text: str, said: str) -> None:
    with pytest.raises(Invalid, match=said) as refused:
        parse(text)
    assert "CANARY" not in str(refused.value)


@pytest.mark.parametrize("text", ["/srv/models", ".registry", "c:/models", "s3", "a//b", "./s3:/x", "a:b"])
def test_a_folder_is_no_url(text: str) -> None:
    assert not is_url(text)


@pytest.mark.parametrize(
    "place", ["s3:/models/team", "s3:models", Path("s3://models/team"), "file:/srv/models"]
)
def test_a_url_that_lost_a_slash_makes_no_folder(
    place: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Invalid, match="two slashes behind"):
        Registry(place)
    assert list(tmp_path.iterdir()) == []


def test_no_fast_command_loads_a_client(tmp_path: Path) -> None:
    program = (
        "import sys; from registry import Registry; Registry(sys.argv[1]).models(); "
        "sys.exit(any(name.startswith(('obstore', 'registry.remote')) for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "r")], check=True)
