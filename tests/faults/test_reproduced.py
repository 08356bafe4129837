"""What went wrong once: names and versions that were lost or came back, commands that hung, and files that others took."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from support import (
    all_versions,
    broken_rules,
    collect,
    copy,
    dump,
    files,
    fork,
    in_child,
    is_state,
    save,
    state,
    wait,
)

from registry import Registry
from registry.catalog.versions import Version
from registry.cli.app import app
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.home import Home
from registry.log import entries
from registry.log.journal import Journal
from registry.runs.session import Session
from registry.store import durable
from registry.store.digest import digest
from registry.store.errors import Conflict, Corrupt, RegistryError
from registry.store.locating import Locator
from registry.store.store import Store
from registry.upkeep import repacking, verification

SHOWN = 300


def versions(registry: Registry) -> dict[str, Version]:
    return {version.name: version for version in all_versions(registry)}


def lose_catalog(root: Path) -> None:
    for path in root.glob("catalog.sqlite*"):
        path.unlink()


def thinnable(number: int) -> dict[str, Any]:
    tree = state(number)
    return {**tree, "optimizer": {**tree["optimizer"], "state": {}, "param_groups": []}}


# -- commands that hang, fail oddly, or print what they should not -------------------------------------------

MEMORY = 3 << 30
SECONDS = 20


def told_by(root: Path, commands: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong with how commands end, in a process with bounded time and memory; nothing if all is well."""
    reading, writing = os.pipe()

    def run() -> None:
        os.environ["REGISTRY_ROOT"] = str(root)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        for command in commands:
            os.write(writing, json.dumps(command).encode() + b"\n")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process, as the machine may be busy
            signal.alarm(6 * SECONDS)
            told = io.StringIO()
            with (
                contextlib.redirect_stdout(told),
                contextlib.redirect_stderr(told),
                contextlib.suppress(SystemExit),
            ):
                app.main([*command])
            text = told.getvalue()
            if "unexpected" in text or "Traceback" in text or set(text) & {*"\x1b\x07\u202e\0"}:
                os.write(writing, json.dumps([*command, repr(text[-SHOWN:])]).encode() + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)

    pid = fork(run)
    os.close(writing)
    with os.fdopen(reading) as lines:
        told = [json.loads(line) for line in lines]
    status = wait(pid)
    wrong = [" ".join(line) for line in told if line not in [[*command] for command in commands]]
    return [*wrong, *([f"{told[-1]} ended with {status}"] if status else [])]


