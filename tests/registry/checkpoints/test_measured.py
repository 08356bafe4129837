"""Statistics that were made before: kept for every registry of a user, and trusted no further than they are checked."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.checkpoints import measured, statistics
from registry.checkpoints.checkpoint import Checkpoint

DIGEST = "ab" * 32


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "torch-registry" / "stats.sqlite"


@pytest.fixture
def saved(registry: Registry) -> Checkpoint:
    torch.manual_seed(0)
    return registry.save("net", {"model": torch.nn.Linear(4, 3).state_dict()})


def check(saved: Checkpoint) -> None:
    paths = [path for path, *_ in saved.parameters()]
    assert list(measured.measure(saved, paths)) == list(statistics.statistics(saved, paths))


def test_a_tensor_is_measured_once_for_all_registries(
    place: Path, saved: Checkpoint, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(saved)
    assert place.is_file()
    wanted = list(statistics.statistics(saved, ["model/weight"]))
    monkeypatch.setattr(statistics, "statistics", lambda *_: pytest.fail("it was measured again"))
    other = Registry(tmp_path / "other").save("same", {"model": saved.load()["model"]})
    assert list(measured.measure(other, ["model/weight"])) == wanted
    assert not [path for path in registry.root.rglob("*") if "stats" in path.name]


def other_table(place: Path) -> None:
    sqlite3.connect(place).executescript("DROP TABLE measured; CREATE TABLE other (x)")


def trigger(place: Path) -> None:
    sqlite3.connect(place).executescript(
        "CREATE TRIGGER t AFTER INSERT ON measured BEGIN DELETE FROM measured; END"
    )


def text(changed: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        with sqlite3.connect(place) as connection:
            for number, given in connection.execute("SELECT number, text FROM measured").fetchall():
                told = json.dumps(changed(json.loads(given)))
                connection.execute("UPDATE measured SET text = ? WHERE number = ?", (told, number))

    return damage


def folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def link(place: Path) -> None:
    place.with_name("target").write_bytes(b"keep")
    place.unlink()
    place.symlink_to(place.with_name("target"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda place: place.write_bytes(b"not a database" * 1_000),
    "empty": lambda place: place.write_bytes(b""),
    "cut": lambda place: place.write_bytes(place.read_bytes()[:5_000]),
    "noise": lambda place: place.write_bytes(place.read_bytes()[:4_096] + b"\xff" * 8_192),
    "other table": other_table,
    "trigger": trigger,
    "folder": folder,
    "link": link,
    "no statistics": text(lambda given: [1]),
    "a field more": text(lambda given: {**given, "x": 1}),
    "a field less": text(lambda given: {"norm": 1.0}),
    "few bins": text(lambda given: {**given, "histogram": [1]}),
    "bins of text": text(lambda given: {**given, "histogram": ["<script>"] * 64}),
    "negative": text(lambda given: {**given, "elements": -1}),
    "text": text(lambda given: {**given, "norm": "<script>"}),
    "huge": text(lambda given: {**given, "norm": 10**400}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_does_no_harm(place: Path, saved: Checkpoint, damage: str) -> None:
    check(saved)
    DAMAGES[damage](place)
    check(saved)
    check(saved)
    if damage == "link":
        assert place.with_name("target").read_bytes() == b"keep"
    if damage != "folder":
        assert measured.known(next(digest for *_, digest in saved.parameters())) is not None


def test_it_works_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Checkpoint) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(saved)


def test_a_file_that_another_process_holds_is_left_alone(
    place: Path, saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(saved)
    monkeypatch.setattr(measured, "_PATIENCE_SECONDS", 0.01)
    held = sqlite3.connect(place, isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    check(saved)
    held.execute("ROLLBACK")
    held.close()
    assert measured.known(next(digest for *_, digest in saved.parameters())) is not None


def test_the_file_has_a_bound(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_MOST", 5)
    found = statistics.of_tensors([torch.ones(3)])._asdict()
    for i in range(9):
        measured.keep(f"{i:064x}", found)
    assert [measured.known(f"{i:064x}") is not None for i in range(9)] == [False] * 4 + [True] * 5


def test_several_processes_keep_at_a_time(place: Path) -> None:
    program = (
        "import sys\nfrom registry.checkpoints import measured\n"
        "found = {name: 0.0 for name in measured._NUMBERS} | {'elements': 1, 'nonfinite': 0, 'histogram': [0] * 64}\n"
        "for i in range(20): measured.keep(f'{int(sys.argv[1]) * 100 + i:064x}', found)"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(i)]) for i in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    kept = [measured.known(f"{i * 100 + j:064x}") for i in range(4) for j in range(20)]
    assert all(kept)
