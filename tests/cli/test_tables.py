"""Tables: on terminals of every width nothing wraps, nothing is lost unsaid, and names stay apart."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Run
from hypothesis import example, given
from hypothesis import strategies as st
from terminal import on_a_terminal

from registry import Registry
from registry.cli.tables import Column, decimals_of, drawn, width_of

GOLDEN = Path(__file__).with_name("golden")
WIDTHS = (40, 60, 80, 120, 200)
COMMANDS = (
    "ls",
    "log",
    "log lenet5 --full",
    "ls lenet5",
    "history lenet5",
    "runs",
    "alias",
    "show lenet5:v2 --params",
    "show lenet5:v2 --tree",
)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with two runs of a model, a model of many metrics, and names that are long, wide or alike."""
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    monkeypatch.setenv("TZ", "UTC")
    registry = Registry(tmp_path / "r")
    for number in (1, 2):
        with registry.run("lenet5", monitor="accuracy") as run:
            network = torch.nn.Linear(4, 10)
            for epoch in range(1, 4):
                accuracy = 0.8 + epoch / 30 - number / 100
                run.save(
                    model=network,
                    epoch=epoch,
                    step=45 * epoch,
                    loss=1 / epoch,
                    metrics={"accuracy": accuracy},
                )
    registry.set_alias("lenet5:v3", "production")
    with registry.run("lenet5-finetuned", resume="lenet5:v3") as run:
        run.save(model=torch.nn.Linear(4, 10), epoch=4, metrics={"accuracy": 0.9})
    registry.set_tag("lenet5:v2", "paper-figure-3")
    metrics = dict.fromkeys(("f1", "recall", "precision", "auc", "val/loss", "accuracy"), 0.5)
    registry.save("detector-of-small-objects-a", {"model": {"w": torch.ones(2)}}, metrics=metrics)
    registry.save("detector-of-small-objects-b", {"model": {"w": torch.ones(3)}}, epoch=12, step=90_000)
    return registry


