"""The cache from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run

from registry import Registry, cached


@cached
def prepare(file_path: str, size: int = 3) -> torch.Tensor:
    return torch.full((1000,), float(size))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    Registry()
    (tmp_path / "in.txt").write_text("x")
    return tmp_path


def test_list_show_rm_and_clear(run: Run, root: Path) -> None:
    assert (
        run("cache", "list").err
        == "nothing is cached; put @cached from registry above a function that prepares data\n"
    )
    prepare(str(root / "in.txt"))
    with Registry().run("net") as session:
        session.save(model=torch.nn.Linear(1, 1))
    prepare(str(root / "in.txt"), 4)
    head, *rows = run("cache", "list").out.splitlines()
    assert head.split() == ["KEY", "FUNCTION", "SIZE", "CREATED", "USED", "BY", "RUNS"]
    assert ["net/run-1" in row for row in rows] == [False, True]
    for row in rows:
        assert row.split()[1].endswith("prepare")
        assert "  4 kB  " in row
        assert "s ago" in row
    key = prepare.key(str(root / "in.txt"))
    shown = run("cache", "show", key[:12]).out
    for part in ("parameter.size  3", f"{root / 'in.txt'}", "1 tensor, 4 kB", "net/run-1"):
        assert part in shown
    one = run("cache", "show", key[:12], "--json").json
    assert one["record"]["parameters"] == {"size": 3}
    assert one["id"][:12] in run("show", "net").out
    assert "prepare" in run("show", "net").out
    done = run("cache", "clear", "--unused", "--older-than", "0s")
    assert done.out.endswith(
        "1 artifact removed; registry gc frees the space in an hour, or at once with --grace 0\n"
    )
    assert run("cache", "clear", "--older-than", "30d").out.startswith("0 artifacts")
    assert run("cache", "rm", key[:8]).out.startswith(key[:12])
    assert run("cache", "list", "--json").json == []
    assert "2 packs" in run("gc", "--grace", "0").out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("cache show abc", "there is no artifact 'abc'\nhint:  registry cache list shows what there is"),
        ("cache rm x:y", "'x:y' is not a key"),
        ("cache clear --older-than soon", "--older-than"),
    ],
)
def test_what_is_not_there(run: Run, words: str, told: str) -> None:
    done = run(*words.split())
    assert done.status in (1, 2)
    assert told in done.err