COMMANDS = (
    ["ls"],
    ["show", "net:v1"],
    ["verify"],
    ["alias", "net:v1", "x"],
    ["gc", "--grace", "0"],
    ["log", "tr"],
    ["rebuild"],
)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions and a run that has saved one."""
    registry = Registry(tmp_path_factory.mktemp("golden") / "r")
    for number in (1, 2, 3):
        registry.save("net", state(number), epoch=number, loss=0.5, metrics={"acc": 1.0}, config={"lr": 0.1})
    with registry.run("tr", config={"a": 1}) as run:
        run.save(model=torch.nn.Linear(2, 2), epoch=1)
    registry.catalog.close()
    return registry.root


FILES = {
    "catalog": "catalog.sqlite",
    "write-ahead log": "catalog.sqlite-wal",
    "log": "journal/*.log",
    "lock": "journal/lock",
    "settings": "registry.toml",
    "log of a run": "runs/tr/*/run.log",
    "pack": "packs/??/*",
    "manifest": "manifests/??/*",
}


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_forty_gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("put", [put_pipe, put_device, put_forty_gigabytes])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.damages
def test_no_command_hangs_or_takes_much_memory_whatever_is_in_the_place_of_a_file(
    golden: Path, tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    root = copy(golden, tmp_path / "r")
    path = next(root.glob(FILES[name]), root / FILES[name])
    path.unlink(missing_ok=True)
    put(path)
    commands = [*COMMANDS]
    if (name, put) == ("log of a run", put_forty_gigabytes):  # It is printed to its end, as by `cat`.
        commands.remove(["log", "tr"])
    assert told_by(root, commands) == []


# -- values in the log and in manifests that somebody made up ------------------------------------------------

BIG = 10**400
ESCAPES = "\x1b[31mX\x1b]0;pwn\x07\u202e"
ABSENT = object()
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1 << 63,
    1 << 70,
    BIG,
    1e308,
    "x",
    ESCAPES,
    [],
    [1],
    {},
    {"a": 1},
    {"model": 5},
    {"model": {"x": [BIG]}},
    {"$float": "7ff8000000000000"},
    {"$float": "zz"},
    "2026-13-45",
    "../../../etc/passwd",
    "\ud800",
    "a\0b",
    ABSENT,
)
FIELDS: tuple[tuple[str, ...], ...] = (
    *(
        (name,)
        for name in [
            "kind",
            "model",
            "created",
            "epoch",
            "step",
            "loss",
            "metrics",
            "config",
            "meta",
            "source",
            "run",
            "parent",
        ]
    ),
    *((name,) for name in ["provenance", "dcp", "thinned-from", "lineage", "torch-registry"]),
    ("metrics", "acc"),
    *(
        ("provenance", name)
        for name in [
            "kinds",
            "buffers",
            "frozen",
            "plan",
            "builder",
            "network",
            "devices",
            "git",
            "seconds",
            "dataset",
        ]
    ),
)
EDGES: tuple[Any, ...] = (
    {"kind": 1, "parent": 2},
    {"kind": "a"},
    5,
    {"kind": ESCAPES, "parent": ESCAPES},
    {"kind": "a", "parent": None},
    {"kind": "a", "parent": ["x"]},
)
METRICS = (ESCAPES, "", "a/b", "<script>", "x" * 5_000)
NONE = "0" * 64
RECORDS: dict[str, dict[str, Any]] = {
    "pack": {"digest": NONE, "size": 9},
    "damaged": {"pack": NONE},
    "replace": {"old": NONE, "new": "1" * 64},
    "doom": {"packs": [NONE], "manifests": []},
    "publish": {"id": NONE, "model": "net", "version": 9, "instead": None},
    "remove": {"id": NONE, "aliases": [], "tags": []},
    "next": {"model": "net", "version": 9},
    "alias": {"model": "net", "alias": "a", "id": NONE, "was": None},
    "unalias": {"model": "net", "alias": "a", "was": NONE},
    "tag": {"id": NONE, "tag": "t"},
    "untag": {"id": NONE, "tag": "t"},
    "note": {"id": NONE, "at": "2026-01-01T00:00:00.000000Z", "text": "x"},
    "run": {"name": "net/z", "model": "net", "at": "2026-01-01T00:00:00.000000Z", "record": {}},
    "artifact": {
        "key": NONE,
        "id": NONE,
        "at": "2026-01-01T00:00:00.000000Z",
        "record": {},
        "was": None,
    },
    "drop-artifact": {"key": NONE, "was": NONE},
    "adopt": {"gaps": [[1, 2]], "reason": "x"},
}
RUN = (
    "state",
    "ended",
    "config",
    "dataset",
    "artifacts",
    "world",
    "resumed",
    "command",
    "git",
    "devices",
    "python",
)
READING: tuple[Sequence[str], ...] = (
    ["ls"],
    ["ls", "net"],
    ["ls", "--json"],
    ["show", "net:v2"],
    ["show", "net:v2", "--json"],
    ["history", "net"],
    ["status"],
    ["runs"],
    ["log", "net:v2"],
    ["verify"],
    ["diff", "net:v1", "net:v2"],
    ["export", "net:v2", "{out}.pt", "--force"],
    ["export", "net:v2", "{out}.safetensors", "--force"],
    ["compare", "net", "tr", "--by", "acc"],
    ["best", "net", "--by", "acc"],
    ["cache", "list"],
    ["advise", "net:v2", "lenet5"],
    ["plan", "net:v2", "lenet5"],
    ["verify", "--frozen", "net:v1", "net:v2"],
    ["compact"],
    ["gc"],
    ["config", "show", "net:v2"],
    ["log", "net:v2"],
    ["eval", "net:v2"],
)


def forged(
    golden: Path, root: Path, fields: Mapping[tuple[str, ...], Any], records: Sequence[Any] = ()
) -> Path:
    """A registry as somebody else may give it away: digests fit, and net:v2 has other fields.

    Args:
        records: what one more entry of the log has.
    """
    copy(golden, root)
    lose_catalog(root)
    (path,) = root.glob("journal/*.log")
    old = [line.entry for line in Journal(root).read()]
    lines, prev = [], entries.START
    for entry in old:
        assert entry is not None
        lines.append(
            entries.write(entry.seq, prev, [_with_fields(root, one, fields) for one in entry.records])
        )
        prev = lines[-1].digest
    if records:
        lines.append(entries.write(len(lines) + 1, prev, records))
    path.write_bytes(b"".join(entry.line for entry in lines))
    return root


def _with_fields(
    root: Path, record: Mapping[str, Any], fields: Mapping[tuple[str, ...], Any]
) -> Mapping[str, Any]:
    if record.get("op") != "publish" or (record["model"], record["version"]) != ("net", 2):
        return record
    manifest = json.loads(record["manifest"])
    for place, value in fields.items():
        node = manifest["record"]
        for name in place[:-1]:
            node = node.setdefault(name, {})
        node.pop(place[-1], None)
        if value is not ABSENT:
            node[place[-1]] = value
    text = json.dumps(manifest)
    manifest_id = digest(text.encode())
    path = root / "manifests" / manifest_id[:2] / f"{manifest_id}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return {**record, "id": manifest_id, "manifest": text}


def test_values_that_are_forged_are_shown(golden: Path, tmp_path: Path) -> None:
    """The forger works: what it writes is accepted where nothing is wrong with it."""
    root = forged(golden, tmp_path / "r", {("metrics", "acc"): 0.25, ("meta",): {"a": 1}})
    registry = Registry(root, create=False)
    assert (registry["net:v2"].metrics, registry["net:v2"].meta) == ({"acc": 0.25}, {"a": 1})
    assert is_state(registry["net:v2"].load(), 2)
    assert broken_rules(registry) == []


ONCE_WRONG: dict[str, tuple[dict[tuple[str, ...], Any], list[str]]] = {
    "lineage": ({("lineage",): "../../../etc/passwd"}, ["diff", "net:v1", "net:v2"]),
    "dataset": ({("provenance", "dataset"): {"model": 5}}, ["show", "net:v2"]),
    "escapes": ({("metrics", ESCAPES): 1.0, ("run",): ESCAPES}, ["show", "net:v2"]),
    "empty provenance": ({("provenance", "buffers"): None}, ["plan", "net:v2", "lenet5"]),
    "no provenance": ({("provenance",): None}, ["ls"]),
    "no time": ({("created",): BIG}, ["show", "net:v2"]),
    "edge": ({("lineage",): [{"kind": ESCAPES, "parent": ESCAPES}]}, ["log", "net:v2"]),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_a_command_that_a_made_up_value_has_troubled_is_not(golden: Path, tmp_path: Path, name: str) -> None:
    fields, command = ONCE_WRONG[name]
    assert told_by(forged(golden, tmp_path / "r", fields), [command, ["rebuild"], command]) == []


@pytest.mark.parametrize("field", ["state", "config", "dataset", "artifacts", "resumed"])
@pytest.mark.parametrize("value", [{"a": {}}, [[]], 5, None], ids=["table", "list", "number", "null"])
def test_a_run_with_a_made_up_field_troubles_no_command(
    golden: Path, tmp_path: Path, field: str, value: Any
) -> None:
    check_run(golden, tmp_path, {field: value})


def test_a_run_whose_record_is_a_number_troubles_no_command(golden: Path, tmp_path: Path) -> None:
    check_run(golden, tmp_path, {"$float": "7ff8000000000000"})


@pytest.mark.parametrize(
    "record",
    [
        {"$float": "7ff8000000000000"},
        {"$float": "zz"},
        {"function": 5, "parameters": [1], "files": {"a": 3}, "seconds": "x"},
        {
            "files": {"a": [{"path": 1}]},
            "seconds": {"$float": "7ff0000000000000"},
            "version": {"a": [ESCAPES]},
        },
    ],
)
@pytest.mark.damages
def test_an_artifact_with_a_made_up_record_troubles_no_command(
    golden: Path, tmp_path: Path, record: Any
) -> None:
    artifact = {"op": "artifact", **RECORDS["artifact"], "record": record}
    commands = [["cache", "list"], ["cache", "list", "--json"], ["cache", "show", "000000"], ["runs"]]
    assert told_by(forged(golden, tmp_path / "r", {}, [artifact]), [*commands, ["rebuild"], *commands]) == []


def check_run(golden: Path, tmp_path: Path, record: Any) -> None:
    run = {"op": "run", **RECORDS["run"], "record": record}
    commands = [["cache", "list"], ["runs"], ["history", "net"], ["show", "net:v2"]]
    assert told_by(forged(golden, tmp_path / "r", {}, [run]), [*commands, ["rebuild"], *commands]) == []


def made_up(chance: random.Random) -> tuple[dict[tuple[str, ...], Any], list[Any]]:
    """Fields of a manifest, or a record, with one odd value."""
    kind = chance.random()
    if kind < 0.5:
        return {chance.choice(FIELDS): chance.choice(VALUES)}, []
    if kind < 0.6:
        return {("lineage",): [chance.choice(EDGES)], ("metrics", chance.choice(METRICS)): 1.0}, []
    if kind < 0.7:
        run = {"op": "run", **RECORDS["run"], "record": {chance.choice(RUN): chance.choice(VALUES[:-1])}}
        return {}, [run]
    op, rest = chance.choice([*RECORDS.items()])
    record = {"op": op, **rest}
    name = chance.choice([*record])
    value = chance.choice(VALUES)
    if value is ABSENT:
        del record[name]
    else:
        record[name] = value
    return {}, [record]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.damages
def test_no_made_up_value_troubles_a_command(golden: Path, tmp_path: Path) -> None:
    for seed in soak.seeds("test_reproduced", 10):
        chance = random.Random(seed)
        fields, records = made_up(chance)
        root = forged(golden, tmp_path / "r", fields, records)
        commands = [[part.format(out=tmp_path / "out") for part in one] for one in chance.sample(READING, 6)]
        told = told_by(root, [["rebuild"], *commands])
        soak.count("test_reproduced", registries=1, commands=1 + len(commands))
        with soak.replayable("test_reproduced", seed):
            assert told == [], f"{fields} {records}"


# -- what another process changes at the last moment ---------------------------------------------------------


def just_before_the_commit(registry: Registry, change: Callable[[], object]) -> None:
    """Let something else happen when a registry is about to lock the log, once."""
    journal = registry.catalog.journal
    locked = journal.locked

    @contextlib.contextmanager
    def later(**options: float) -> Iterator[None]:
        journal.locked = locked  # type: ignore[method-assign]
        change()
        with locked(**options):
            yield

    journal.locked = later  # type: ignore[method-assign]


def when_the_manifest_is_written(registry: Registry, change: Callable[[], object]) -> None:
    """Let something else happen when a registry has written a manifest, once."""
    store = registry.store
    write = store.write_manifest

    def write_and_change(*given: Any) -> Any:
        written = write(*given)
        del store.write_manifest
        change()
        return written

    store.write_manifest = write_and_change  # type: ignore[method-assign]


Moment = Callable[[Registry, Callable[[], object]], None]
MOMENTS: list[Moment] = [just_before_the_commit, when_the_manifest_is_written]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Registry, Registry]:
    """A registry with three versions, as two programs have it open."""
    registry = Registry(tmp_path / "r")
    for number in (1, 2, 3):
        registry.save("net", thinnable(number))
    return registry, Registry(tmp_path / "r")


@pytest.mark.parametrize("moment", MOMENTS)
def test_thinning_moves_no_alias_back(two: tuple[Registry, Registry], moment: Moment) -> None:
    registry, other = two
    registry.set_alias("net:v1", "prod")
    moment(registry, lambda: other.set_alias("net:v2", "prod"))
    registry.thin("net:v1")
    found = versions(registry)
    assert (found["net:v1"].aliases, found["net:v2"].aliases) == ((), ("prod",))
    assert set(registry["net:v1"].load()) == {"model"}
    assert broken_rules(registry) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_thinning_takes_new_names_along(two: tuple[Registry, Registry], moment: Moment) -> None:
    registry, other = two

    def name() -> None:
        other.set_alias("net:v1", "prod")
        other.set_tag("net:v1", "keep")
        other.add_note("net:v1", "hello")

    moment(registry, name)
    registry.thin("net:v1")
    version = versions(registry)["net:v1"]
    assert (version.aliases, version.tags, [text for _, text in version.notes]) == (
        ("prod",),
        ("keep",),
        ["hello"],
    )
    assert set(registry["net:v1"].load()) == {"model"}
    assert broken_rules(registry) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_thinning_spares_a_version_that_another_process_goes_on_from(
    two: tuple[Registry, Registry], moment: Moment
) -> None:
    registry, other = two
    parent = registry["net:v1"].id
    lineage = [{"kind": "resumed-from", "parent": parent}]
    moment(registry, lambda: other.save("net", thinnable(9), lineage=lineage))
    registry.thin("net:v1")
    assert registry["net:v1"].id == parent
    assert set(registry["net:v1"].load()) == {"model", "optimizer"}
    assert broken_rules(registry) == []


@pytest.mark.parametrize("hold", ["alias", "tag"])
def test_a_version_that_gets_a_name_at_the_last_moment_is_not_removed(
    two: tuple[Registry, Registry], hold: str
) -> None:
    registry, other = two
    give = {
        "alias": lambda: other.set_alias("net:v1", "production"),
        "tag": lambda: other.set_tag("net:v1", "production"),
    }
    just_before_the_commit(registry, give[hold])
    with pytest.raises(Conflict, match="is held by"):
        registry.remove(["net:v1"])
    version = versions(registry)["net:v1"]
    assert "production" in (*version.aliases, *version.tags)
    registry["net:v1"].load()


def test_a_removal_by_force_takes_the_names_that_are_there_by_then(two: tuple[Registry, Registry]) -> None:
    registry, other = two
    registry.set_alias("net:v1", "prod")
    just_before_the_commit(registry, lambda: other.set_alias("net:v2", "prod"))
    registry.remove(["net:v1"], force=True)
    assert {name: version.aliases for name, version in versions(registry).items()} == {
        "net:v2": ("prod",),
        "net:v3": (),
    }
    assert broken_rules(registry) == []


@pytest.mark.parametrize("hold", ["alias", "tag", "descendant"])
def test_the_rules_of_a_run_spare_what_gets_a_name_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: str
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    with registry.run("net", keep_last=1) as run:
        first = run.save(model=torch.nn.Linear(2, 2))
        assert first is not None
        give: dict[str, Callable[[], object]] = {
            "alias": lambda: other.set_alias(first.name, "good"),
            "tag": lambda: other.set_tag(first.name, "good"),
            "descendant": lambda: other.save(
                "other", state(1), lineage=[{"kind": "resumed-from", "parent": first.id}]
            ),
        }
        retain = Session.retain

        def give_and_retain(self: Session, *given: Home) -> None:
            just_before_the_commit(registry, give[hold])
            retain(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "retain", give_and_retain)
            run.save(model=torch.nn.Linear(2, 2))
    assert {first.name, "net:v2"} <= set(versions(registry))
    assert broken_rules(registry) == []


# -- a catalog that is made anew says what the one before said -----------------------------------------------


def move_alias_and_remove(registry: Registry) -> None:
    for number in (1, 2):
        save(registry, number)
    registry.set_alias("net:v1", "prod")
    registry.set_alias("net:v2", "prod")
    registry.remove(["net:v2"], force=True)
    collect(registry, grace=0)


def put_back_an_older_log(registry: Registry) -> None:
    """A log from a backup, behind which a version was removed and names were given."""
    for number in (1, 2, 3):
        save(registry, number)
    (path,) = registry.root.glob("journal/*.log")
    before = path.read_bytes()
    registry.set_alias("net:v1", "prod")
    registry.remove(["net:v2"])
    registry.remove_alias("net", "prod")
    registry.set_alias("net:v1", "a")
    path.write_bytes(before)
    registry.add_note("net:v3", "x")


def thin_and_save(registry: Registry) -> None:
    registry.save("net", thinnable(1))
    registry.thin("net:v1")
    registry.save("net", thinnable(2))


def remove_all(registry: Registry) -> None:
    save(registry, 1)
    registry.remove(["net:v1"])


HISTORIES: dict[str, tuple[Callable[[Registry], None], dict[str, tuple[str, ...]]]] = {
    "an alias that moved, and went with its version": (move_alias_and_remove, {"net:v1": ()}),
    "an older log put back": (put_back_an_older_log, {"net:v1": ("a",), "net:v3": ()}),
    "a thinned version": (thin_and_save, {"net:v1": (), "net:v2": ()}),
    "a removed version, before gc": (remove_all, {}),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_lost_catalog_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    make, expected = HISTORIES[name]
    registry = Registry(tmp_path / "r")
    make(registry)
    assert {one: version.aliases for one, version in versions(registry).items()} == expected
    before = dump(registry)
    registry.catalog.close()
    lose_catalog(registry.root)
    rebuilt = registry.rebuild()
    assert (rebuilt.damaged, rebuilt.adopted, rebuilt.unnamed) == ((), (), ())
    assert dump(registry) == before
    assert {one: version.aliases for one, version in versions(registry).items()} == expected


@pytest.mark.damages
def test_an_older_catalog_beside_a_log_of_the_same_size_but_another_history_is_noticed(
    tmp_path: Path,
) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    save(Registry(roots[0]), 1)
    Registry(roots[0]).catalog.close()
    copy(roots[0], roots[1])
    for number, root in enumerate(roots):
        registry = Registry(root)
        registry.add_note("net:v1", f"history {number}")
        registry.catalog.close()
    logs = [next(root.glob("journal/*.log")) for root in roots]
    assert logs[0].stat().st_size == logs[1].stat().st_size
    logs[0].write_bytes(logs[1].read_bytes())
    before = files(roots[0])
    registry = Registry(roots[0], create=False)
    with pytest.raises(Corrupt, match="histor"):
        registry.add_note("net:v1", "more")
    assert files(roots[0]) == before


# -- one flipped bit in the log ------------------------------------------------------------------------------


def number_of(registry: Registry, reference: str) -> int:
    return int(registry[reference].load()["optimizer"]["steps"][0])


def damaged_log(root: Path, kind: str) -> tuple[Path, bytes]:
    """A registry with three versions, and the line of the log that is to be damaged."""
    registry = Registry(root)
    for number in (1, 2, 3):
        save(registry, number)
    if kind == "alias":
        registry.set_alias("net:v1", "prod")
    if kind == "removal":
        registry.remove(["net:v2"])
        registry.add_note("net:v3", "a last line that is damaged would count as cut off")
    registry.catalog.close()
    (path,) = root.glob("journal/*.log")
    words = {"alias": b'"version":1', "plain": b'"version":1', "removal": b'"op":"remove"'}
    (line,) = [one for one in path.read_bytes().splitlines(keepends=True) if words[kind] in one]
    return path, line


@pytest.mark.parametrize("place", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["alias", "plain", "removal"])
def test_a_flipped_bit_in_the_log_costs_nothing_while_the_catalog_is_there(
    tmp_path: Path, kind: str, place: float
) -> None:
    path, line = damaged_log(tmp_path / "r", kind)
    registry = Registry(tmp_path / "r", create=False)
    before = dump(registry)
    flip(path, line, place)
    assert any("is damaged" in problem.message for problem in registry.verify().problems)
    rebuilt = registry.rebuild(adopt=True)
    assert (rebuilt.adopted, rebuilt.unnamed, rebuilt.damaged) == ((), (), ())
    assert rebuilt.healed == 1
    assert dump(registry) == before
    assert number_of(registry, "net") == 3
    collect(registry, grace=0)
    assert registry.rebuild(adopt=True).adopted == ()
    assert set(versions(registry)) == {"net:v1", "net:v3"} | ({"net:v2"} if kind != "removal" else set())
    assert broken_rules(registry) == []


@pytest.mark.parametrize("kind", ["alias", "plain", "removal"])
def test_a_flipped_bit_in_the_log_without_a_catalog_is_named_and_loses_nothing(
    tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "r"
    path, line = damaged_log(root, kind)
    flip(path, line, 0.5)
    lose_catalog(root)
    registry = Registry(root, create=False)
    rebuilt = registry.rebuild()
    assert any("entry" in problem for problem in rebuilt.damaged)
    assert rebuilt.adopted == ()
    with pytest.raises(Corrupt, match="rebuild --adopt"):
        collect(registry, grace=0)
    with pytest.raises(Corrupt, match="rebuild --adopt"):
        save(registry, 4)
    rebuilt = registry.rebuild(adopt=True)
    assert rebuilt.adopted == (() if kind == "removal" else ("net:v1",))
    assert rebuilt.latest == ()
    assert number_of(registry, "net") == 3
    for number in (1, 3) if kind == "removal" else (1, 2, 3):
        assert number_of(registry, f"net:v{number}") == number
    if kind == "alias":
        assert versions(registry)["net:v1"].aliases == ("prod",)
    assert save(registry, 4) not in ("net:v1", "net:v2", "net:v3")
    collect(registry, grace=0)
    assert broken_rules(registry) == []


def flip(path: Path, line: bytes, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(line) + int(place * (len(line) - 1))] ^= 1
    path.write_bytes(data)


# -- two programs, and a catalog that is deleted under one of them -------------------------------------------


def test_a_program_goes_on_when_another_deletes_and_rebuilds_the_catalog(tmp_path: Path) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    for number in (2, 3):
        lose_catalog(root)
        assert Registry(root, create=False).rebuild().versions == number - 1
        assert save(registry, number) == f"net:v{number}"
        assert is_state(registry[f"net:v{number}"].load(), number)
    assert broken_rules(registry) == []


@pytest.mark.parametrize("parts", ["catalog.sqlite", "catalog.sqlite*"])
def test_two_programs_with_two_catalogs_save_under_names_of_their_own(tmp_path: Path, parts: str) -> None:
    """One has the catalog open that was deleted; both save at the same time."""
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    go_reading, go = os.pipe()
    told_reading, told = os.pipe()

    def run(first: int) -> None:
        registry = Registry(root, create=False)
        all_versions(registry)
        os.write(told, b"ready 0\n")
        os.read(go_reading, 1)
        for number in range(first, first + 25):
            os.write(told, f"{save(registry, number)} {number}\n".encode())

    children = [fork(lambda: run(100))]
    with os.fdopen(told_reading) as lines:
        assert lines.readline() == "ready 0\n"
        for path in sorted(root.glob(parts)):
            path.unlink()
        again = Registry(root, create=False)
        assert again.rebuild().versions == 1
        again.catalog.close()
        children.append(fork(lambda: run(200)))
        assert lines.readline() == "ready 0\n"
        os.write(go, b"xx")
        assert [wait(child) for child in children] == [0, 0]
        os.close(told)
        saved = [line.split() for line in lines]
    os.close(go)
    os.close(go_reading)
    assert len(saved) == 50
    assert len({name for name, _ in saved}) == 50
    registry = Registry(root, create=False)
    for name, number in saved:
        assert is_state(registry[name].load(), int(number))
    assert broken_rules(registry) == []
    assert registry.verify().problems == ()
    assert registry.rebuild().versions == 51


# -- smaller ones --------------------------------------------------------------------------------------------


def test_an_exported_checkpoint_with_empty_bytes_is_imported_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    registry.save("net", {"model": {"w": torch.ones(2)}, "extra": {"b": b"", "c": b"x"}})
    import_checkpoint(registry, read_checkpoint_file(export(registry["net"], tmp_path / "x.pt")), "back")
    assert registry["back"].load()["extra"] == {"b": b"", "c": b"x"}


@pytest.fixture
def series(tmp_path: Path) -> tuple[Registry, Registry]:
    """Five versions of which older ones can be compacted, as two programs have them open."""
    registry = Registry(tmp_path / "r")
    for number in range(1, 6):
        model = {"near": torch.arange(3_000.0) + number * 1e-6, "own": torch.full((50, 30), float(number))}
        registry.save("net", {"model": model})
    return registry, Registry(tmp_path / "r")


def compact_and_collect(registry: Registry) -> None:
    before = set(registry.store.pack_digests())
    registry.compact()
    collect(registry, grace=0)
    assert len(before - set(registry.store.pack_digests())) > 1


def test_verify_beside_a_removal_and_gc_raises_no_alarm(
    series: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = series
    manifests = verification._Check.manifests

    def manifests_and_remove(check: verification._Check) -> None:
        manifests(check)
        other.remove(["net:v1"])
        assert collect(other, grace=0).packs == 1

    monkeypatch.setattr(verification._Check, "manifests", manifests_and_remove)
    assert registry.verify().problems == ()


def test_verify_beside_compaction_and_gc_raises_no_alarm(
    series: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = series
    rows = verification._Check._pack_rows

    def rows_and_compact(check: verification._Check) -> list[tuple[str, int, int]]:
        found = rows(check)
        compact_and_collect(other)
        return found

    monkeypatch.setattr(verification._Check, "_pack_rows", rows_and_compact)
    assert registry.verify().problems == ()


def test_a_version_that_comes_and_goes_while_its_pack_is_compacted_is_no_error(
    series: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = series
    equal = registry["net:v2"].load()
    tensors_of, users_of = Store.tensors_of, repacking.users_of
    asked: list[str] = []

    def users_of_another(query: Any, pack: str) -> set[str]:
        # The first time the number of users is remembered, the second time they are read one by one.
        asked.append(pack)
        if len(asked) == 2:
            other.save("passing", equal)
        return users_of(query, pack)

    def tensors_of_none(store: Store, manifest_id: str, **how: Any) -> frozenset[str]:
        if store is registry.store and len(asked) == 2 and "passing" in other:
            if manifest_id != other["passing"].id:
                return tensors_of(store, manifest_id, **how)
            other.remove(["passing:v1"])
            collect(other, grace=0)
        return tensors_of(store, manifest_id, **how)

    pack = registry.catalog.locate([next(registry["net:v2"].parameters())[3]]).popitem()[1].pack
    monkeypatch.setattr(repacking, "users_of", users_of_another)
    monkeypatch.setattr(Store, "tensors_of", tensors_of_none)
    assert repacking.tidy(registry.catalog, registry.store, [pack], most_users=None) == []
    assert len(asked) > 2
    assert "passing" not in other


LOADS: dict[str, Callable[[Registry], Any]] = {
    "mapped": lambda registry: registry["net:v2"].load()["model"]["own"],
    "copied": lambda registry: registry["net:v2"].load(copy=True)["model"]["own"],
    "one tensor": lambda registry: registry["net:v2"].load("model/own")["model"]["own"],
    "into a live tensor": lambda registry: loaded_into(registry),
}


def loaded_into(registry: Registry) -> torch.Tensor:
    live = torch.zeros(50, 30)
    registry["net:v2"].load_into(model={"own": live})
    return live


@pytest.mark.parametrize("load", LOADS)
def test_loading_beside_compaction_and_gc_gives_what_was_saved(
    series: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    registry, other = series
    wanted = Locator.chosen
    done = []

    def wanted_and_compact(locator: Locator, *given: Any) -> Any:
        found = wanted(locator, *given)
        if not done:
            done.append(True)
            compact_and_collect(other)
        return found

    monkeypatch.setattr(Locator, "chosen", wanted_and_compact)
    assert torch.equal(LOADS[load](registry), torch.full((50, 30), 2.0))
    assert done
    assert registry.store.distrusted == set()


def test_a_change_of_a_loaded_tensor_never_reaches_the_store(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    registry["net:v1"].load()["model"]["own"].fill_(7)
    assert is_state(registry["net:v1"].load(), 1)


# -- a writer that gc takes for a dead one -------------------------------------------------------------------


def stopped_writing(root: Path) -> int:
    """A child that saves, and has stopped itself where the bytes of its pack are to become durable."""

    class Stopping(durable.Disk):
        def sync(self, fd: int, path: Path) -> None:
            if path.parent.name == "tmp":
                durable.disk = durable.Disk()
                os.kill(os.getpid(), signal.SIGSTOP)
            super().sync(fd, path)

    def run() -> None:
        registry = Registry(root, create=False)
        durable.disk = Stopping()
        save(registry, 2)

    pid = fork(run)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def may_unshare() -> bool:
    command = ["unshare", "--pid", "--uts", "--fork", "--mount-proc", "true"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


GC = f"{sys.executable} -m registry.cli gc --grace"
ELSEWHERE = {
    "another container with this host's name": ["--pid", "--fork", "--mount-proc", "sh", "-c", f"{GC} 3600"],
    "such a one, without grace": ["--pid", "--fork", "--mount-proc", "sh", "-c", f"{GC} 0"],
    "a container with a name of its own": [
        *("--pid", "--uts", "--fork", "--mount-proc"),
        *("sh", "-c", f"hostname elsewhere && {GC} 0"),
    ],
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_gc_in_another_container_leaves_the_file_of_a_writer(tmp_path: Path, place: str) -> None:
    if not may_unshare():
        pytest.skip("this user may not make a namespace for processes")
    root = tmp_path / "r"
    save(Registry(root), 1)
    (root / "tmp" / "left-behind").write_bytes(b"x")
    os.utime(root / "tmp" / "left-behind", (time.time() - 4_000,) * 2)
    pid = stopped_writing(root)
    writing = {path.name for path in root.glob("tmp/*")} - {"left-behind"}
    assert len(writing) == 1
    environment = {**os.environ, "REGISTRY_ROOT": str(root)}
    command = ["unshare", *ELSEWHERE[place]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    left = {path.name for path in root.glob("tmp/*")}
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    assert left == writing
    registry = Registry(root, create=False)
    assert is_state(registry["net:v2"].load(), 2)
    assert broken_rules(registry) == []


@pytest.mark.parametrize("grace", [0, 3_600])
def test_gc_leaves_the_file_of_a_writer_that_stands_still_for_hours(tmp_path: Path, grace: int) -> None:
    """It was suspended, its disk is slow, or the clock was set."""
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    pid = stopped_writing(root)
    (path,) = root.glob("tmp/*")
    os.utime(path, (time.time() - 9_000,) * 2)
    found = collect(registry, grace=grace)
    os.kill(pid, signal.SIGCONT)
    assert (wait(pid), found.temporary) == (0, 0)
    assert is_state(registry["net:v2"].load(), 2)
    assert broken_rules(registry) == []


# -- runs of a registry that somebody else made --------------------------------------------------------------


@pytest.mark.parametrize("link", ["run.log", "run-1", "tr"])
def test_a_run_writes_through_no_link(tmp_path: Path, link: str) -> None:
    root, home = tmp_path / "r", tmp_path / "home"
    registry = Registry(root)
    save(registry, 1)
    home.mkdir()
    (home / ".bashrc").write_text("# mine\n")
    before = files(home)
    runs = root / "runs"
    target = {
        "run.log": runs / "tr" / "run-1" / "run.log",
        "run-1": runs / "tr" / "run-1",
        "tr": runs / "tr",
    }[link]
    target.parent.mkdir(parents=True)
    target.symlink_to(home / ".bashrc" if link == "run.log" else home)
    with pytest.raises(RegistryError), registry.run("tr", config={"lr": "$(touch PWNED)"}) as run:
        run.save(model=torch.nn.Linear(2, 2))
    assert files(home) == before


@pytest.mark.parametrize("name", ["../../../home/x", "tr/../../../home/x", "/tmp/x", "tr/x/y"])
@pytest.mark.damages
def test_a_log_with_a_run_that_leaves_its_folder_is_damage(golden: Path, tmp_path: Path, name: str) -> None:
    record = {"op": "run", "name": name, "model": "tr", "at": "2026-01-01T00:00:00.000000Z", "record": {}}
    root = forged(golden, tmp_path / "r", {("run",): name}, [record])
    registry = Registry(root, create=False)
    rebuilt = registry.rebuild()
    assert rebuilt.damaged
    assert [run.name for run in registry.runs.find()] == ["tr/run-1"]
    before = files(tmp_path)
    for command in (["board", "net:v2"], ["logs", "net:v2"]):
        assert in_child(lambda command=command: refuses(root, command)) == 0
    assert files(tmp_path) == before


def refuses(root: Path, command: list[str]) -> None:
    """Run a command that must fail in one line."""
    os.environ["REGISTRY_ROOT"] = str(root)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as caught:
        app.main(command)
    assert caught.value.code == 1, told.getvalue()
    assert "unexpected" not in told.getvalue()
