"""Who may ask, and what nobody can make the pages do."""

from __future__ import annotations

import contextlib
import html
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
import torch
from browsing import Client, network

from registry import Registry
from registry.store.errors import Conflict, NotFound
from registry.ui.access import Access
from registry.ui.kept import last_entry
from registry.ui.server import Server


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:6007",
        "127.0.0.1",
        "[::1]",
        "[::1]:6007",
        "localhost:1",
        "gpu.lab",
        "GPU.lab:9",
    ],
)
def test_a_name_of_this_server_is_answered(host: str) -> None:
    assert Access(6007, hosts=["GPU.lab"]).is_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "evil.example:6007",
        "[::1].evil",
        "[::1]evil",
        "::1",
        "user@localhost",
        "localhost:80@evil.example",
        "localhost,evil.example",
        "localhost evil",
        "localhost:",
        "localhost:port",
        "localhost:6007\n",
        "127.0.0.1.evil.example",
        "127.0.0.2",
        "0.0.0.0",
        "localhost/",
        "ｌocalhost",
    ],
)
def test_another_name_is_refused(host: str) -> None:
    assert not Access(6007).is_host(host)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:6007", "user@localhost", ""])
def test_a_page_from_elsewhere_whose_name_leads_here_sees_nothing(unchanged: Client, host: str) -> None:
    answer = unchanged.ask("GET", "/", host=host or " ")
    assert answer.status == 403
    assert b"net" not in answer.body.replace(b"--allowed-host", b"").replace(b"not", b"")


def test_two_names_in_one_request_are_refused(unchanged: Client) -> None:
    port = unchanged.server.port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = [
            "GET / HTTP/1.1",
            f"Host: localhost:{port}",
            "Host: evil.example",
            f"Cookie: {unchanged.cookie}",
            "Connection: close",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert b" 403 " in answer.splitlines()[0]


def test_without_the_token_nothing_is_shown(unchanged: Client) -> None:
    stranger = Client.__new__(Client)
    stranger.server, stranger.cookie = unchanged.server, ""
    port = unchanged.server.port
    for path in (
        "/",
        "/m/net",
        "/events",
        "/api/v1/models",
        "/m/net.json",
        "/?token=",
        "/?token=wrong",
        "/?token=%C3%A9",
    ):
        assert stranger.get(path).status == 403
    for cookie in (f"torch-registry-{port}=", f"torch-registry-{port}=x", "torch-registry-1=x"):
        assert stranger.get("/", Cookie=cookie).status == 403
    assert stranger.get("/", Authorization="Bearer wrong").status == 403
    token = unchanged.server.address().rpartition("=")[2]
    assert stranger.get("/api/v1/models", Authorization=f"Bearer {token}").status == 200


def test_the_token_does_not_stay_in_the_address(unchanged: Client) -> None:
    address = unchanged.server.address("/m/net?sort=accuracy").partition(str(unchanged.server.port))[2]
    answer = unchanged.get(address)
    assert answer.status == 302
    assert answer.headers["location"] == "/m/net?sort=accuracy"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert unchanged.server.address().rpartition("=")[2] not in cookie


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "//evil.example/%2e%2e"])
def test_the_way_from_the_token_leads_nowhere_else(unchanged: Client, target: str) -> None:
    token = unchanged.server.address().rpartition("=")[2]
    answer = unchanged.get(f"{target}?token={token}")
    assert not re.match(r"(https?:)?(//|/\\|\\)", answer.headers.get("location", "/"))


def test_a_cookie_ends_with_its_server(filled: Registry) -> None:
    with contextlib.closing(Server(filled.root, port=0)) as server:
        cookie, port = Client(server).cookie, server.port
    with contextlib.closing(Server(filled.root, port=port)) as server:
        again = Client(server)
        again.cookie = cookie
        assert again.get("/").status == 403


def test_every_answer_tells_the_browser_what_to_refuse(unchanged: Client) -> None:
    for path in ("/", "/nothing", "/static/ui.js", "/m/net.json", "/?token=wrong"):
        headers = unchanged.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_answered(unchanged: Client, method: str) -> None:
    assert unchanged.ask(method, "/m/net").status in (405, 501)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/r/..%2f../registry.toml",
        "/r/%2e%2e/%2e%2e",
        "/r/net/..%2f..%2fregistry.toml",
        "/m/..%2f../v1",
        "/data/..%2f..",
        "/static/ui.css%00.js",
    ],
)
def test_no_address_leads_to_a_file(unchanged: Client, path: str) -> None:
    answer = unchanged.get(path)
    assert answer.status in (400, 404)
    assert b"format =" not in answer.body
    assert b"root:" not in answer.body
    assert b"import " not in answer.body


