"""The disk: what du, prune and status say of it, and what prune frees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Run
from terminal import on_a_terminal

from registry import Registry


@pytest.fixture
def large(filled: Registry) -> Registry:
    """The registry with versions that can be compacted, garbage, and a cached result that no run used."""
    value = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    for i in range(4):
        filled.save("net", {"model": {"w": value + i * 1e-6}})
    filled.save("gone", {"model": {"w": torch.randn(50_000)}})
    filled.remove("gone:v1")
    filled.cached(lambda: [torch.ones(1_000)], version="1")()
    return filled


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def packs(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("packs/*/*"))


def test_du_says_what_models_hold(large: Registry, run: Run) -> None:
    lines = words(run("du").out)
    assert lines[0] == "MODEL VERSIONS OWN FREES AS FILES UNHELD MAY GO"
    assert [line.split()[0] for line in lines[1:4]] == ["net", "lenet5", "resnet"]
    assert re.fullmatch(r"net 4 1\.62 MB 1\.62 MB 1\.6 MB 3 1\.21 MB", lines[1])
    assert re.fullmatch(r"\S+ MB on disk, \S+ MB as separate files", lines[4])
    assert lines[5].endswith("of cached results; see registry cache list")
    assert lines[6] == "204 kB unneeded; free it with: registry gc"
    document = run("du", "--json").json
    assert set(document) == {"stored", "logical", "saved", "cached", "unneeded", "models"}
    assert document["stored"] == packs(large.root)
    assert document["models"][0]["name"] == "net"
    assert run("du", "-q", "--limit", "1").out == "net\n"


def test_du_says_what_holds_each_version(large: Registry, run: Run) -> None:
    lines = words(run("du", "lenet5").out)
    assert lines[0] == "NAME OWN FREES AS FILE HELD BY"
    assert lines[1:] == [
        "lenet5:v1 4.33 kB 0 B 200 B -",
        "lenet5:v4 4.26 kB 4.26 kB 200 B the latest",
        "lenet5:v3 4.26 kB 4.26 kB 200 B tag paper",
        "lenet5:v2 4.26 kB 4.26 kB 200 B alias production",
    ]
    document = run("du", "lenet5", "--json").json
    assert set(document) == {"model", "versions"}
    assert document["versions"][3]["held_by"] == ["alias production"]
    assert run("du", "lenet5", "--limit", 1).out.endswith("1 of 4 rows; --limit 0 shows all\n")
    assert "did you mean 'lenet5'" in run("du", "lenet").err


def test_prune_shows_what_could_be_freed_and_changes_nothing(large: Registry, run: Run) -> None:
    before = packs(large.root)
    done = run("prune", "-n")
    assert done.status == 0
    lines = words(done.out)
    assert lines[0].startswith("gc 0 B: 0 packs")
    assert lines[1].startswith("204 kB more within 60 min")
    assert lines[2].startswith("compact 1.22 MB may become smaller: 5 versions of 2 models")
    assert re.fullmatch(r"cache \S+ kB: 1 result that no run used; registry cache clear --unused", lines[3])
    assert re.fullmatch(r"versions \S+ MB: 4 versions that nothing holds; registry ls --unheld", lines[4])
    document = run("prune", "-n", "--json").json
    assert set(document) == {"dry_run", "gc", "compact", "cache", "unheld"}
    assert document["dry_run"] is True
    assert packs(large.root) == before


def test_prune_frees_and_keeps_every_version(large: Registry, run: Run) -> None:
    names = run("ls", "--tag", "paper", "-q").out + run("ls", "net", "-q").out
    values = {name: large[name].state_dict()["w"].clone() for name in ("net:v1", "net:v3")}
    refused = run("prune")
    assert refused.err == "error: nothing was freed\nhint:  add --yes to free it without a question\n"
    assert run("prune", "--json").json["error"]["kind"] == "Conflict"
    done = run("prune", "--yes")
    assert done.status == 0
    assert re.search(r"^compacted: \S+ MB less", done.out, re.MULTILINE)
    assert run("ls", "--tag", "paper", "-q").out + run("ls", "net", "-q").out == names
    assert all(torch.equal(large[name].state_dict()["w"], value) for name, value in values.items())
    assert len(large.artifacts.find()) == 1
    assert run("prune", "--json", "--yes").json["dry_run"] is False


def test_prune_on_a_terminal_asks(large: Registry) -> None:
    shown = on_a_terminal("prune", typed="n\n")
    assert shown.status == 1
    assert "Compact and collect?" in shown.text
    assert "nothing was freed" in shown.text


@pytest.mark.damages
def test_prune_says_which_model_cannot_be_compacted(large: Registry, run: Run) -> None:
    (tensor,) = large["net:v2"].parameters()
    place = large.catalog.locate([tensor[3]])[tensor[3]]
    path = large.store.pack_path(place.pack)
    data = bytearray(path.read_bytes())
    data[place.start] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    done = run("prune", "--yes")
    assert done.status == 1
    assert "error: net: " in done.err


def test_status_names_runs_that_go_on_and_runs_that_are_lost(filled: Registry, run: Run) -> None:
    assert run("status", "--json").json["runs"] == {"running": [], "lost": []}
    with filled.run("net") as session:
        session.save(model=torch.nn.Linear(1, 1))
        text = run("status").out
        assert re.search(r"^running +net/run-1, started \d+ s ago; registry logs net/run-1 -f$", text, re.M)
        # The number of a process that there cannot be.
        process = filled.root / "runs" / "net" / "run-1" / "process"
        machine = process.read_text().split()[0]
        process.write_text(f"{machine} {2**22 + 1}\n")
        text = run("status").out
        assert "running" not in text
        assert re.search(
            r"^lost +net/run-1, its process is gone; go on from net:v1, or see registry logs net/run-1$",
            text,
            re.M,
        )
        assert run("status", "--json").json["runs"] == {"running": [], "lost": ["net/run-1"]}


def test_of_many_lost_runs_some_are_named(filled: Registry, run: Run) -> None:
    for _ in range(5):
        name = filled.runs.begin("net", None, {})
        folder = filled.root / "runs" / name
        folder.mkdir(parents=True)
        with filled.run("other"):
            machine = (filled.root / "runs" / "other").glob("*/process")
            (folder / "process").write_text(next(machine).read_text().split()[0] + f" {2**22 + 1}\n")
    text = run("status").out
    assert text.count("it saved nothing; see registry logs net/run-") == 3
    assert "and 2 more; see registry runs" in text
