"""Registry folders that somebody made to do harm: every command ends soon, with a line for people, and touches nothing outside."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import soak
import torch
from support import copy, fork, is_state, save, wait

from registry import Registry
from registry.log import entries
from registry.store.errors import RegistryError

STEM = "test_hostile_folders"
BUDGET = 25.0
SECONDS = 20
"""Of processor time that a command may take; of the clock six times as many, as machines are shared."""
ROOM = 2 << 30
"""Bytes of address space that a command may take beside what the process has."""

RUN = "net/first"


class Outcome(NamedTuple):
    """What a command did."""

    words: list[str]
    status: int
    out: str
    err: str
    seconds: float


# -- commands ------------------------------------------------------------------------------------------------

COMMANDS: dict[str, list[list[str]]] = {
    "init": [["init"]],
    "import": [["import", "{file}", "--name", "other"]],
    "export": [["export", "net:v1", "{out}", "--force"]],
    "train": [["train", "--resume", "net:v1"]],
    "eval": [["eval", "net"]],
    "predict": [["predict", "net", "{file}"]],
    "diff": [["diff", "net:v1", "net:v2", "--values"]],
    "plan": [["plan", "net:v1", "net:v2"]],
    "transfer": [["transfer", "net:v1", "net:v2", "--name", "moved"]],
    "apply": [["apply", "{file}", "--name", "moved"]],
    "compare": [["compare", "net"]],
    "advise": [["advise", "net:v1", "--samples", "500", "--similar", "yes"]],
    "ls": [
        ["ls"],
        ["ls", "net"],
        ["ls", "net", "--json"],
        ["ls", "--unheld"],
        ["ls", "--match", "accuracy>0"],
    ],
    "show": [["show", "net"], ["show", "net:v1", "--params"]],
    "history": [["history", "net"]],
    "best": [["best", "net", "--by", "number"]],
    "log": [["log"], ["log", "net"], ["log", RUN], ["log", "net:v1", "--json"]],
    "runs": [["runs"], ["runs", "net"]],
    "logs": [["logs", RUN], ["logs", RUN, "--json"]],
    "board": [["board", "nobody/run-1"]],
    "ui": [["ui", "nobody/run-1", "--no-open"]],
    "status": [["status"]],
    "du": [["du"], ["du", "net"]],
    "prune": [["prune", "-n"], ["prune", "--yes"]],
    "push": [["push", "net:v1", "--to", "{out}"], ["push", "--all", "--to", "{out}"]],
    "pull": [["pull", "net:v1", "--from", "{out}"]],
    "follow": [["follow", "net@@", "--once"]],  # one that it finds damaged, it waits for
    "cache list": [["cache", "list"]],
    "cache show": [["cache", "show", "ab"]],
    "cache rm": [["cache", "rm", "ab"]],
    "cache clear": [["cache", "clear", "--older-than", "0"]],
    "alias": [["alias"], ["alias", "net:v1", "other"]],
    "tag": [["tag", "net:v1", "more"]],
    "note": [["note", "net:v1", "text"]],
    "rm": [["rm", "net:v1", "--dry-run"], ["rm", "net:v2", "--force", "--yes"]],
    "verify": [["verify"], ["verify", "net:v1"], ["verify", "--frozen", "net:v1", "net:v2"]],
    "doctor": [["doctor"], ["doctor", "--json"]],
    "gc": [["gc", "--dry-run"], ["gc", "--grace", "0"]],
    "compact": [["compact"], ["compact", "--similar", "--alone"], ["compact", "--plain"]],
    "rebuild": [["rebuild"], ["rebuild", "--adopt"]],
    "config show": [["config", "show", "net:v1"]],
    "config validate": [["config", "validate", "{file}"]],
    "config diff": [["config", "diff", "net:v1", "net:v2"]],
    "completion": [["completion", "bash"]],
}
"""Arguments for commands; `{file}` is a file of the user's, `{out}` a place for one. The examples of its help stand for any other."""