def test_these_pages_are_read_only_unless_asked(filled: Registry, client: Client) -> None:
    body = urlencode({"kind": "alias", "reference": "net:v1", "text": "bad"})
    origin = f"http://127.0.0.1:{client.server.port}"
    assert client.ask("POST", "/change", {"Origin": origin}, body).status == 403
    assert "bad" not in filled["net:v1"].aliases


@pytest.fixture
def writable(filled: Registry) -> Iterator[Client]:
    with contextlib.closing(Server(filled.root, port=0, allows_changes=True)) as server:
        yield Client(server)


def test_a_form_adds_an_alias_a_tag_and_a_note(filled: Registry, writable: Client) -> None:
    token = re.search(r'name="form_token" value="([^"]+)"', writable.get("/m/net/v1").text)
    assert token
    origin = {"Origin": f"http://127.0.0.1:{writable.server.port}", "Sec-Fetch-Site": "same-origin"}
    for kind, text in (("alias", "mine"), ("tag", "seen"), ("note", "a <b>note</b>")):
        body = urlencode({"kind": kind, "reference": "net:v1", "text": text, "form_token": token[1]})
        answer = writable.ask("POST", "/change", origin, body)
        assert (answer.status, answer.headers["location"]) == (303, "/m/net/v1")
    one = filled["net:v1"]
    assert ("mine" in one.aliases, one.tags, one.notes[0][1]) == (True, ("seen",), "a <b>note</b>")
    assert "a &lt;b&gt;note&lt;/b&gt;" in writable.get("/m/net/v1").text


def test_a_form_from_elsewhere_changes_nothing(filled: Registry, writable: Client) -> None:
    token = re.search(r'name="form_token" value="([^"]+)"', writable.get("/m/net/v1").text)
    assert token
    own = f"http://127.0.0.1:{writable.server.port}"
    given = {"kind": "tag", "reference": "net:v1", "text": "bad", "form_token": token[1]}
    for headers, form in (
        ({}, given),
        ({"Origin": "http://evil.example"}, given),
        ({"Origin": "null"}, given),
        ({"Origin": own, "Sec-Fetch-Site": "same-site"}, given),
        ({"Origin": own, "Sec-Fetch-Site": "cross-site"}, given),
        ({"Origin": own}, {**given, "form_token": ""}),
        ({"Origin": own}, {**given, "form_token": "wrong"}),
        ({"Origin": own}, {name: value for name, value in given.items() if name != "form_token"}),
    ):
        assert writable.ask("POST", "/change", headers, urlencode(form)).status == 403
    assert (
        writable.ask("POST", "/change", {"Origin": own}, urlencode({**given, "kind": "remove"})).status == 400
    )
    assert (
        writable.ask("POST", "/change", {"Origin": own}, urlencode({**given, "text": "x" * 200_000})).status
        == 413
    )
    assert writable.get("/change").status == 405
    assert filled["net:v1"].tags == ()


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m{{7*7}}'


def test_what_others_wrote_is_shown_and_never_run(tmp_path: object, registry: Registry) -> None:
    tree = {"model": {HOSTILE: network(1).state_dict()}}
    with registry.run("net", config={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}) as run:
        run.save(model=network(1), metrics={"<b>metric</b>": 0.5}, meta={HOSTILE: HOSTILE})
    (registry.root / "runs" / "net" / "run-1" / "run.log").write_text(HOSTILE)
    registry.save(
        "net",
        tree,
        config={HOSTILE: HOSTILE},
        meta={HOSTILE: HOSTILE},
        provenance={"kinds": {"model": HOSTILE}, "command": [HOSTILE], HOSTILE: HOSTILE},
        source={"file": HOSTILE},
    )
    registry.add_note("net:v2", HOSTILE)
    with contextlib.closing(Server(registry.root, port=0)) as server:
        client = Client(server)
        for path in (
            "/",
            "/m/net",
            "/m/net/v1",
            "/m/net/v2",
            "/runs",
            "/r/net/run-1",
            "/diff?a=net:v1&b=net:v2",
            "/compare?of=net",
            "/lineage",
            "/storage",
        ):
            for address in (
                path,
                f"/find?{urlencode({'q': HOSTILE})}",
                f"/m/{quote(HOSTILE, safe='')}",
                f"/{quote(HOSTILE)}",
            ):
                text = client.get(address).text
                assert "<script>alert" not in text
                assert "<img" not in text
                assert "<b>metric" not in text
                assert "\u202e" not in text
                assert "\x1b" not in text
        shown = client.get("/m/net/v2").text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
        assert "{{7*7}}" in html.unescape(shown)


