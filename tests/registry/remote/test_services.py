"""`az://` on an emulator of Azure, and what is said of `gs://` and `az://` where keys, rights or a bucket are missing."""

from __future__ import annotations

import base64
import hmac
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlencode

import pytest
import torch
from hosts import numbers, state, value
from servers import ACCOUNT, ACCOUNT_KEY
from support import in_child

from registry import Registry
from registry.remote import shared_log
from registry.remote.azure import AzureBucket
from registry.remote.bucket import Bucket, Denied, Unreachable
from registry.remote.google import GoogleBucket
from registry.remote.probe import probe
from registry.remote.remote import folder_for
from registry.remote.services import open_bucket
from registry.remote.urls import Address, parse
from registry.store.errors import Invalid, NotFound, RegistryError

GOOGLE, AZURE = Address("gs", "models", "team"), Address("az", "models", "team")
ENTRY = "journal/0000000000000001.zst"


@pytest.fixture(autouse=True)
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without any keys."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "AZURITE_", "GOOGLE_", "GCE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def refusal(call: Callable[[], object], said: str, kind: type[RegistryError]) -> None:
    """See that a call is refused in one line without secrets."""
    with pytest.raises(kind, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert "CANARY" not in str(refused.value)


# -- az://, on an emulator ---------------------------------------------------------------------------------


@pytest.fixture
def hosts(azure: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Registry]:
    """Opens a registry in the emulator as a host of some name has it."""
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)

    def opened(name: str) -> Registry:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
        return Registry(str(azure))

    return opened


def with_rights(rights: str, azure_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment hold a signature that gives some rights, in the place of the emulator's own keys."""
    monkeypatch.delenv("AZURE_STORAGE_USE_EMULATOR")
    lasting = "2099-01-01T00:00:00Z"
    lines = (ACCOUNT, rights, "b", "sco", "", lasting, "", "https,http", "2021-08-06", "", "")
    signed = hmac.digest(base64.b64decode(ACCOUNT_KEY), "\n".join(lines).encode(), "sha256")
    token = {
        "sv": "2021-08-06",
        "ss": "b",
        "srt": "sco",
        "sp": rights,
        "se": lasting,
        "spr": "https,http",
        "sig": base64.b64encode(signed).decode(),
    }
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{azure_port}/{ACCOUNT}")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", urlencode(token))


@pytest.mark.damages  # the folders cannot be opened without the keys
def test_hosts_share_a_container(azure: Address, hosts: Callable[[str], Registry], tmp_path: Path) -> None:
    one, other = hosts("one"), hosts("other")
    one.save("net", state(1))
    other.save("net", state(2))
    with one.run("net") as run:
        run.save(model=torch.nn.Linear(2, 2), epoch=1)
    other.save("gone", {"model": {"w": torch.rand(1000)}})
    one.remove(["gone:v1"])
    there = AzureBucket(azure)
    packs = len(list(there.list("packs")))
    other.collect_garbage(grace=0)
    assert len(list(there.list("packs"))) == packs - 1
    assert numbers(one) == numbers(other) == [1, 2, 3]
    assert value(one, "net:v2") == 2
    assert len(other.copy_to(Registry(tmp_path / "folder"))) == 3
    assert not any(copied.is_new for copied in Registry(tmp_path / "folder").copy_to(other))
    for registry in (one, other):
        assert registry.verify().problems == ()


@pytest.mark.damages
def test_a_forked_child_saves_in_a_container(hosts: Callable[[str], Registry]) -> None:
    registry = hosts("one")
    registry.save("net", state(1))
    assert in_child(lambda: registry.save("net", state(2))) == 0
    assert value(registry, "net:v2") == 2


@pytest.mark.parametrize(
    ("rights", "call", "said"),
    [
        ("l", lambda bucket: bucket.get(ENTRY, 10), "to read blobs"),
        ("rl", lambda bucket: bucket.create(ENTRY, b""), "to write blobs"),
        ("rl", lambda bucket: bucket.put(ENTRY, b""), "to write blobs"),
        ("r", lambda bucket: list(bucket.list("journal")), "to list blobs"),
    ],
)
def test_a_right_that_is_missing_is_named(
    azure: Address,
    azure_port: int,
    monkeypatch: pytest.MonkeyPatch,
    rights: str,
    call: Callable[[Bucket], object],
    said: str,
) -> None:
    AzureBucket(azure).put(ENTRY, b"x")
    with_rights(rights, azure_port, monkeypatch)
    refusal(lambda: call(AzureBucket(azure)), rf"journal.*: these keys lack the right {said}", Denied)