def steady(text: str) -> str:
    """A text with times and ids that do not change."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "2026-11-29 10:00", text)
    text = re.sub(r"\b\d s$", "0 s", text, flags=re.MULTILINE)
    return re.sub(r"\b(?=[a-f]*\d)[0-9a-f]{12}\b", "0123456789ab", text)


@pytest.mark.parametrize("columns", WIDTHS)
def test_tables_look_as_they_should_on_a_terminal(trained: Registry, columns: int) -> None:
    pages = []
    for command in COMMANDS:
        shown = on_a_terminal(*command.split(), columns=columns)
        assert shown.status == 0
        tables = shown.text[max(0, shown.text.find("COMPONENT")) :]
        assert max(map(width_of, tables.splitlines())) <= columns, tables
        pages.append(f"$ registry {command}\n{steady(tables)}")
    text, file = "\n".join(pages), GOLDEN / f"tables-{columns}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), (
        "if this is meant: UPDATE_GOLDEN=1 python -m pytest tests/cli/test_tables.py"
    )


def test_what_a_narrow_terminal_hides_is_named_and_can_be_shown(trained: Registry, run: Run) -> None:
    narrow = on_a_terminal("history", "lenet5", columns=80).text
    whole = run("history", "lenet5").out
    hidden = narrow.splitlines()[-1]
    assert hidden.startswith("hidden: ")
    assert hidden.endswith(" (--wide)")
    names = hidden.removeprefix("hidden: ").removesuffix(" (--wide)").upper().split(", ")
    assert {*narrow.splitlines()[0].split(), *names} == set(whole.splitlines()[0].split())
    assert "hidden" not in whole
    wide = on_a_terminal("history", "lenet5", "--wide", columns=80).text
    assert wide == whole


def test_columns_are_chosen_and_references_alone_are_printed(trained: Registry, run: Run) -> None:
    assert run("ls", "lenet5", "--columns", "Epoch,name", "--limit", "1").out.split() == (
        "EPOCH NAME 3 lenet5:v6 6 versions of 6; --limit 0 shows all".replace(
            "6 versions", "1 version"
        ).split()
    )
    assert run("ls", "lenet5", "-q").out.split() == [f"lenet5:v{n}" for n in range(6, 0, -1)]
    assert run("ls", "-q").out.split() == [
        "detector-of-small-objects-a",
        "detector-of-small-objects-b",
        "lenet5",
        "lenet5-finetuned",
    ]
    assert run("runs", "-q").out.split() == [
        "lenet5-finetuned/run-1",
        "lenet5/run-2",
        "lenet5/run-1",
    ]
    outcome = run("runs", "--columns", "age")
    assert outcome.status == 2
    assert (
        "there is no column 'age'\nhint:  the columns are run, state, versions, started, took" in outcome.err
    )


def test_what_is_sorted_by_or_monitored_comes_right_after_the_name(trained: Registry, run: Run) -> None:
    assert run("ls", "lenet5").out.split()[:2] == ["NAME", "ACCURACY"]
    assert run("history", "lenet5").out.split()[:2] == ["NAME", "ACCURACY"]
    assert run("ls", "--sort", "f1").out.split()[:2] == ["NAME", "F1"]


def test_a_model_that_is_trained_now_is_marked(trained: Registry, run: Run) -> None:
    with trained.run("lenet6"):
        trained.save("lenet6", {"model": {"w": torch.ones(1)}})
        lines = run("ls").out.splitlines()
    assert [line.split()[:2] for line in lines if "●" in line] == [["lenet6", "●"], ["●", "training"]]
    assert "●" not in run("ls").out


def test_where_there_is_nothing_standard_output_stays_empty(trained: Registry, run: Run) -> None:
    for arguments, told in (
        (("ls", "--tag", "nope"), "no version has the tag 'nope'\n"),
        (("ls", "lenet5", "--tag", "nope", "-q"), "no version of lenet5 has the tag 'nope'\n"),
        (("runs", "detector-of-small-objects-a"), "no runs of detector-of-small-objects-a yet; start one"),
        (("cache", "list"), "nothing is cached; put @cached"),
    ):
        outcome = run(*arguments)
        assert (outcome.status, outcome.out) == (0, "")
        assert outcome.err.startswith(told)


def test_colours_follow_the_option_and_the_environment(
    trained: Registry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" in on_a_terminal("ls").raw
    for environment, arguments in (
        ({"NO_COLOR": "1"}, ()),
        ({}, ("--color", "never")),
        ({"FORCE_COLOR": "1"}, ("--color=never",)),
    ):
        assert "\x1b" not in on_a_terminal("ls", *arguments, environment=environment).raw
    assert "\x1b" not in run("ls").out
    monkeypatch.setenv("FORCE_COLOR", "")  # the option sets it, and it is taken away again
    assert "\x1b" in run("--color", "always", "ls").out


def test_an_encoding_without_the_signs_gets_stand_ins(trained: Registry) -> None:
    text = on_a_terminal("ls", columns=40, environment={"PYTHONIOENCODING": "ascii"}).text
    assert text.isascii()
    assert "detecto..ects-a" in text
    assert "?" not in text


def test_more_than_a_screen_goes_through_the_pager(trained: Registry, tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\nsed 's/^/paged /'\n")
    pager.chmod(0o755)
    shown = on_a_terminal("ls", "lenet5", lines=6, environment={"PAGER": str(pager)}).text
    assert all(line.startswith("paged ") for line in shown.splitlines())
    assert "paged" not in on_a_terminal("ls", "lenet5", environment={"PAGER": str(pager)}).text


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=40)


ROWS = st.lists(st.tuples(NAMES, NAMES, st.integers(0, 10**9)), min_size=1, max_size=6)


def plain(lines: Sequence[str]) -> list[str]:
    """Lines without colours."""
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


@given(ROWS, st.integers(10, 90))
def test_no_line_is_longer_than_the_terminal(rows: list[tuple[str, str, int]], width: int) -> None:
    columns = [Column("NAME", is_text=True), Column("OF", 1, is_text=True), Column("COUNT", 2)]
    lines = plain(drawn(columns, [[name, of, str(count)] for name, of, count in rows], width))
    assert max(map(width_of, lines)) <= width


@given(st.lists(NAMES, min_size=1, max_size=6), st.integers(12, 30))
@example(["a" * 20 + x + "b" * 20 for x in "xyz"], 12)
def test_no_two_names_become_one(names: list[str], width: int) -> None:
    lines = plain(drawn([Column("NAME", is_text=True)], [[name] for name in names], width))[1:]
    assert max(map(width_of, lines)) <= width
    assert len(set(lines)) == len(set(names))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5))
def test_any_values_share_a_number_of_decimals_that_tells_them(values: list[float]) -> None:
    decimals = decimals_of(values)
    assert decimals is None or 0 <= decimals <= 6
    for value in values:
        if decimals is not None and value and abs(value) < 1e6:
            assert abs(float(f"{value:.{decimals}f}") - value) <= abs(value) / 100


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_wide_graph_leaves_room_for_the_names(tmp_path: Path, columns: int) -> None:
    registry = Registry(tmp_path / "r")
    base = registry.save("base", {"model": {}})
    edge = {"kind": "transferred-from", "parent": base.id}
    made = [registry.save(f"branch{i}", {"model": {}}, meta={"i": i}, lineage=[edge]) for i in range(30)]
    registry.save("all", {"model": {}}, lineage=[{"kind": "merged-from", "parent": one.id} for one in made])
    registry.catalog.close()
    shown = on_a_terminal("--root", str(registry.root), "log", "base", columns=columns)
    lines = shown.raw.replace("\x1b[36m", "").replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert max(map(len, lines)) <= columns
    assert {f"branch{i}:v1" for i in range(30)} | {"all:v1", "base:v1"} <= set(" ".join(lines).split())