def test_a_page_that_breaks_says_so_in_one_line(unchanged: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.ui.drawing.as_html", lambda *_, **__: 1 / 0)
    answer = unchanged.get("/m/net?tag=never-drawn-before")
    assert (answer.status, answer.text.count("\n")) == (500, 1)


def test_a_port_that_is_taken_is_told(filled: Registry) -> None:
    with (
        contextlib.closing(Server(filled.root, port=0)) as server,
        pytest.raises(Conflict, match="leave --port out"),
    ):
        Server(filled.root, port=server.port)


def test_there_must_be_a_registry(tmp_path: object) -> None:
    with pytest.raises(NotFound, match="registry init"):
        Server(f"{tmp_path}/none", port=0)


def test_behind_a_proxy_addresses_begin_with_its_path(filled: Registry) -> None:
    with contextlib.closing(Server(filled.root, port=0, base="/proxy/6007")) as server:
        client = Client.__new__(Client)
        client.server, client.cookie = server, ""
        answer = client.get(server.address().partition(str(server.port))[2])
        client.cookie = answer.headers["set-cookie"].partition(";")[0]
        assert answer.headers["location"] == "/proxy/6007/"
        for path in ("/proxy/6007/", "/"):
            text = client.get(path).text
            assert 'href="/proxy/6007/m/net"' in text
            assert 'src="/proxy/6007/static/ui.js"' in text
        assert client.get("/proxy/6007/static/ui.js").status == 200
        assert client.get("/proxy/6007/find?q=net:v2").headers["location"] == "/proxy/6007/m/net/v2"


def test_programs_alone_are_answered_if_asked(filled: Registry) -> None:
    with contextlib.closing(Server(filled.root, port=0, is_api_only=True, has_token=False)) as server:
        client = Client(server)
        assert client.get("/").status == 404
        assert client.get("/api/v1/models").json["models"][0]["name"] == "net"


def test_a_command_to_copy_runs_nothing_else(filled: Registry, client: Client) -> None:
    name = 'a $(touch x) "q"'
    filled.save("odd", {"model": {}}, epoch=1, metrics={name: 0.5})
    asked = urlencode({"of": "odd", "metric": name})
    text = html.unescape(client.get(f"/compare?{asked}").text)
    assert """registry compare odd --metric 'a $(touch x) "q"'""" in text


def test_a_side_of_a_diff_is_no_file(filled: Registry, unchanged: Client, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"w": torch.ones(1)}, path)
    for side in (str(path), "/etc/passwd", "/none/such.pt", "other.pt", "file:///etc/passwd"):
        answer = unchanged.get(f"/diff?{urlencode({'a': 'net:v1', 'b': side})}")
        assert answer.status in (400, 404)
        assert "no such file" not in answer.text


def test_another_program_on_the_other_loopback_does_not_get_the_token(filled: Registry) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as other:
        try:
            other.bind(("::1", 0))
        except OSError:
            pytest.skip("needs the address ::1")
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port} of ::1 is taken"):
            Server(filled.root, port=port)


def test_a_path_does_not_write_to_the_terminal(unchanged: Client) -> None:
    token = unchanged.server.address().rpartition("=")[2]
    answer = unchanged.get(f"/m/%0a%1b[31mx?token={token}")
    assert answer.status == 302
    assert answer.headers["location"] == "/m/%0A%1B%5B31mx"


def test_a_folder_in_the_place_of_another_is_seen(filled: Registry, client: Client, tmp_path: Path) -> None:
    assert "/m/net" in client.get("/").text
    another = Registry(tmp_path / "another")
    while last_entry(another)[0] < last_entry(filled)[0]:
        another.save("else", {"model": {}})
    for one in (filled, another):
        one.catalog.close()
    filled.root.rename(tmp_path / "away")
    another.root.rename(filled.root)
    assert "/m/else" in client.get("/").text


def test_many_points_are_compared_at_once(filled: Registry, client: Client) -> None:
    path = filled.root / "runs" / "net" / "run-1" / "scalars.jsonl"
    path.write_text("".join(f'{{"s": {i}, "t": {i}.0, "k": "Loss", "v": {i % 7}}}\n' for i in range(20_000)))
    answer = client.get("/compare?of=net/run-1&metric=Loss")
    assert answer.status == 200
    assert "The values are in the" in answer.text
