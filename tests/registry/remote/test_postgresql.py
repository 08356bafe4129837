"""The log of a shared registry in a real PostgreSQL: hosts, rights, and connections that end around a commit."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from databases import OWNER, Database, Fault, Relay, postgresql, programs, relay
from hosts import entries_of, numbers, state
from servers import Layer

from registry import Registry
from registry.remote import postgresql as module
from registry.remote import shared_log
from registry.remote.bucket import Denied, Unreachable
from registry.remote.folder import FolderBucket
from registry.remote.journal import BucketJournal, Journal
from registry.remote.postgresql import PostgresJournal
from registry.remote.remote import put_log_in
from registry.remote.urls import Address, log_place
from registry.store.errors import Conflict, Corrupt, Invalid, StorageError, Unsupported

Hosts = Callable[..., Registry]
NAME = "0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    """A real PostgreSQL."""
    if programs() is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with postgresql() as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user of the tests, and hosts that ask at once."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGUSER", OWNER)
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    monkeypatch.setattr(shared_log, "_CONFIRM", 0.0)


@pytest.fixture
def database(server: Database) -> str:
    """The URL of a database of the test's own."""
    name = f"d{secrets.token_hex(8)}"
    run(server.url("postgres"), f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.fixture
def before(server: Database) -> Iterator[Relay]:
    """A relay before the server."""
    with relay(server.folder) as state:
        yield state


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "bucket").as_uri()


