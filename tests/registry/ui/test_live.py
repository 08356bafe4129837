"""Events, and that pages never hold up a save."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsing import Client, network

from registry import Registry
from registry.ui import drawing, watching
from registry.ui.reader import Reader
from registry.ui.server import Server


class Stream:
    """The events of a server, as a browser reads them."""

    def __init__(self, client: Client) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", client.server.port, timeout=30)
        self._connection.request("GET", "/events", headers={"Cookie": client.cookie})
        self.answer = self._connection.getresponse()

    def next(self) -> dict[str, Any]:
        """The next event; comments are passed over."""
        while line := self.answer.readline():
            if line.startswith(b"data: "):
                return dict(json.loads(line.removeprefix(b"data: ")))
        raise EOFError

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def stream(client: Client) -> Iterator[Stream]:
    with contextlib.closing(Stream(client)) as found:
        # The first event has the present state.
        assert found.next()["seq"] > 0
        yield found


def test_a_save_of_another_process_is_told_at_once(filled: Registry, stream: Stream) -> None:
    program = "import sys\nfrom registry import Registry\nRegistry(sys.argv[1]).add_note('net:v1', 'seen')"
    subprocess.run([sys.executable, "-c", program, str(filled.root)], check=True)
    first = stream.next()
    filled.save("net", {"model": network(1).state_dict()})
    assert stream.next()["seq"] > first["seq"] > 0


def test_lines_of_a_log_are_told_while_a_run_is_open(filled: Registry, stream: Stream) -> None:
    with filled.run("net") as run:
        assert stream.next()["runs"] == [run.name]
        with (filled.root / "runs" / run.name / "run.log").open("a") as log:
            log.write("[2026-11-29 14:05:01] - INFO: [train.py][42] Epochs[1/3]\n")
        assert stream.next()["runs"] == [run.name]


def test_a_run_that_goes_on_stands_on_the_first_page(filled: Registry, client: Client) -> None:
    with filled.run("net") as run:
        with (filled.root / "runs" / run.name / "run.log").open("a") as log:
            log.write("[2026-11-29 14:05:01] - INFO: [train.py][42] Epochs[2/3] -- loss: 0.25\n")
        text = client.get("/").text
        assert run.name in text
        assert "Epochs[2/3] -- loss: 0.25" in text
    assert "Epochs[2/3]" not in client.get("/").text


def test_streams_have_an_end(filled: Registry, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_STREAMS", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            opened = stack.enter_context(contextlib.closing(Stream(client)))
            assert opened.answer.readline().startswith(b"retry:")
        assert client.get("/events").status == 503


def test_the_server_ends_while_somebody_listens(filled: Registry) -> None:
    before = set(threading.enumerate())
    server = Server(filled.root, port=0)
    with contextlib.closing(Stream(Client(server))) as opened:
        opened.next()
        server.close()
        with pytest.raises(EOFError):
            opened.next()
    threads = [thread.name for thread in set(threading.enumerate()) - before if "reader" in thread.name]
    assert threads == []


def test_nothing_of_the_catalog_is_held_while_a_page_is_drawn_or_an_event_sent(
    filled: Registry, client: Client, monkeypatch: pytest.MonkeyPatch, stream: Stream
) -> None:
    taken: list[str] = []

    def take(where: str) -> None:
        with contextlib.closing(
            sqlite3.connect(filled.root / "catalog.sqlite", timeout=0, isolation_level=None)
        ) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("ROLLBACK")
        taken.append(where)

    draw = drawing.as_html
    monkeypatch.setattr(drawing, "as_html", lambda *given, **named: (take("page"), draw(*given, **named))[1])
    told = SimpleNamespace(dumps=lambda document: (take("event"), json.dumps(document))[1])
    monkeypatch.setattr(watching, "json", told)
    for address in ("/", "/m/net", "/m/net/v5", "/runs", "/lineage", "/storage"):
        assert client.get(address).status == 200
    filled.add_note("net:v1", "seen")
    stream.next()
    assert taken.count("page") == 6
    assert "event" in taken


def test_all_that_is_asked_is_asked_in_one_thread(filled: Registry) -> None:
    reader = Reader(filled.root)
    names: set[str] = set()
    asking = [
        threading.Thread(target=lambda: names.add(reader.ask(lambda _: threading.current_thread().name)))
        for _ in range(8)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    reader.close()
    assert len(names) == 1


def test_an_error_of_a_question_reaches_the_one_who_asked(filled: Registry) -> None:
    reader = Reader(filled.root)
    with pytest.raises(KeyError):
        reader.ask(lambda _: {}["x"])
    assert reader.ask(len) == 2
    reader.close()


def test_a_registry_whose_catalog_is_made_anew_is_read_on(filled: Registry, client: Client) -> None:
    assert client.get("/m/net").status == 200
    filled.rebuild()
    filled.save("net", {"model": network(3).state_dict()})
    assert "/m/net/v6" in client.get("/m/net").text


def test_a_registry_that_is_gone_is_told_and_the_server_stays(
    filled: Registry, client: Client, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    filled.root.rename(away)
    answer = client.get("/m/net")
    assert answer.status in (404, 500)
    assert "error:" in answer.text
    away.rename(filled.root)
    assert client.get("/m/net").status == 200


@pytest.mark.damages
def test_a_shared_registry_is_served_from_this_computer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = (tmp_path / "bucket").as_uri()
    registry = Registry(url)
    registry.save("net", {"model": network(1).state_dict()}, metrics={"accuracy": 0.5})
    with contextlib.closing(Server(url, port=0)) as server:
        client = Client(server)
        for address in ("/", "/m/net", "/m/net/v1", "/storage", "/lineage", "/diff?a=net&b=net"):
            assert client.get(address).status == 200
        registry.save("net", {"model": network(2).state_dict()})
        registry.catalog.close()
        assert client.get("/m/net.json").json["total"] == 2