def test_wrong_keys_and_a_container_that_is_not_there_are_named(
    azure: Address, azure_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = AzureBucket(Address("az", "nothing-there", "x"))
    for call in (
        lambda: nothing.get(ENTRY, 10),
        lambda: nothing.create(ENTRY, b""),
        lambda: list(nothing.list("journal")),
    ):
        refusal(call, "there is no container nothing-there; make it", NotFound)
    monkeypatch.delenv("AZURE_STORAGE_USE_EMULATOR")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{azure_port}/{ACCOUNT}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "CANARY" + ACCOUNT_KEY[6:])
    bucket = AzureBucket(azure)
    refusal(lambda: bucket.get(ENTRY, 1), "does not take these keys .*AZURE_STORAGE_ACCOUNT_KEY", Denied)
    assert "CANARY" not in repr(bucket)
    assert b"CANARY" not in pickle.dumps(bucket)


# -- keys and places ---------------------------------------------------------------------------------------


def test_no_keys_is_an_error_that_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(lambda: open_bucket(GOOGLE), "no keys for gs://; set GOOGLE_APPLICATION_CREDENTIALS", Invalid)
    refusal(lambda: open_bucket(AZURE), "AZURE_STORAGE_ACCOUNT_NAME is not set", Invalid)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    refusal(lambda: open_bucket(AZURE), "no keys for az://; set .*AZURE_STORAGE_ACCOUNT_KEY", Invalid)
    for url in ("gs://models/team", "az://models/team"):
        refusal(lambda url=url: Registry(url), f"no keys for {url[:5]}", Invalid)


@pytest.mark.parametrize(
    ("address", "name", "text"),
    [
        (GOOGLE, "GOOGLE_APPLICATION_CREDENTIALS", "/nothing/CANARY"),
        (GOOGLE, "GOOGLE_SERVICE_ACCOUNT_KEY", '"CANARY"'),
        (AZURE, "AZURE_STORAGE_ACCOUNT_KEY", "CANARY!"),
        (AZURE, "AZURE_STORAGE_SAS_TOKEN", "CANARY"),
        (AZURE, "AZURE_CREDENTIAL_TYPE", "CANARY"),
    ],
)
def test_malformed_keys_are_an_error_that_names_the_variables(
    address: Address, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    monkeypatch.setenv(name, text)
    refusal(lambda: open_bucket(address), f"malformed, .* check {name.partition('_')[0]}_", Invalid)


def test_each_account_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for account in ("lab", "other"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
        folders.add(folder_for(AZURE))
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "https://blobs.example.org/other")
    folders.add(folder_for(AZURE))
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "1")
    folders.add(folder_for(AZURE))
    folders.add(folder_for(GOOGLE))
    monkeypatch.setenv("GOOGLE_BASE_URL", "https://storage.example.org")
    folders.add(folder_for(GOOGLE))
    assert len(folders) == 6


def test_an_endpoint_without_tls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "x")
    for address, variable in ((AZURE, "AZURE_STORAGE_ENDPOINT"), (GOOGLE, "GOOGLE_BASE_URL")):
        monkeypatch.setenv(variable, "http://10.0.0.1/lab")
        allows = f"{variable.partition('_')[0]}_ALLOW_HTTP"
        refusal(lambda address=address: open_bucket(address), rf"no TLS; .*{allows}=true", Invalid)
        monkeypatch.setenv(allows, "true")
        open_bucket(address)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("az://models@account/x", "names container and prefix alone, .* AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://models/x?sig=CANARY", "without keys"),
        ("gs://CANARY@models/x", "names bucket and prefix alone, .* GOOGLE_APPLICATION_CREDENTIALS"),
        ("file:///srv/x?y", "names a folder alone"),
        ("az://a.b/x", "names no container; expected az://CONTAINER/PREFIX"),
        ("az://ab/x", "names no container"),
        ("az://a--b/x", "names no container"),
        (f"az://{'a' * 64}/x", "names no container"),
        ("gs:///x", "names no bucket; expected gs://BUCKET/PREFIX"),
    ],
)
def test_a_malformed_url_is_refused(text: str, said: str) -> None:
    refusal(lambda: parse(text), said, Invalid)


# -- what a server answers ---------------------------------------------------------------------------------


