"""The outbox: what is saved while a shared registry cannot be reached is kept, and shared in order later."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.catalog.naming import point
from registry.catalog.versions import Version
from registry.log import entries
from registry.log.metrics import Monitor
from registry.remote import shared_log
from registry.remote.bucket import Denied
from registry.remote.folder import FolderBucket
from registry.store.errors import Invalid, NotFound, StorageError, Unsupported
from registry.upkeep.outbox import Outbox

Hosts = Callable[..., Registry]


@pytest.fixture(autouse=True)
def asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    monkeypatch.setattr(shared_log, "_REST", 0.0)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def away(bucket: Path) -> None:
    """Unmount the folder that stands for the bucket."""
    bucket.rename(bucket.with_name("elsewhere"))


def back(bucket: Path) -> None:
    bucket.with_name("elsewhere").rename(bucket)


def state(number: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((5_000,), float(number)), "same": torch.full((5_000,), 0.5)}}


def value(registry: Registry, reference: str) -> float:
    return float(registry[reference].load()["model"]["w"][0])


def with_one_pending(host: Hosts, bucket: Path) -> Registry:
    """A host with `net:v1`, and `net:pending-1` saved while the bucket is away, which it still is."""
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    a.save("net", state(1))
    return a


def assert_whole(*registries: Registry) -> None:
    for registry in registries:
        assert registry.verify().problems == ()


def test_what_is_saved_offline_gets_the_next_numbers_in_order(host: Hosts, bucket: Path) -> None:
    a, b = host("a"), host("b")
    for i in range(1, 4):
        a.save("net", state(i))
    away(bucket)
    kept = [a.save("net", state(i), epoch=i) for i in (10, 11, 12)]
    assert [one.name for one in kept] == ["net:pending-1", "net:pending-2", "net:pending-3"]
    assert [float(one.load()["model"]["w"][0]) for one in kept] == [10, 11, 12]
    assert [value(a, f"net:pending-{i}") for i in (1, 2, 3)] == [10, 11, 12]
    assert value(a, "net") == value(a, "net@latest") == 12
    assert value(a, "net:v3") == 3
    back(bucket)
    b.save("net", state(4))
    b.save("net", state(5))
    b.remove(["net:v1", "net:v2", "net:v3"])
    b.collect_garbage(grace=0)
    # The next save shares them first.
    assert a.save("net", state(13)).name == "net:v9"
    assert [value(b, f"net:v{i}") for i in range(6, 10)] == [10, 11, 12, 13]
    assert [b[f"net:v{i}"].id for i in (6, 7, 8)] == [one.id for one in kept]
    assert b["net:v6"].epoch == 10
    assert b["net:v6"].row.notes == ()
    assert not a.outbox
    with pytest.raises(NotFound, match="if it was shared, it has a number now: registry ls net"):
        a["net:pending-1"]
    assert value(a, "net") == 13
    assert_whole(a, b, Registry(a.root / "outbox"))
    assert list((a.root / "outbox").glob("packs/*/*")) == []


def test_a_tensor_that_is_stored_there_is_not_relied_on_offline(host: Hosts, bucket: Path) -> None:
    """Whoever is online may remove it meanwhile."""
    a, b = host("a"), host("b")
    a.save("net", state(1))
    away(bucket)
    a.save("net", state(1), epoch=1)
    back(bucket)
    b.remove(["net:v1"])
    b.collect_garbage(grace=0)
    (copied,) = a.outbox.share()
    assert copied.target == "net:v2"
    assert value(b, "net:v2") == 1
    assert_whole(a, b)


def test_a_run_goes_on_while_the_registry_is_away(host: Hosts, bucket: Path) -> None:
    a, b = host("a"), host("b")
    net = torch.nn.Linear(2, 2)
    with a.run("net", monitor="accuracy", keep_last=2) as run:
        first = run.save(model=net, epoch=1, metrics={"accuracy": 0.5})
        away(bucket)
        for epoch in range(2, 6):
            net.weight.data.add_(1)
            kept = run.save(model=net, epoch=epoch, metrics={"accuracy": (epoch + 1) / 10})
        assert kept.name == "net:pending-4"
        assert [version.version for version in a.outbox.versions()] == [3, 4]  # keep_last
        assert kept.row.record["parent"] == first.name
        back(bucket)
        net.weight.data.add_(1)
        last = run.save(model=net, epoch=6, metrics={"accuracy": 0.4})
    assert [version.epoch for version in b.versions("net")][:2] == [6, 5]
    assert b["net@best"].epoch == 5
    assert last.row.record["parent"] == b["net@best"].name
    assert_whole(a, b)


def test_the_end_of_a_run_that_cannot_be_told_is_no_error(
    host: Hosts, bucket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    with a.run("net") as run:
        away(bucket)
        run.save(model=torch.nn.Linear(2, 2))
    assert "does not know that run net/run-1 finished" in caplog.text
    back(bucket)
    assert [one.target for one in a.outbox.share()] == ["net:v1"]


def test_best_moves_by_the_shared_registry_s_versions(host: Hosts, bucket: Path) -> None:
    a, b = host("a"), host("b")
    by = Monitor("loss", smallest=True)
    a.save("net", state(1), loss=0.5, best_by=by)
    away(bucket)
    a.save("net", state(2), loss=0.4, best_by=by)
    a.save("net", state(3), loss=0.6, best_by=by)
    back(bucket)
    b.save("net", state(4), loss=0.45, best_by=by)
    a.outbox.share()
    assert b["net@best"].loss == 0.4
    assert [version.loss for version in b.versions("net")] == [0.6, 0.4, 0.45, 0.5]


def test_where_a_computer_does_not_last_it_is_an_error(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    a.save("net", state(1))
    away(bucket)
    monkeypatch.setenv("REGISTRY_UNREACHABLE", "fail")
    with pytest.raises(StorageError, match="there is no registry in that folder; mount it"):
        a.save("net", state(2))
    assert not a.outbox
    assert not bucket.exists()
    monkeypatch.setenv("REGISTRY_UNREACHABLE", "maybe")
    with pytest.raises(Invalid, match="expected keep or fail"):
        a.save("net", state(2))


def test_versions_are_given_up(host: Hosts, bucket: Path) -> None:
    a = host("a")
    a.save("net", state(1))
    away(bucket)
    for i in (2, 3, 4):
        a.save("net", state(i))
    with pytest.raises(NotFound):
        a.outbox.drop(["net:pending-2", "net:pending-9"])
    with pytest.raises(NotFound, match="'net:v1' names no pending version; nothing is given up"):
        a.outbox.drop(["net:pending-2", "net:v1"])
    assert [version.name for version in a.outbox.drop(["net:pending-2"] * 2)] == ["net:pending-2"]
    back(bucket)
    assert [one.target for one in a.outbox.share()] == ["net:v2", "net:v3"]
    assert [value(a, f"net:v{i}") for i in (1, 2, 3)] == [1, 2, 4]


def test_two_processes_share_one_outbox_once(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    for i in range(1, 6):
        a.save("net", state(i))
    back(bucket)
    program = "import sys; from registry import Registry; Registry(sys.argv[1]).outbox.share()"
    started = [subprocess.Popen([sys.executable, "-c", program, bucket.as_uri()]) for _ in range(2)]
    assert [one.wait(60) for one in started] == [0, 0]
    assert [value(a, f"net:v{i}") for i in range(1, 7)] == [0, 1, 2, 3, 4, 5]
    assert len(a.versions("net")) == 6
    assert not a.outbox
    assert_whole(a, host("b"))


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_program_that_is_killed_while_it_shares_loses_and_doubles_nothing(
    host: Hosts, bucket: Path, at: int
) -> None:
    """At each of its durable steps, counted from the beginning."""
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    for i in (1, 2, 3):
        a.save("net", state(i))
    back(bucket)
    program = (
        "import itertools, os, signal, sys\n"
        "from registry import Registry\n"
        "from registry.store import durable\n"
        "count = itertools.count(1)\n"
        "sync = durable.Disk.sync\n"
        "def killed(*given):\n"
        "    if next(count) == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sync(*given)\n"
        "durable.Disk.sync = killed\n"
        "Registry(sys.argv[1]).outbox.share()\n"
    )
    words = [sys.executable, "-c", program, bucket.as_uri(), str(at * 3)]
    assert subprocess.run(words).returncode in (0, -signal.SIGKILL)
    Registry(bucket.as_uri()).outbox.share()
    assert [value(a, f"net:v{i}") for i in (1, 2, 3, 4)] == [0, 1, 2, 3]
    assert len(a.versions("net")) == 4
    assert_whole(a, host("b"))


def test_a_version_that_was_shared_and_removed_does_not_come_back(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = with_one_pending(host, bucket)
    back(bucket)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_let_go", lambda *_: None)
        a.outbox.share()
    a.remove(["net:v2"])
    a.collect_garbage(grace=0)
    assert a.outbox.share() == []
    assert [version.version for version in a.versions("net")] == [1]
    assert not a.outbox


def test_tags_and_notes_of_a_pending_version_are_shared_with_it(host: Hosts, bucket: Path) -> None:
    b, a = host("b"), with_one_pending(host, bucket)
    assert a.set_tag("net:pending-1", "paper").name == "net:pending-1"
    a.set_tag("net@latest", "wrong")
    assert a.add_note("net", "with the corrected labels").tags == ("paper", "wrong")
    assert a.remove_tag("net:pending-1", "wrong").tags == ("paper",)
    with pytest.raises(NotFound, match=r"has no tag 'papre'.*paper"):
        a.remove_tag("net:pending-1", "papre")
    with pytest.raises(NotFound, match=r"'net:pending-2' is pending"):
        a.set_tag("net:pending-2", "paper")
    back(bucket)
    assert [one.target for one in a.outbox.share()] == ["net:v2"]
    for registry in (a, b):
        assert registry["net:v2"].tags == ("paper",)
        assert [text for _, text in registry["net:v2"].notes] == ["with the corrected labels"]
        assert registry["net:v1"].tags == ()
    assert not a.outbox
    with pytest.raises(NotFound, match="if it was shared, it has a number now"):
        a.set_tag("net:pending-1", "late")
    assert_whole(a, b)


def test_what_is_tagged_while_it_is_shared_keeps_that(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, a = host("b"), with_one_pending(host, bucket)
    a.set_tag("net", "before")
    back(bucket)
    steps: list[Callable[[], object]] = [
        lambda: (a.set_tag("net:pending-1", "while"), a.remove_tag("net:pending-1", "before")),
        lambda: a.add_note("net:pending-1", "at the last moment"),
    ]
    tell = Outbox._tell

    def late(outbox: Outbox, *arguments: Any, **named: Any) -> None:
        tell(outbox, *arguments, **named)
        if steps:
            steps.pop(0)()

    monkeypatch.setattr(Outbox, "_tell", late)
    a.outbox.share()
    assert not steps
    assert not a.outbox
    assert b["net:v2"].tags == ("while",)
    assert [text for _, text in b["net:v2"].notes] == ["at the last moment"]
    assert_whole(a, b)


def test_what_is_tagged_after_a_program_was_killed_while_it_shared_keeps_that(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, a = host("b"), with_one_pending(host, bucket)
    a.add_note("net", "one")
    back(bucket)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_let_go", lambda *_: None)
        a.outbox.share()
    a.set_tag("net:pending-1", "paper")
    a.add_note("net:pending-1", "two")
    a.outbox.share()
    assert not a.outbox
    assert b["net:v2"].tags == ("paper",)
    assert [text for _, text in b["net:v2"].notes] == ["one", "two"]
    assert len(b.versions("net")) == 2


def test_what_another_process_shares_while_it_is_tagged_is_returned_with_its_number(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = with_one_pending(host, bucket)
    back(bucket)
    change = Outbox.change

    def early(outbox: Outbox, *arguments: Any) -> Any:
        found = change(outbox, *arguments)
        a.outbox.share()
        return found

    monkeypatch.setattr(Outbox, "change", early)
    tagged = a.set_tag("net:pending-1", "paper")
    assert (tagged.name, tagged.tags) == ("net:v2", ("paper",))


def test_a_tagged_pending_version_is_given_up(host: Hosts, bucket: Path) -> None:
    a = with_one_pending(host, bucket)
    before = a.outbox.versions()
    a.set_tag("net:pending-1", "paper")
    a.outbox._remove(before)
    assert not a.outbox


def test_best_may_move_in_the_outbox_while_it_is_shared(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = with_one_pending(host, bucket)
    kept = a.save("net", state(2))
    back(bucket)
    remove, catalog = Outbox._remove_unchanged, a.outbox.home.catalog

    def late(outbox: Outbox, version: Version) -> None:
        catalog.commit(lambda view: point(view, "net", "best", manifest_id=version.id))
        remove(outbox, version)

    monkeypatch.setattr(Outbox, "_remove_unchanged", late)
    assert [one.target for one in a.outbox.share()] == ["net:v2", "net:v3"]
    assert a["net:v3"].id == kept.id
    assert not a.outbox


def test_the_command_line_shares_and_tells(host: Hosts, bucket: Path) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    a.save("net", state(1))
    a.save("net", state(2))

    def run(*words: str) -> tuple[int, str, str]:
        program = [sys.executable, "-m", "registry.cli", "--root", bucket.as_uri(), *words]
        done = subprocess.run(program, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, err = run("list", "net", "--json")
    assert (status, '"pending' in out) == (0, False)
    assert re.search(r"2 versions wait to be shared; see registry --root \S+ outbox", err)
    assert "what is shown is as of " in err
    status, out, err = run("outbox")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (1, ["net:pending-1", "net:pending-2"])
    assert "there is no registry in that folder; mount it" in err
    assert json.loads(run("outbox", "--json")[1])["pending"] == ["net:pending-1", "net:pending-2"]
    assert run("outbox", "net:pending-1")[0] == 1
    assert run("outbox", "--drop", "net:pending-2")[1].splitlines()[0] == "net:pending-2 is given up"
    back(bucket)
    status, out, err = run("show", "net:v2")
    assert (status, err) == (0, "net:pending-1 is net:v2 now\n")
    assert run("outbox")[1] == "nothing waits to be shared\n"
    folder = a.root.parent / "folder"
    Registry(folder)
    done = subprocess.run(
        [sys.executable, "-m", "registry.cli", "--root", str(folder), "outbox"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "only a shared registry has an outbox" in done.stderr) == (1, True)


def test_an_outbox_with_a_damaged_note_still_shares(host: Hosts, bucket: Path) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    a.save("net", state(1), loss=0.1, best_by=Monitor("loss", smallest=True))
    (a.root / "outbox" / "monitors.json").write_text("[1")
    back(bucket)
    assert [one.target for one in a.outbox.share()] == ["net:v2"]
    shutil.rmtree(a.root / "outbox")
    assert not a.outbox
    assert os.listdir(a.root)


def test_an_outbox_whose_folder_was_deleted_is_made_anew_by_the_same_program(
    host: Hosts, bucket: Path
) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    a.save("net", state(1))
    a.outbox.drop()
    shutil.rmtree(a.root / "outbox")
    assert a.save("net", state(2)).name == "net:pending-1"
    back(bucket)
    assert [one.target for one in a.outbox.share()] == ["net:v2"]
    assert value(a, "net:v2") == 2


def test_equal_versions_that_were_thinned_offline_are_shared_thinned_compacted_and_collected(
    host: Hosts, bucket: Path
) -> None:
    a, b = host("a"), host("b")
    net = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 300)).sum().backward()
    optimizer.step()
    with a.run("net", keep_optimizer=1, keep_last=4) as run:
        run.save(model=net, optimizer=optimizer)
        away(bucket)
        for _ in range(5):
            run.save(model=net, optimizer=optimizer)
        assert ["thinned-from" in version.record for version in a.outbox.versions()] == [True] * 3 + [False]
        back(bucket)
        run.save(model=net, optimizer=optimizer)
    assert ["thinned-from" in version.record for version in a.versions("net")] == [False] + [True] * 3
    a.collect_garbage(grace=0)
    a.compact(["net"])
    b.collect_garbage(grace=0)
    for registry in (a, b):
        for version in registry.versions("net"):
            found = registry[version.name].load()["model"]
            assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    assert_whole(a, b)


def test_a_pending_version_is_shown_compared_and_its_files_are_listed(host: Hosts, bucket: Path) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    for i in (1, 2):
        a.save("net", state(i), epoch=i)
    assert a.resolve("net:pending-1").epoch == 1
    assert a.resolve("net@latest").name == a.resolve("net").name == "net:pending-2"
    assert "net:pending-2" in a
    assert "net:pending-3" not in a
    report = a.diff("net:pending-1", "net:pending-2", values=True)
    assert [change.name for change in report.changes] == ["w"]
    assert a.files("net:pending-2") == []
    with pytest.raises(Invalid, match=r"net:pending-1.* gets a number once it is shared: registry outbox"):
        a.remove("net:pending-1", dry_run=True)


def test_a_pending_version_is_named_by_its_id(host: Hosts, bucket: Path) -> None:
    a = with_one_pending(host, bucket)
    kept = a["net:pending-1"]
    assert a[kept.id].name == a[kept.id[:12]].name == "net:pending-1"
    assert kept.id in a
    assert a.set_tag(kept.id, "paper").tags == ("paper",)
    with pytest.raises(NotFound, match="there is no model 'abcdef'"):
        a["abcdef"]
    back(bucket)
    host("b").save(kept.id[:6], state(1))
    assert a[kept.id[:6]].model == kept.id[:6]  # a model of that name goes before the id
    assert a[kept.id[:7]].name == "net:pending-1"
    a.outbox.share()
    assert (a[kept.id].name, a[kept.id].tags) == ("net:v2", ("paper",))


def test_what_needs_a_number_takes_no_other_version_for_a_pending_one(
    host: Hosts, bucket: Path, tmp_path: Path
) -> None:
    a = with_one_pending(host, bucket)
    other = Registry(tmp_path / "other")
    (tmp_path / "note.txt").write_text("a note")
    back(bucket)
    for reference in ("net", "net@latest", "net:pending-1", a["net"].id):
        for change in (
            lambda name: a.set_alias(name, "production"),
            lambda name: a.remove(name, force=True),
            lambda name: a.remove([name], dry_run=True),
            lambda name: a.thin(name),
            lambda name: a.verify(name),
            lambda name: a.attach(name, tmp_path / "note.txt"),
            lambda name: a.copy_to(other, [name]),
        ):
            with pytest.raises(
                Invalid, match=r"net:pending-1 .* gets a number once it is shared: registry outbox"
            ):
                change(reference)
    assert other.versions() == []
    assert a.set_alias("net:v1", "production").name == "net:v1"
    a.outbox.share()
    assert a.set_alias("net", "production").name == "net:v2"


def test_what_a_shared_registry_never_takes_is_refused_offline_too(
    host: Hosts, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    with monkeypatch.context() as patch:
        patch.setattr(entries, "MAX_TEXT", 5_000)
        with pytest.raises(Unsupported, match="net: its plain values take more than"):
            a.save("net", {"extra": {"names": ["a name"] * 5_000}})
        a.save("net", state(1))
        back(bucket)
        assert [one.target for one in a.outbox.share()] == ["net:v2"]
    assert_whole(a, Registry(a.root / "outbox"))


def test_what_is_imported_offline_is_told_with_its_name(host: Hosts, bucket: Path, tmp_path: Path) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    torch.save(state(1)["model"], tmp_path / "net.pt")
    words = ["--root", bucket.as_uri(), "import", str(tmp_path / "net.pt"), "--name", "net", "--tag", "paper"]
    done = subprocess.run([sys.executable, "-m", "registry.cli", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "net:pending-1"), done.stderr
    assert a["net:pending-1"].tags == ("paper",)


def test_a_damaged_pending_version_holds_up_nothing(
    host: Hosts, bucket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    for i in (1, 2, 3):
        a.save("net", state(i))
    kept = Registry(a.root / "outbox")
    (digest,) = (one for path, _, _, one in kept["net:v2"].parameters() if path == "model/w")
    place = kept.catalog.locate([digest])[digest]
    path = kept.store.pack_path(place.pack)
    data = bytearray(path.read_bytes())
    data[place.start] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    back(bucket)
    assert a.save("net", state(4)).name == "net:v4"
    assert [value(a, f"net:v{i}") for i in range(1, 5)] == [0, 1, 3, 4]
    assert "net:pending-2 is damaged and cannot be shared" in caplog.text
    assert "registry outbox --drop net:pending-2" in caplog.text
    words = [sys.executable, "-m", "registry.cli", "--root", bucket.as_uri()]
    for command, status in (("list", 0), ("outbox", 1)):
        done = subprocess.run([*words, command], capture_output=True, text=True)
        assert (done.returncode, "net:pending-2 is damaged" in done.stderr) == (status, True), done.stderr
    a.outbox.drop(["net:pending-2"])
    assert not a.outbox
    assert_whole(a, host("b"))


def test_commands_that_read_go_on_where_the_store_refuses_what_is_pending(
    host: Hosts, bucket: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    a.save("net", state(0))
    away(bucket)
    a.save("net", state(1))
    back(bucket)

    def refuses(*_: object) -> None:
        raise Denied("these keys lack the right PutObject")

    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "put_file", refuses)
        assert a.outbox.share_if_possible() == []
        with pytest.raises(Denied):
            a.outbox.share()
    assert "lack the right PutObject; what waits to be shared stays on this computer" in caplog.text
    assert [one.target for one in a.outbox.share_if_possible()] == ["net:v2"]
