"""A registry with some history, and clients that ask a server about it."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from registry import Registry
from registry.ui.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def network(seed: int, outputs: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, outputs))


def fill(registry: Registry) -> None:
    """Two models: one of two runs, and one that was transferred from it."""
    with registry.run("net", config={"lr": 0.1, "epochs": 3}, monitor="accuracy") as run:
        for epoch in (1, 2, 3):
            measured = {"accuracy": 0.7 + epoch / 20, "val/loss": 1 / epoch}
            run.save(model=network(epoch), epoch=epoch, step=10 * epoch, loss=1 / epoch, metrics=measured)
    with registry.run("net", config={"lr": 0.1, "epochs": 5}, monitor="accuracy", resume="net:v3") as run:
        for epoch in (4, 5):
            run.save(
                model=network(epoch), epoch=epoch, step=10 * epoch, metrics={"accuracy": 0.9 + epoch / 100}
            )
    edge = {"kind": "transferred-from", "parent": registry["net:v3"].id}
    registry.save(
        "other", {"model": network(9, 2).state_dict()}, epoch=1, metrics={"accuracy": 0.5}, lineage=[edge]
    )
    registry.set_alias("net:v5", "production")
    registry.set_tag("net:v4", "paper")
    registry.add_note("net:v4", "sent to the reviewers")
    registry.cached(lambda size: [torch.ones(size)])(3)


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks a server as a program does, with whatever headers a test wants."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.place = server.place
        self.cookie = ""
        token = urlsplit(server.address()).query
        if token:
            answer = self.get(f"/?{token}")
            assert answer.status == 302
            self.cookie = answer.headers["set-cookie"].partition(";")[0]

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] = {}, body: str | None = None, host: str = ""
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            connection.putheader("Host", host or f"127.0.0.1:{self.server.port}")
            given = {"Cookie": self.cookie, **headers} if self.cookie else dict(headers)
            if body is not None:
                given |= {
                    "Content-Type": "application/x-www-form-urlencoded",
                    "Content-Length": str(len(body)),
                }
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders(body.encode() if body is not None else None)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, {name.replace("_", "-"): value for name, value in headers.items()})