class Stub:
    """A server that gives one answer to everything.

    Attributes:
        answer: status and code; the body in the place of the code if `kind` is set.
        kind: the body's type.
        requests: method, path and headers of each request.
    """

    def __init__(self) -> None:
        self.answer = (200, "")
        self.kind = ""
        self.requests: list[tuple[str, str, dict[str, str]]] = []


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A server to which the environment points for `gs://` and `az://`."""
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): text for name, text in self.headers.items()}
            state.requests.append((self.command, self.path, headers))
            status, code = state.answer
            body = (code if state.kind else f"<Error><Code>{code}</Code></Error>").encode()
            self.send_response(status)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Type", state.kind or "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GOOGLE_BASE_URL", url)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "CANARY")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", "CANARY")
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("address", "condition", "taken"),
    [
        (GOOGLE, ("x-goog-if-generation-match", "0"), (412, "PreconditionFailed")),
        (AZURE, ("if-none-match", "*"), (409, "BlobAlreadyExists")),
    ],
)
def test_an_object_is_created_on_the_condition_that_there_is_none(
    stub: Stub, address: Address, condition: tuple[str, str], taken: tuple[int, str]
) -> None:
    bucket = open_bucket(address)
    assert bucket.create(ENTRY, b"x")
    stub.answer = taken
    assert not bucket.create(ENTRY, b"x")
    for method, path, headers in stub.requests:
        assert (method, unquote(path)) == ("PUT", f"/models/team/{ENTRY}")
        assert condition in headers.items()


@pytest.mark.parametrize(
    ("address", "status", "code", "said", "kind"),
    [
        (GOOGLE, 404, "NoSuchBucket", "there is no bucket models; make it", NotFound),
        (AZURE, 404, "ContainerNotFound", "there is no container models; make it", NotFound),
        (GOOGLE, 403, "AccessDenied", "lack the right storage.objects.get, or", Denied),
        (AZURE, 403, "AuthorizationPermissionMismatch", "lack the right to read blobs, or", Denied),
        (GOOGLE, 401, "AuthenticationRequired", "take these keys .*; check GOOGLE_", Denied),
        (AZURE, 401, "InvalidAuthenticationInfo", "take these keys .*; check AZURE_", Denied),
        (AZURE, 403, "AuthenticationFailed", "take these keys .*; check AZURE_", Denied),
        (GOOGLE, 400, "ExpiredToken", "take these keys .*; check GOOGLE_", Denied),
    ],
)
def test_an_answer_is_told_with_what_to_do(
    stub: Stub, address: Address, status: int, code: str, said: str, kind: type[RegistryError]
) -> None:
    stub.answer = (status, code)
    refusal(lambda: open_bucket(address).get(ENTRY, 10), said, kind)
    assert "CANARY" not in repr(open_bucket(address))


def test_every_object_is_deleted_whatever_is_missing(stub: Stub) -> None:
    stub.answer = (404, "NoSuchKey")
    keys = [f"packs/{number}" for number in range(50)]
    GoogleBucket(GOOGLE).delete(keys)
    asked = {unquote(path).rpartition("team/")[2] for method, path, _ in stub.requests if method == "DELETE"}
    assert asked == set(keys)


def test_the_right_to_delete_is_named_where_it_is_missing(stub: Stub) -> None:
    stub.answer = (403, "AccessDenied")
    refusal(lambda: GoogleBucket(GOOGLE).delete([ENTRY]), "lack the right storage.objects.delete", Denied)
    # Azure answers for each object of many.
    lines = (
        *("--b", "Content-Type: application/http", "Content-ID: 0", ""),
        *(
            "HTTP/1.1 403 not authorized",
            "x-ms-error-code: AuthorizationPermissionMismatch",
            "",
            "",
            "--b--",
            "",
        ),
    )
    stub.answer, stub.kind = (202, "\r\n".join(lines)), "multipart/mixed; boundary=b"
    refusal(lambda: AzureBucket(AZURE).delete([ENTRY]), "journal.*lack the right to delete blobs", Denied)


def test_keys_that_get_no_token_are_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_TOKEN")
    monkeypatch.setenv("AZURE_CREDENTIAL_TYPE", "managed_identity")
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", os.environ["AZURE_STORAGE_ENDPOINT"])
    stub.answer = (400, "x")
    refusal(lambda: AzureBucket(AZURE).get(ENTRY, 1), r"take these keys \(no token, 400\); check AZ", Denied)
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, os.environ["GOOGLE_BASE_URL"].partition("://")[2])
    refusal(
        lambda: GoogleBucket(GOOGLE).get(ENTRY, 1), r"take these keys \(no token, 400\); check GO", Denied
    )
    assert "/computeMetadata/" in stub.requests[-1][1]


def test_a_server_that_is_not_there_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:1")
    refusal(lambda: GoogleBucket(GOOGLE).get(ENTRY, 1), r"at http://127\.0\.0\.1:1 does not ans", Unreachable)


@pytest.mark.parametrize("address", [GOOGLE, AZURE])
def test_the_probe_finds_a_server_that_ignores_the_condition(stub: Stub, address: Address) -> None:
    assert "overwrites an object that was only to be created" in str(probe(open_bucket(address)))