def commands_of(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{prefix}{name} ")
        elif command:
            yield f"{prefix}{name}", command


def command_lines() -> dict[str, list[list[str]]]:
    """What is tried of each command: those above, then the others by their examples, about the model of these tests."""
    from registry.cli.app import app

    found = dict(COMMANDS)
    for name, command in commands_of(app):
        if name not in found:
            examples = (command.epilog or "").partition("Example:")[2].strip().splitlines()
            about_net = [re.sub(r"lenet\d|resnet", "net", example) for example in examples]
            found[name] = [shlex.split(example)[1:] for example in about_net]
    return found


def test_every_command_is_tried() -> None:
    from registry.cli.app import app

    assert {name for name, _ in commands_of(app)} == {
        name for name, lines in command_lines().items() if lines
    }


def call(words: list[str]) -> Outcome:
    """A command line in this process, which is ended after a while."""
    from registry.cli.app import app

    def too_late(*_: object) -> None:
        raise TimeoutError(f"{words} takes more than {6 * SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    before, status = signal.signal(signal.SIGALRM, too_late), 99
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    start, sys.argv, sys.stdin = time.process_time(), ["registry", *words], io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app.main(args=words, prog_name="registry")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 99
    except BaseException as error:
        err.write(f"Traceback: {error!r}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(words, status, out.getvalue(), err.getvalue(), time.process_time() - start)


def in_little_room(lines: list[list[str]], report: Path) -> list[Outcome]:
    """The command lines one after the other, in a process of little memory."""

    def run() -> None:
        status = Path("/proc/self/status").read_text()
        size = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        report.write_text(json.dumps([call(words) for words in lines]))

    torch.set_num_threads(1)
    report.unlink(missing_ok=True)
    assert wait(fork(run)) == 0
    return [Outcome(*one) for one in json.loads(report.read_text())]


def check(outcome: Outcome) -> None:
    """A command ended in time, with what people can read."""
    assert outcome.status in (0, 1, 2), outcome
    assert "unexpected" not in outcome.err, outcome
    assert "Traceback" not in outcome.out + outcome.err, outcome
    assert outcome.seconds < SECONDS, outcome
    for text in (outcome.out, outcome.err):
        assert all(line.isprintable() for line in text.split("\n")), outcome
    if outcome.status and outcome.words[0] not in ("verify", "rebuild", "compare", "doctor"):
        assert len(outcome.err.strip().split("\n")) <= 4, outcome


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, a run with its log, an artifact, and an alias."""
    registry = Registry(tmp_path_factory.mktemp("hostile") / "r")
    run = registry.runs.begin("net", RUN.partition("/")[2], {"config": {"lr": 0.1}})
    for number in (1, 2):
        state = {"model": {"w": torch.full((50, 30), float(number))}, "optimizer": {"lr": 0.1}}
        registry.save("net", state, epoch=number, metrics={"number": 1.0}, run=run, config={"lr": 0.1})
    registry.runs.end(run, "finished")
    registry.set_alias("net:v1", "good")
    registry.cached(_one)(3)
    folder = registry.root / "runs" / run
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("[2026-01-01 00:00:00] - INFO: [a.py][1] one\n")
    (registry.root / "tmp" / "left-1-0").write_bytes(b"x")
    registry.catalog.close()
    return registry.root


def _one(count: int) -> torch.Tensor:
    return torch.arange(float(count))


FOLDERS = (
    "packs",
    "manifests",
    "tmp",
    "journal",
    "runs",
    "runs/net",
    f"runs/{RUN}",
    "packs/*",
    "manifests/*",
)
FILES = (
    "registry.toml",
    "catalog.sqlite",
    "catalog.sqlite-wal",
    "catalog.sqlite-shm",
    "catalog.sqlite-journal",
    "journal/*.log",
    "journal/lock",
    "packs/*/*",
    "manifests/*/*",
    f"runs/{RUN}/run.log",
    "tmp/left-1-0",
)


def to_outside(place: Path, outside: Path) -> None:
    """A link to what was there, which lies outside now."""
    target = outside / f"moved-{place.name}"
    if place.exists():
        shutil.move(place, target)
    else:
        target.write_bytes(b"")
    place.symlink_to(target)


def dangling(place: Path, outside: Path) -> None:
    away(place)
    place.symlink_to(outside / "nothing")


def loop(place: Path, outside: Path) -> None:
    away(place)
    place.symlink_to(place.name)


def to_a_folder(place: Path, outside: Path) -> None:
    away(place)
    place.symlink_to(outside)


def pipe(place: Path, outside: Path) -> None:
    away(place)
    os.mkfifo(place)


def unix_socket(place: Path, outside: Path) -> None:
    away(place)
    here = Path.cwd()
    os.chdir(place.parent)  # The path of a socket may have 107 bytes.
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place.name)
    finally:
        os.chdir(here)


def device(place: Path, outside: Path) -> None:
    """`/dev/zero` under another name, or a link to it where nobody may make one."""
    away(place)
    try:
        os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        place.symlink_to("/dev/zero")


def folder(place: Path, outside: Path) -> None:
    away(place)
    (place / "inner").mkdir(parents=True)


def a_file(place: Path, outside: Path) -> None:
    away(place)
    place.write_bytes(b"no folder")


def terabyte(place: Path, outside: Path) -> None:
    place.touch()
    place.chmod(0o644)
    os.truncate(place, 1 << 40)


def terabyte_of_nothing(place: Path, outside: Path) -> None:
    away(place)
    place.touch()
    os.truncate(place, 1 << 40)


def hard_link(place: Path, outside: Path) -> None:
    if place.exists():
        os.link(place, outside / f"linked-{place.name}")


def nothing(place: Path, outside: Path) -> None:
    away(place)


def away(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


ODD_FOLDERS = (to_outside, dangling, loop, to_a_folder, pipe, unix_socket, device, a_file, nothing)
ODD_FILES = (
    *(to_outside, dangling, loop, to_a_folder, pipe, unix_socket, device, folder),
    *(terabyte, terabyte_of_nothing, nothing),
)


def forge(statements: str) -> Callable[[Path, Path], None]:
    def change(place: Path, outside: Path) -> None:
        with contextlib.closing(sqlite3.connect(place)) as connection:
            connection.create_function("gone", 0, lambda: None)
            connection.executescript(statements)

    change.__name__ = statements.strip()[:60]
    return change


EVERYTHING = "'; DELETE FROM versions; --"
FORGED = (
    forge("CREATE TRIGGER t AFTER INSERT ON log BEGIN DELETE FROM versions; DELETE FROM packs; END"),
    forge("CREATE TRIGGER t AFTER UPDATE ON state BEGIN DELETE FROM log; END"),
    forge("CREATE TRIGGER t BEFORE DELETE ON tags BEGIN DELETE FROM versions; END"),
    forge("ALTER TABLE versions RENAME TO v2; CREATE VIEW versions AS SELECT * FROM v2 WHERE version > 1"),
    forge("DROP TABLE tags; CREATE VIEW tags AS SELECT id, load_extension('x') AS name FROM versions"),
    forge(
        "DROP TABLE notes; CREATE VIEW notes AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i AS id, i AS written, i AS text FROM n"
    ),
    forge("UPDATE versions SET version = -1 WHERE version = 2"),
    forge("UPDATE versions SET version = 9223372036854775807 WHERE version = 2"),
    forge("UPDATE versions SET version = 'x' WHERE version = 2"),
    forge("UPDATE versions SET created = x'00ff'"),
    forge("UPDATE versions SET created = 'yesterday'"),
    forge("UPDATE versions SET epoch = 'many', step = -9223372036854775808, loss = 'x'"),
    forge("UPDATE versions SET record = '[' || record"),
    forge('UPDATE versions SET record = \'{"components": 3, "lineage": 4, "config": [], "provenance": 1}\''),
    forge('UPDATE versions SET record = \'{"lineage": [{}], "meta": 7, "source": "x", "parent": 1}\''),
    forge("UPDATE versions SET record = '{\"a\":' || replace(hex(zeroblob(50000)), '00', '[')"),
    forge('UPDATE versions SET record = \'{"meta":{"\x1b[31m":"\x1b]0;x\x07"}}\''),
    forge("UPDATE versions SET model = 'a' || char(0) || 'b' || char(10) || char(27) || '[31m'"),
    forge("UPDATE versions SET run = '../../../../etc'"),
    forge("UPDATE runs SET name = '../../etc/x'"),
    forge('UPDATE runs SET record = \'{"state": 3, "ended": [], "resumed": {}}\''),
    forge("UPDATE runs SET record = 'null', started = 7"),
    forge("UPDATE manifests SET size = -9223372036854775808, tensors = 'x'"),
    forge("UPDATE manifests SET entry = 'x'"),
    forge("UPDATE models SET next_version = 'x', next_again = 'x'"),
    forge("UPDATE models SET next_version = 9223372036854775807, next_again = 9223372036854775807"),
    forge("UPDATE packs SET size = 'large', damaged = 'x'"),
    forge("UPDATE packs SET size = 1099511627776"),
    forge("UPDATE packs SET size = -5"),
    forge("UPDATE packs SET digest = '../../x' || number"),
    forge("UPDATE tensors SET start = -4096"),
    forge("UPDATE tensors SET start = 9223372036854775807"),
    forge("UPDATE tensors SET start = 'x'"),
    forge("UPDATE tensors SET base = digest, coded = 9223372036854775807"),
    forge("UPDATE tensors SET base = digest, coded = -1"),
    forge("UPDATE tensors SET base = 'x', coded = 'y'"),
    forge("INSERT INTO aliases VALUES ('net', char(27) || '[31m', (SELECT id FROM versions LIMIT 1))"),
    forge("INSERT INTO tags SELECT id, char(27) || ']0;title' || char(7) FROM versions"),
    forge("INSERT INTO notes SELECT id, 'never', char(27) || '[2J' FROM versions"),
    forge("INSERT INTO notes SELECT id, 5, zeroblob(1000000) FROM versions"),
    forge("UPDATE metrics SET value = 'x'"),
    forge("UPDATE metrics SET name = char(10) || char(27), value = 1e999"),
    forge("INSERT INTO lineage SELECT a.id, 'x', b.id FROM versions a, versions b"),
    forge("UPDATE artifacts SET record = '[]', created = 4"),
    forge('UPDATE artifacts SET record = \'{"function": 3, "parameters": 4, "files": [], "seconds": "x"}\''),
    forge("UPDATE artifacts SET key = '../x'"),
    forge("UPDATE log SET entry = zeroblob(100)"),
    forge("UPDATE log SET entry = 'text'"),
    forge("UPDATE log SET seq = -seq"),
    forge("UPDATE state SET value = 'x' WHERE key = 'seq'"),
    forge("UPDATE state SET value = '-1' WHERE key = 'offset'"),
    forge("UPDATE state SET value = '99999999999999999999999' WHERE key IN ('seq', 'offset', 'segment')"),
    forge("INSERT INTO state VALUES ('gaps', 'x')"),
    forge("INSERT INTO state VALUES ('gaps', '[]')"),
    forge("INSERT INTO state VALUES ('gaps', '{}')"),
    forge("INSERT INTO doomed VALUES ('../../x', 'never')"),
    forge("INSERT INTO released VALUES (x'00')"),
    forge("PRAGMA user_version = 99"),
)


def cases() -> list[tuple[str, Callable[[Path, Path], None]]]:
    """Every place and what is put there."""
    found: list[tuple[str, Callable[[Path, Path], None]]] = []
    found += [(place, odd) for place in FOLDERS for odd in ODD_FOLDERS]
    found += [(place, odd) for place in FILES for odd in ODD_FILES]
    linked = ("registry.toml", "packs/*/*", "manifests/*/*", f"runs/{RUN}/run.log", "tmp/left-1-0")
    found += [(place, hard_link) for place in linked]
    return found + [("catalog.sqlite", odd) for odd in FORGED]


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder, with what may not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 24 else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, data)
    return found


PAGES = (
    *("/", "/m/net", "/m/net?sort=number", "/m/net/v1", "/m/net@best", "/runs", f"/r/{RUN}", "/lineage"),
    *("/lineage?of=net&full=1", "/storage", "/data", "/find?q=net", f"/compare?of={RUN}&metric=loss"),
)
"""Addresses of `registry ui`."""


def pages(root: Path, report: Path) -> list[list[Any]]:
    """Status and text of each page, asked in a process of its own; none where the registry cannot be opened."""
    from urllib.error import HTTPError
    from urllib.request import urlopen

    def run() -> None:
        from registry.ui.server import Server

        found: list[list[Any]] = []
        with contextlib.suppress(RegistryError):
            server = Server(root, port=0, has_token=False)
            for path in PAGES:
                try:
                    with urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=6 * SECONDS) as answer:
                        found.append([path, answer.status, answer.read().decode()])
                except HTTPError as error:
                    found.append([path, error.code, error.read().decode()])
            server.close()
        report.write_text(json.dumps(found))

    report.unlink(missing_ok=True)
    assert wait(fork(run)) == 0
    return list(json.loads(report.read_text()))


def check_page(path: str, status: int, text: str) -> None:
    """A page is drawn, or says in a line why not."""
    assert "could not be drawn" not in text, path
    assert "</html>" in text, (path, text)
    assert status == 200 or "error:" in text, (path, status)
    assert all(line.isprintable() for line in text.replace("\t", "").split("\n")), path


def try_one(golden: Path, top: Path, seed: int, lines_at_most: int = 12) -> int:
    """One hostile folder, and some commands and pages on it; how many commands."""
    chance = random.Random(seed)
    where, odd = chance.choice(cases())
    outside, root = top / "outside", copy(golden, top / "r")
    for path in (outside, top / "user"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    (outside / "thesis.tex").write_text("mine")
    (top / "user" / "file.json").write_text('{"a": 1}')
    place = chance.choice(sorted(root.glob(where)) or [root / where])
    odd(place, outside)
    before = snapshot(outside)
    chosen = [line for lines in command_lines().values() for line in lines]
    chance.shuffle(chosen)
    given = {"{file}": str(top / "user" / "file.json"), "{out}": str(top / "user" / "out.safetensors")}
    lines = [
        [*(given.get(word, word) for word in line), "--root", str(root)] for line in chosen[:lines_at_most]
    ]
    try:
        outcomes = in_little_room(lines, top / "report.json")
        for outcome in outcomes:
            check(outcome)
        for page in pages(root, top / "pages.json"):
            check_page(*page)
        assert snapshot(outside) == before
    except BaseException as error:
        error.add_note(f"{odd.__name__} in the place of {place.relative_to(root)}")
        raise
    return len(lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.damages
def test_a_hostile_folder_is_told_and_nothing_outside_is_touched(golden: Path, tmp_path: Path) -> None:
    for seed in soak.seeds(STEM, BUDGET):
        with soak.replayable(STEM, seed):
            count = try_one(golden, tmp_path, seed)
        soak.count(STEM, folders=1, commands=count)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.damages
@pytest.mark.parametrize("where", FOLDERS)
def test_each_odd_thing_in_the_place_of_a_folder_is_told(golden: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for odd in ODD_FOLDERS:
        root = copy(golden, tmp_path / "r")
        for place in sorted(root.glob(where)) or [root / where]:
            odd(place, outside)
        for words in (["ls", "net"], ["verify"]):
            outcome = call([*words, "--root", str(root)])
            check(outcome)


# -- what a manifest says ------------------------------------------------------------------------------------


def lines_of(root: Path, *words: str) -> Outcome:
    outcome = call([*words, "--root", str(root)])
    check(outcome)
    return outcome


def test_a_ladder_of_ancestors_is_shown_once_and_at_once(tmp_path: Path) -> None:
    """Two versions on each rung, both from both of the rung below: 2^30 ways up, and one line for each version."""
    registry = Registry(tmp_path / "r")
    below: list[str] = []
    for rung in range(30):
        edges = [{"kind": "merged-from", "parent": found} for found in below]
        saved = [
            registry.save("net", {"model": {"w": torch.ones(1)}}, meta={"place": [rung, side]}, lineage=edges)
            for side in range(2)
        ]
        below = [one.id for one in saved]
    registry.catalog.close()
    for name in ("net", "net:v1", "net:v30"):
        for words in (["log", name], ["log", name, "--json"], ["show", name]):
            outcome = lines_of(registry.root, *words)
            assert outcome.status == 0, outcome
            assert len(outcome.out) < 300_000


def test_a_long_line_of_ancestors_is_cut_and_says_how_to_go_on(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    before = None
    for number in range(120):
        state = {"model": {"w": torch.ones(1)}}
        before = registry.save("net", state, epoch=number, parent=before).name
    registry.catalog.close()
    outcome = lines_of(registry.root, "log", "net", "--json")
    assert outcome.status == 0, outcome
    assert '"more": "registry log net:v69"' in outcome.out
    graph = lines_of(registry.root, "log", "net")
    assert [line.split()[:2] for line in graph.out.splitlines()[1:]] == [["○", "net:v1…v120"]]
    assert lines_of(registry.root, "history", "net").status == 0


def test_ancestors_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for parent in ("net:v2", "net:v1"):
        registry.save("net", {"model": {"w": torch.ones(1)}}, meta={"p": parent}, parent=parent)
    registry.catalog.close()
    outcome = lines_of(registry.root, "log", "net")
    assert outcome.status == 0, outcome
    assert [line.split()[1] for line in outcome.out.splitlines()[1:]] == ["net:v2", "net:v1"]


def test_no_text_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\u202e\n\rregistry: all as saved"
    registry = Registry(tmp_path / "r")
    run = registry.runs.begin("net", "first", {"config": {evil: evil}, "command": [evil]})
    registry.save(
        *("net", {"model": {"w": torch.ones(1)}}),
        config={evil: {evil: evil}},
        meta={evil: evil, "deep": [{evil: [evil]}]},
        lineage=[{"kind": evil, "parent": evil}],
        source={"path": evil, evil: evil},
        run=run,
        provenance={
            "command": [evil],
            "system": evil,
            "python": evil,
            "torch": evil,
            "kinds": {"model": evil},
        },
    )
    registry.add_note("net", evil)
    registry.runs.end(run, f"failed: {evil}")
    folder = registry.root / "runs" / run
    folder.mkdir(parents=True)
    (folder / "run.log").write_text(evil * 3)
    registry.catalog.close()
    chosen = [
        line
        for lines in command_lines().values()
        for line in lines
        if "{file}" not in line and "--yes" not in line
    ]
    for words in chosen:
        given = [str(tmp_path / "out.safetensors") if word == "{out}" else word for word in words]
        lines_of(registry.root, *given)


# -- sizes ---------------------------------------------------------------------------------------------------


def laughs(depth: int = 40) -> str:
    """YAML whose aliases unfold to 2^depth items."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
    return "\n".join(lines)


CONFIGS: dict[str, tuple[str, Callable[[], str]]] = {
    "a billion laughs": ("c.yaml", laughs),
    "a long YAML": ("c.yaml", lambda: "\n".join(f"key{i}: {i}" for i in range(4_000))),
    "megabytes of JSON": ("c.json", lambda: json.dumps({f"key{i}": [i] * 20 for i in range(100_000)})),
    "deep JSON": ("c.json", lambda: '{"a":' * 100_000 + "1" + "}" * 100_000),
    "deep YAML": ("c.yaml", lambda: "a: " + "[" * 20_000),
    "an alias in itself": ("c.yaml", lambda: "a: &a [*a]"),
    "a tag that makes objects": ("c.yaml", lambda: "a: !!python/object/apply:os.system [true]"),
    "a number without end": ("c.json", lambda: '{"a": ' + "9" * 1_000_000 + "}"),
    "deep TOML": ("c.toml", lambda: "a = " + "[" * 20_000),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_asks_for_too_much_is_told(tmp_path: Path, kind: str) -> None:
    Registry(tmp_path / "r").catalog.close()
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    name, text = CONFIGS[kind]
    path = str(tmp_path / name)
    Path(path).write_text(text())
    commands = [
        ["config", "show", path],
        ["config", "validate", path],
        ["config", "diff", path, path],
        ["train", "lenet5", "--data", "digits", "--epochs", "0", "--config", path],
        ["import", str(tmp_path / "w.pt"), "--name", "net", "--config", path],
    ]
    lines = [
        [*words, *([] if "validate" in words else ["--root", str(tmp_path / "r")])] for words in commands
    ]
    for outcome in in_little_room(lines, tmp_path / "report.json"):
        check(outcome)


@pytest.mark.slow
def test_many_tags_and_a_large_note_are_listed(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    version_id = registry["net"].id
    count = 100_000 if "SOAK_SECONDS" in os.environ else 20_000
    records = [{"op": "tag", "id": version_id, "tag": f"tag{i}"} for i in range(count)]
    registry.catalog.commit(lambda _: records)
    registry.add_note("net", "x" * (1 << 20))
    registry.catalog.close()
    for words in (
        ["ls", "net"],
        ["show", "net"],
        ["ls", "net", "--tag", "tag7"],
        ["verify"],
        ["rebuild"],
    ):
        outcome = lines_of(registry.root, *words)
        assert outcome.status == 0, outcome.err
    registry = Registry(tmp_path / "r")
    assert len(registry["net"].tags) == count
    assert is_state(registry["net"].load(), 1)


@pytest.mark.slow
def test_a_long_log_opens_at_once_by_the_catalog_and_folds_in_bounded_memory(tmp_path: Path) -> None:
    """A million entries in `make soak`, fewer in the suite; each is a line of its own with a digest of its own."""
    count = 1_000_000 if "SOAK_SECONDS" in os.environ else 10_000
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    ledger, version_id = registry.catalog.ledger(), registry["net"].id
    registry.catalog.close()
    for path in registry.root.glob("catalog.sqlite*"):
        path.unlink()
    seq, prev, journal, end = ledger.seq, ledger.digest, registry.catalog.journal, ledger.end
    lines: list[bytes] = []
    size = end.offset
    segment = end.segment
    for number in range(count):
        op = "tag" if number % 2 == 0 else "untag"
        entry = entries.write(seq + 1, prev, [{"op": op, "id": version_id, "tag": "again"}])
        if size >= 16 << 20:
            with journal.path(segment).open("ab") as file:
                file.writelines(lines)
            lines, segment, size = [], entry.seq, 0
        lines.append(entry.line)
        size += len(entry.line)
        seq, prev = entry.seq, entry.digest
    with journal.path(segment).open("ab") as file:
        file.writelines(lines)
    report = tmp_path / "report.json"

    def fold() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        opened = Registry(registry.root, create=False)
        assert opened["net"].tags == ("again",) * (count % 2)
        folded = time.monotonic() - start
        opened.catalog.close()
        start = time.monotonic()
        assert Registry(registry.root, create=False)["net"].id == version_id
        again = time.monotonic() - start
        report.write_text(
            json.dumps([folded, again, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before])
        )

    assert wait(fork(fold)) == 0
    folded, again, kilobytes = json.loads(report.read_text())
    soak.count(
        STEM, long_log_entries=count, fold_seconds=folded, open_seconds=again, fold_kilobytes=kilobytes
    )
    assert kilobytes < 400 << 10
    assert again < max(1.0, folded / 4)