@pytest.fixture
def host(url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """Opens the registry as a host of some name has it; its log is in PostgreSQL."""

    def opened(name: str, log: str = database, **options: Any) -> Registry:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
        put_log_in(url, log)
        return Registry(url, **options)

    return opened


def run(url: str, statement: str) -> list[Any]:
    """Run a statement as the owner."""
    with psycopg.connect(url, user=OWNER, password=None, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def through(before: Relay, url: str) -> str:
    """The URL of a database, through the relay."""
    return before.url(url.rpartition("/")[2])


def table(url: str) -> str:
    """The one table of a database."""
    ((name,),) = run(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return str(name)


def terminated(url: str) -> None:
    """End all connections to a database, as `pg_terminate_backend` does."""
    run(
        url.rpartition("/")[0] + "/postgres",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.rpartition('/')[2]}'",
    )


def value(registry: Registry, reference: str) -> float:
    return float(registry[reference].load()["model"]["w"][0])


# -- what every journal promises ---------------------------------------------------------------------------


@pytest.fixture(params=["bucket", "postgresql"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    """Each kind of journal."""
    if request.param == "bucket":
        return BucketJournal(FolderBucket(tmp_path / "bucket"))
    made = PostgresJournal(log_place(request.getfixturevalue("database"), NAME))
    made.make()
    made.make()
    return made


def test_an_entry_is_created_once(journal: Journal) -> None:
    assert journal.get(1, 100) is None
    assert journal.create(1, b"first\0")
    assert not journal.create(1, b"second")
    assert journal.get(1, 6) == b"first\0"
    assert list(journal.behind(1, 100)) == []
    with pytest.raises(Corrupt, match=r"1.* is larger than 5 bytes"):
        journal.get(1, 5)


def test_one_of_many_threads_creates_an_entry(journal: Journal) -> None:
    barrier = threading.Barrier(6)
    won: list[int] = []

    def create(number: int) -> None:
        barrier.wait()
        if journal.create(1, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert journal.get(1, 10) == b"%d" % won[0]


def test_entries_are_read_in_order(journal: Journal) -> None:
    data = {number: os.urandom(number) for number in range(1, 151)}
    for number in sorted(data, reverse=True):
        assert journal.create(number, data[number])
    assert dict(journal.behind(0, 1000)) == data
    assert [number for number, _ in journal.behind(20, 1000)] == list(range(21, 151))


# -- a registry --------------------------------------------------------------------------------------------


def test_everything_of_a_folder_works(host: Hosts, url: str, tmp_path: Path) -> None:
    a, b = host("a"), host("b")
    torch.manual_seed(0)
    weights, saved = torch.randn(20_000), []
    for _ in range(3):
        weights = weights + 1e-4 * torch.randn(20_000)
        saved.append(weights.clone())
        a.save("net", {"model": {"w": weights.clone()}}, metrics={"accuracy": 0.5})
    with b.run("net", monitor="accuracy") as training:
        training.save(model=torch.nn.Linear(3, 2), epoch=1, metrics={"accuracy": 0.7})
    b.set_alias("net:v2", "production")
    assert a["net@best"].version == 4
    a.remove(["net:v1"])
    a.compact()
    a.collect_garbage(grace=0)
    assert torch.equal(b["net@production"].load()["model"]["w"], saved[1])
    other = Registry(tmp_path / "folder")
    b.copy_to(other)
    assert other.verify().problems == ()
    for registry in (a, b, host("c")):
        assert numbers(registry) == [2, 3, 4]
        assert registry.verify().problems == ()
        assert registry.verify(["net"]).problems == ()
        assert entries_of(registry) == entries_of(a)
    assert not list((tmp_path / "bucket").glob("journal/*"))
    # A host that has lost its folder, and one that is given its folder, find the log.
    again = Registry(a.root, create=False)
    again.rebuild()
    again.save("net", state(5))
    assert value(b, "net:v5") == 5


def test_the_log_is_found_from_the_url_alone(host: Hosts, url: str, tmp_path: Path) -> None:
    host("a").save("net", state(1))
    program = [sys.executable, "-m", "registry.cli"]
    environment = {**os.environ, "REGISTRY_ROOT": url, "XDG_DATA_HOME": str(tmp_path / "host-new")}
    for words in (["list"], ["show", "net"], ["verify", "net"]):
        done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "net" in done.stdout or "1 " in done.stdout


def saves(url: str, home: str, number: int, count: int) -> None:
    os.environ["XDG_DATA_HOME"] = home
    registry = Registry(url)
    for i in range(count):
        registry.save("net", state(100 * number + i))


def test_hosts_that_save_at_once_lose_nothing(host: Hosts, url: str, tmp_path: Path) -> None:
    host("0")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=saves, args=(url, str(tmp_path / f"host-{n}"), n, 5)) for n in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    hosts = [host(name) for name in ("0", "1", "new")]
    for registry in hosts:
        assert numbers(registry) == list(range(1, 11))
        assert registry.verify().problems == ()
        assert entries_of(registry) == entries_of(hosts[0])
    values = {value(hosts[2], f"net:v{n}") for n in range(1, 11)}
    assert values == {100.0 * n + i for n in range(2) for i in range(5)}


def test_a_clone_reads_many_entries_at_a_time(host: Hosts, before: Relay, database: str) -> None:
    a = host("a", through(before, database))
    a.save("net", state(1))
    for number in range(100):
        a.set_tag("net", f"tag-{number}")
    before.statements.clear()
    before.connections = 0
    b = host("b", through(before, database))
    assert len(b["net"].tags) == 100
    assert len([one for one in before.statements if b"SELECT seq" in one]) < 30
    assert before.connections <= 3
    assert entries_of(a) == entries_of(b)


def test_several_registries_share_a_database(
    host: Hosts, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    a.save("net", state(1))
    other = (tmp_path / "second").as_uri()
    put_log_in(other, database)
    b = Registry(other)
    b.save("net", state(2))
    assert (value(a, "net"), value(b, "net")) == (1, 2)
    assert numbers(a) == numbers(b) == [1]


# -- making one --------------------------------------------------------------------------------------------


def test_init_says_where_the_log_lies_and_keeps_no_user(database: str, url: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "registry.cli", "init", url, "--log", database]
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "host"), "PGPASSWORD": "CANARY"}
    for said in ("Made a registry at", "There is a registry already at"):
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        assert said in done.stdout
    text = (tmp_path / "bucket" / "registry.toml").read_text()
    assert text == f'format = 2\nlog = "{database}#{table(database)}"\n'
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"CANARY" in path.read_bytes()]


@pytest.mark.parametrize(
    "log",
    [
        "postgresql://me:CANARY@db/models",
        "postgresql://me:CANARY/models",
        "postgresql://me:CANARY%40db/models",
        "postgresql://me:CANARY,db/models",
        "postgresql://CANARY@db/models",
        "postgresql://db/models?password=CANARY",
        "postgresql://db/models#CANARY",
        "mysql://db/CANARY",
        "CANARY",
    ],
)
def test_a_url_of_more_than_a_database_is_refused_and_not_repeated(
    log: str, url: str, tmp_path: Path
) -> None:
    with pytest.raises(Invalid, match=r"a server and a database alone.*PGPASSFILE") as refused:
        put_log_in(url, log)
    assert "CANARY" not in str(refused.value)
    assert not (tmp_path / "bucket").exists()


def test_a_folder_of_one_computer_has_its_log_itself(tmp_path: Path, database: str) -> None:
    with pytest.raises(Invalid, match="only the log of a shared registry"):
        put_log_in(str(tmp_path / "r"), database)
    assert not (tmp_path / "r").exists()


def test_a_registry_whose_log_lies_elsewhere_is_refused(
    url: str, database: str, server: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "host"))
    Registry(url).save("net", state(1))
    for gone in ((), ("registry.toml",)):
        for name in gone:
            (tmp_path / "bucket" / name).unlink()
        with pytest.raises(Conflict, match="log of this registry lies in the bucket already"):
            put_log_in(url, database)
    assert run(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    other = (tmp_path / "second").as_uri()
    put_log_in(other, database)
    with pytest.raises(Conflict, match=f"lies in .*{database.rpartition('/')[2]}.* already"):
        put_log_in(other, server.url("postgres"))


def test_a_table_of_a_registry_that_is_gone_is_not_gone_on_with(
    host: Hosts, database: str, tmp_path: Path
) -> None:
    host("a").save("net", state(1))
    (tmp_path / "bucket").rename(tmp_path / "moved")
    with pytest.raises(Conflict, match=r"the log of a registry that is not at .* any more; drop it"):
        host("b")
    assert not (tmp_path / "bucket" / "registry.toml").exists()


def test_a_table_that_another_makes_at_this_moment_is_used(database: str) -> None:
    journal = PostgresJournal(log_place(database, NAME))
    with psycopg.connect(database) as other:
        other.execute(f"CREATE TABLE journal_{NAME} (seq bigint PRIMARY KEY, body bytea NOT NULL)".encode())
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(journal.make)
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while run(database, waits) == [(0,)]:
                assert not made.done()
            other.commit()
            made.result()
    assert journal.create(1, b"first")


def test_several_make_one_registry_at_once(database: str, url: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "registry.cli", "init", url, "--log", database]
    makers = [
        subprocess.Popen(
            program,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path / f"host-{number}")},
            stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]
    assert [maker.communicate()[1] for maker in makers] == [b""] * 3
    (row,) = run(database, f"SELECT count(*) FROM {table(database)}")
    assert row == (1,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('log = "postgresql://h/d#pg_authid"', "does not know"),
        ('log = "postgresql://u:p@h/d#journal_0123456789abcdef"', "does not know"),
        ('log = "raft://h"', "does not know"),
        ("log = 3", "does not know"),
        ("log = [", r"registry\.toml: is no TOML"),
        ("log = " + "[" * 9999, r"registry\.toml: is no TOML"),
        ("\udcff", r"registry\.toml: is no TOML"),
    ],
)
def test_settings_in_a_bucket_that_make_no_sense_are_refused(
    url: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "host"))
    FolderBucket(tmp_path / "bucket").create("registry.toml", text.encode(errors="surrogateescape"))
    with pytest.raises((Invalid, Unsupported), match=said):
        Registry(url)
    assert not (tmp_path / "host").exists()


# -- rights and refusals -----------------------------------------------------------------------------------


def test_insert_and_select_are_enough_and_each_is_named_where_it_lacks(
    host: Hosts, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host("a").save("net", state(1))
    role = f"r{secrets.token_hex(8)}"
    run(database, f"CREATE ROLE {role} LOGIN")
    monkeypatch.setenv("PGUSER", role)
    with pytest.raises(Denied, match=f"the user {role} lacks a right .*GRANT SELECT, INSERT ON journal_"):
        host("b", create=False)
    run(database, f"GRANT SELECT ON {table(database)} TO {role}")
    b = host("b", create=False)
    assert value(b, "net:v1") == 1
    with pytest.raises(Denied, match=r"lacks a right .*INSERT"):
        b.save("net", state(2))
    assert numbers(b) == [1]
    run(database, f"GRANT INSERT ON {table(database)} TO {role}")
    b.save("net", state(2))
    b.remove(["net:v1"])
    b.compact()
    b.collect_garbage(grace=0)
    assert b.verify().problems == ()
    assert numbers(host("c")) == [2]


def test_a_user_who_may_not_create_makes_nothing(
    url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = f"r{secrets.token_hex(8)}"
    run(database, f"CREATE ROLE {role} LOGIN")
    monkeypatch.setenv("PGUSER", role)
    with pytest.raises(Denied, match="GRANT CREATE ON SCHEMA public"):
        put_log_in(url, database)
    assert not (tmp_path / "bucket" / "registry.toml").exists()


def passwords(server: Database, lines: str) -> None:
    """Let a server ask some users for passwords."""
    path = server.folder / "data" / "pg_hba.conf"
    path.write_text(f"{lines}\nlocal all all trust\n")
    server.control("-s", "reload")


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("scram-sha-256", "CANARY-wrong", "PGPASSWORD, PGPASSFILE or PGSERVICE"),
        ("scram-sha-256", None, "PGPASSWORD, PGPASSFILE or PGSERVICE"),
        ("scram-sha-256", "CANARY-right", ""),
        # The bucket names the server, so it is not simply given the password.
        ("password", "CANARY-right", "cleartext password.*set PGREQUIREAUTH=password"),
        ("reject", "CANARY-right", "does not let this user in"),
    ],
)
def test_a_password_is_found_and_never_repeated(
    server: Database,
    database: str,
    method: str,
    given: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = PostgresJournal(log_place(database, NAME))
    journal.make()
    role = f"r{secrets.token_hex(8)}"
    run(
        database,
        f"CREATE ROLE {role} LOGIN PASSWORD 'CANARY-right'; GRANT SELECT ON journal_{NAME} TO {role}",
    )
    passwords(server, f"local all {role} {method}")
    monkeypatch.setenv("PGUSER", role)
    if given:
        monkeypatch.setenv("PGPASSWORD", given)
    journal = PostgresJournal(log_place(database, NAME))
    if not said:
        assert journal.get(1, 10) is None
        return
    with pytest.raises(Denied, match=said) as refused:
        journal.get(1, 10)
    assert "CANARY" not in str(refused.value) + repr(journal)
    assert "\n" not in str(refused.value)


def test_a_service_names_server_and_user(
    server: Database, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGUSER")
    name = database.rpartition("/")[2]
    (tmp_path / "services").write_text(f"[team]\nhost={server.folder}\ndbname={name}\nuser={OWNER}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "team")
    PostgresJournal(log_place("postgresql://", NAME)).make()
    assert table(database) == f"journal_{NAME}"


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("{server}/nothing", Denied, 'database "nothing" does not exist.*check the database'),
        (
            "postgresql://127.0.0.1:1/x",
            Unreachable,
            r"Connection refused\); repeat, or check its address, PGHOST",
        ),
        ("postgresql://%2Ftmp%2Fnothing/x", Unreachable, "No such file or directory.*PGHOST"),
    ],
)
def test_a_server_that_does_not_let_in_is_named(
    server: Database, url: str, kind: type[StorageError], said: str
) -> None:
    place = log_place(url.format(server=server.url("x").rpartition("/")[0]), NAME)
    begun = time.monotonic()
    with pytest.raises(kind, match=said) as refused:
        PostgresJournal(place).get(1, 10)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - begun < 10


def test_a_server_that_only_reads_is_named(host: Hosts, database: str) -> None:
    a = host("a")
    a.save("net", state(1))
    run(database, f"ALTER DATABASE {database.rpartition('/')[2]} SET default_transaction_read_only = on")
    b = host("b")
    assert value(b, "net") == 1
    with pytest.raises(Denied, match=r"takes no writes .*PGTARGETSESSIONATTRS=read-write"):
        b.save("net", state(2))
    assert numbers(b) == [1]


def test_a_table_that_was_dropped_is_named(host: Hosts, database: str) -> None:
    a = host("a")
    a.save("net", state(1))
    run(database, f"DROP TABLE {table(database)}")
    with pytest.raises(StorageError, match=r"there is no table journal_.*dropped"):
        a.save("net", state(2))
    assert value(a, "net") == 1


@pytest.mark.damages
def test_a_history_that_was_put_back_is_noticed(host: Hosts, database: str) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    assert value(b, "net") == 1
    run(database, f"DELETE FROM {table(database)} WHERE seq = 2")
    with pytest.raises(Corrupt, match=r"history of the registry changed: entry 2, .* is missing there"):
        b.save("net", state(2))
    assert run(database, f"SELECT count(*) FROM {table(database)}") == [(1,)]


@pytest.mark.damages
def test_a_row_that_was_edited_is_refused(host: Hosts, database: str) -> None:
    host("a").save("net", state(1))
    run(database, f"UPDATE {table(database)} SET body = set_byte(body, 30, 7) WHERE seq = 2")
    with pytest.raises(Corrupt, match=r"#journal_[0-9a-f]{16}: entry 2: .* nothing is written"):
        host("b").save("net", state(2))


# -- connections that end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("how", ["ended by the server", "cut on the way"])
def test_a_connection_that_ends_around_the_commit_makes_one_version(
    host: Hosts, before: Relay, database: str, moment: str, how: str
) -> None:
    a = host("a", through(before, database))
    a.save("net", state(1))

    def end() -> None:
        if how == "ended by the server":
            terminated(database)

    before.faults.append(Fault(b"INSERT", **{moment: end}))  # type: ignore[arg-type]
    a.save("net", state(2))
    assert before.faults[0].is_done
    assert [value(a, f"net:v{number}") for number in (1, 2)] == [1, 2]
    b = host("b", through(before, database))
    assert numbers(b) == [1, 2]
    assert entries_of(a) == entries_of(b)


def test_a_backend_that_is_killed_inside_the_statement_commits_nothing(host: Hosts, database: str) -> None:
    a = host("a")
    a.save("net", state(1))
    name = table(database)
    run(
        database,
        "CREATE SEQUENCE ends; CREATE FUNCTION kill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF nextval('ends') <= 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END $$; "
        f"CREATE CONSTRAINT TRIGGER kills AFTER INSERT ON {name} DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION kill()",
    )
    a.save("net", state(2))
    assert run(database, "SELECT last_value FROM ends") == [(3,)]
    assert numbers(host("b")) == [1, 2]
    assert run(database, f"SELECT array_agg(seq ORDER BY seq) FROM {name}") == [([1, 2, 3],)]


def test_a_server_that_is_started_again_is_gone_on_with(
    host: Hosts, server: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_UNREACHABLE", "fail")
    a = host("a")
    a.save("net", state(1))
    server.control("-m", "fast", "-w", "-s", "stop")
    try:
        begun = time.monotonic()
        assert value(a, "net") == 1
        with pytest.raises(Unreachable, match="the server does not answer"):
            a.save("net", state(2))
        assert time.monotonic() - begun < 10
    finally:
        server.start()
    a.save("net", state(3))
    assert numbers(host("b")) == [1, 2]
    assert value(a, "net:v2") == 3


def test_a_connection_that_ended_while_nobody_asked_is_made_again(
    host: Hosts, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    for number in (1, 2):
        a.save("net", state(number))
        terminated(database)
    assert [value(a, f"net:v{number}") for number in (1, 2)] == [1, 2]
    assert caplog.text == ""


def test_a_server_that_is_frozen_is_not_waited_for(
    host: Hosts, before: Relay, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a", through(before, database))
    a.save("net", state(1))
    monkeypatch.setattr(module, "_ANSWER", 0.3)
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    monkeypatch.setenv("REGISTRY_UNREACHABLE", "fail")
    before.latency = 30.0
    with pytest.raises(Unreachable, match="does not answer"):
        a.save("net", state(2))
    before.latency = 0.0
    a.save("net", state(2))
    assert numbers(a) == [1, 2]


def test_a_save_that_is_killed_around_the_commit_loses_nothing(
    host: Hosts, before: Relay, database: str, url: str, tmp_path: Path
) -> None:
    a = host("a", through(before, database))
    a.save("net", state(1))
    program = (
        "import sys, torch; from registry import Registry; r = Registry(sys.argv[1]); "
        "r.save('net', {'model': {'w': torch.full((1000,), float(sys.argv[2])), 'same': torch.ones(1000)}})"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "host-k")}
    # The host's first save is killed, then the one that finds what that has left.
    for number, moment in enumerate(("before", "after", "before", "after"), start=2):
        there = numbers(a)
        child = subprocess.Popen([sys.executable, "-c", program, url, str(number)], env=environment)

        def kill(child: subprocess.Popen[bytes] = child) -> None:
            child.send_signal(signal.SIGKILL)
            child.wait()

        before.faults[:] = [Fault(b"INSERT", **{moment: kill})]  # type: ignore[arg-type]
        assert child.wait() == -signal.SIGKILL
        found = numbers(a)
        assert found == list(range(1, len(there) + 1 + (moment == "after")))
        if moment == "after":
            assert value(a, f"net:v{found[-1]}") == number
    k = host("k", through(before, database))
    k.save("net", state(99))
    assert value(a, "net") == 99
    a.collect_garbage(grace=0)
    for registry in (a, k, host("new", through(before, database))):
        assert registry.verify().problems == ()
        assert entries_of(registry) == entries_of(a)


def test_a_forked_child_has_a_connection_of_its_own(host: Hosts, before: Relay, database: str) -> None:
    a = host("a", through(before, database))
    a.save("net", state(1))
    made = before.connections
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            a.save("net", state(2))
            # Its end must not end the parent's connection.
            del a
        except BaseException:
            os._exit(5)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert before.connections == made + 1
    a.save("net", state(3))
    assert before.connections == made + 1
    assert numbers(a) == [1, 2, 3]


def at_once(*calls: Callable[[], object]) -> None:
    """Call functions in threads of their own."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_of_one_process_share_a_connection(host: Hosts, before: Relay, database: str) -> None:
    a = host("a", through(before, database))
    at_once(*(lambda number=number: a.save("net", state(number)) for number in range(4)))
    assert numbers(a) == [1, 2, 3, 4]
    assert {value(a, f"net:v{number}") for number in range(1, 5)} == {0.0, 1.0, 2.0, 3.0}
    journal = PostgresJournal(log_place(through(before, database), table(database).removeprefix("journal_")))
    made, found = before.connections, []
    before.latency = 0.05
    at_once(*(lambda: found.append(journal.get(1, 1 << 20)) for _ in range(6)))
    assert len(found) == 6
    assert len(set(found)) == 1
    assert before.connections == made + 1


# -- the client --------------------------------------------------------------------------------------------


def test_the_client_is_named_where_it_is_missing(
    url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "registry.remote.postgresql", None)
    with pytest.raises(Unsupported, match=r"pip install 'torch-registry\[postgresql\]'"):
        put_log_in(url, database)


def test_no_other_registry_loads_the_client(url: str, tmp_path: Path) -> None:
    program = (
        "import sys; from registry import Registry; [Registry(place).models() for place in sys.argv[1:]]; "
        "sys.exit(any(name.startswith('psycopg') for name in sys.modules))"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "host")}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "r"), url], env=environment, check=True)


@pytest.mark.damages  # its folders cannot be opened without the keys
def test_the_packs_lie_on_a_real_s3_server(
    s3: Layer, address: Address, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_log_in(str(address), database)
    hosts = []
    for name in "ab":
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
        hosts.append(Registry(str(address)))
        hosts[-1].save("net", state(len(hosts)))
    assert [[value(one, f"net:v{number}") for number in (1, 2)] for one in hosts] == [[1, 2], [1, 2]]
    hosts[0].remove(["net:v2"])
    assert hosts[0].collect_garbage(grace=0).packs >= 1
    assert hosts[1].verify().problems == ()
    assert not any("/journal/" in request for request in s3.requests if request.startswith("PUT"))


@pytest.mark.parametrize(
    "log",
    [
        "postgresql://",
        "postgres://db:5432,[::1]:5433/models",
        "postgresql:///models",
        "postgresql://%2Frun%2Fpg/x",
    ],
)
def test_servers_ports_and_sockets_are_places_of_a_log(log: str) -> None:
    assert log_place(log, NAME) == f"{log}#journal_{NAME}"
