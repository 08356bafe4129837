"""Errors: what is wrong on one line, what to type on the next, and one JSON document whatever happens."""

from __future__ import annotations

import errno
import json
import pickle
import shlex
from pathlib import Path

import click
import pytest
import torch
from conftest import Run, commands
from terminal import on_a_terminal

from registry import Registry
from registry.cli.app import COMMANDS
from registry.cli.suggestions import _OTHER_WORDS
from registry.models.lenet import LeNet5
from registry.store.errors import (
    Conflict,
    Fix,
    Invalid,
    NotFound,
    RegistryError,
    StorageError,
    fix,
    naming,
    storage_errors,
)


def test_a_message_and_what_to_do_about_it_are_told_apart() -> None:
    error = NotFound("there is no model 'a; b'", "did you mean 'c'?", "", "registry ls lists them")
    assert error.message == "there is no model 'a; b'"
    assert error.for_command_line() == (error.message, "did you mean 'c'?; registry ls lists them")
    assert str(error) == "there is no model 'a; b'; did you mean 'c'?; registry ls lists them"
    assert RegistryError("it's broken; nothing is lost").for_command_line() == (
        "it's broken; nothing is lost",
        "",
    )
    assert (str(RegistryError()), RegistryError().for_command_line()) == ("", ("", ""))


def test_advice_has_words_for_python_and_for_the_command_line() -> None:
    error = Conflict("it is held", "take it off first", fix("or use", force=True), Fix("", "call it", ""))
    assert error.for_command_line() == ("it is held", "take it off first; or use: --force")
    assert str(error) == "it is held; take it off first; or use: force=True; call it"


def test_an_error_keeps_its_advice_when_it_is_named_and_pickled() -> None:
    error = Invalid("is empty", "write one", fix(force=True))
    with pytest.raises(Invalid) as caught, naming("lenet5:v3"):
        raise error
    for one in (caught.value, pickle.loads(pickle.dumps(caught.value)), error.about("lenet5:v3")):
        assert (type(one), one.message, one.fixes) == (Invalid, "lenet5:v3: is empty", error.fixes)


def test_what_the_system_refuses_says_what_to_do() -> None:
    with pytest.raises(StorageError) as caught, storage_errors("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.for_command_line() == ("x: no space left on the device", "free some and repeat")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("shw", "error: there is no command 'shw'\nhint:  did you mean registry show?\n"),
        ("hist", "error: there is no command 'hist'\nhint:  did you mean registry history?\n"),
        ("fsck", "error: there is no command 'fsck'\nhint:  registry verify does that\n"),
        ("scan-cache", "error: there is no command 'scan-cache'\nhint:  registry du does that\n"),
        ("zzz", "error: there is no command 'zzz'\nhint:  see registry --help\n"),
        ("cache lst", "error: there is no command 'lst'\nhint:  did you mean registry cache list?\n"),
        ("diff --frmat html a b", "error: no such option: --frmat\nhint:  did you mean --format"),
        ("ls --srt accuracy", "error: no such option: --srt\nhint:  did you mean --sort"),
        ("log lenet5/run-3 -f", "error: no such option: -f\nhint:  registry logs has it\n"),
        ("search x", "error: there is no command 'search'\nhint:  registry ls --match does that\n"),
        ("show", "error: missing argument 'REFERENCE'\nhint:  see registry show --help\n"),
        ("ls --limit -1", "error: invalid value for '--limit': -1 is not in the range x>=0\n"),
        ("show lenet9", "error: there is no model 'lenet9'\nhint:  did you mean 'lenet5'?\n"),
    ],
)
def test_a_command_line_that_means_nothing_gets_a_suggestion(
    filled: Registry, run: Run, line: str, told: str
) -> None:
    done = run(*shlex.split(line))
    assert done.status in (1, 2)
    assert done.out == ""
    assert done.err.startswith(told)
    assert len(done.err.splitlines()) == 2


def test_what_others_call_a_command_leads_to_one_of_ours() -> None:
    names = {name.removeprefix("registry ") for name, _ in commands()}
    assert {word for word, ours in _OTHER_WORDS.items() if ours.partition(" --")[0] not in names} == set()
    assert set(_OTHER_WORDS) & set(COMMANDS) == set()


def test_a_group_without_a_command_shows_its_help(run: Run) -> None:
    done = run("remote")
    assert done.status == 2
    assert "Usage: registry remote" in done.err


@pytest.mark.parametrize(
    ("line", "status", "kind", "message", "hint"),
    [
        ("show lenet5:v99", 1, "NotFound", "lenet5 has no version v99", "its newest are v4, v3, v2, v1"),
        ("show", 2, "Usage", "missing argument 'REFERENCE'", "see registry show --help"),
        (
            "rm lenet5:v2",
            1,
            "Conflict",
            "lenet5:v2 is held by alias production",
            "take that off first; or use",
        ),
        ("diff lenet5 lenet9", 2, "NotFound", "there is no model 'lenet9'", "did you mean 'lenet5'?"),
        ("--root nothing ls", 1, "NotFound", "there is no registry at nothing", "make one with: registry"),
        ("cache rm abcdef", 1, "NotFound", "there is no artifact 'abcdef'", "registry cache list shows"),
    ],
)
def test_an_error_under_json_is_one_document(
    filled: Registry, run: Run, line: str, status: int, kind: str, message: str, hint: str
) -> None:
    done = run(*shlex.split(line), "--json")
    assert done.status == status
    document = json.loads(done.out)
    assert set(document) == {"error"}
    assert (document["error"]["kind"], document["error"]["message"]) == (kind, message)
    assert document["error"]["hint"].startswith(hint)
    assert done.err.startswith(f"error: {message}\nhint:  ")


def test_a_document_with_errors_in_it_stays_the_only_one(filled: Registry, run: Run) -> None:
    Path("bad.pt").write_bytes(b"no checkpoint")
    document = json.loads(run("import", "bad.pt", "--name", "x", "--json").out)
    assert [one["file"] for one in document["failed"]] == ["bad.pt"]


def test_differences_are_listed_with_options_to_paste(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    monkeypatch.chdir(tmp_path)
    Registry().save("lenet5", {"model": LeNet5().state_dict()})
    done = run("plan", "lenet5", "lenet6")
    assert done.err.splitlines() == [
        "error: lenet5:v1 and lenet6 differ in 4 tensors that were not expected to",
        "  ~ fc.5.weight  10×84 → 64×84  other shape",
        "  ~ fc.5.bias    10 → 64        other shape",
        "  + fc.7.weight  10×64          only in lenet6",
        "  + fc.7.bias    10             only in lenet6",
        "hint:  if that is meant: --expect 'fc.5.*=skip' --expect 'fc.7.*=new'",
    ]
    advice = done.err.rpartition("meant: ")[2]
    assert run("plan", "lenet5", "lenet6", *shlex.split(advice)).status == 0
    differences = json.loads(run("plan", "lenet5", "lenet6", "--json").out)["error"]["differences"]
    assert differences[0] == {
        "sign": "~",
        "name": "fc.5.weight",
        "what": "10×84 → 64×84",
        "why": "other shape",
    }


def test_of_many_differences_some_are_shown(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    monkeypatch.chdir(tmp_path)
    shared = {"w": torch.zeros(2)}
    Registry().save("a", {"model": shared | {f"x{i}": torch.zeros(i + 1) for i in range(30)}})
    Registry().save("b", {"model": shared})
    lines = run("plan", "a", "b").err.splitlines()
    assert len(lines) == 23
    assert lines[-2] == "  and 10 more"
    assert lines[1].split() == ["-", "x0", "1", "only", "in", "a:v1"]


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_says_where_its_help_is(name: str, command: click.Command, run: Run) -> None:
    done = run(*name.split()[1:], "--no-such-option")
    assert done.status == 2
    assert done.err.startswith("error: no such option: --no-such-option\nhint:  ")


def test_the_first_four_digits_of_an_id_are_enough(filled: Registry, run: Run) -> None:
    version = filled["lenet5"]
    assert run("show", version.id[:4], "--json").json["name"] == version.name


def test_errors_follow_the_choice_of_colours(
    filled: Registry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(filled.root)
    assert "\x1b[31m" in on_a_terminal("--root", root, "ls", "nope").raw
    for words, environment in ((["--color", "never"], {}), ([], {"NO_COLOR": "1"})):
        shown = on_a_terminal("--root", root, "ls", "nope", *words, environment=environment)
        assert "error:" in shown.raw
        assert "\x1b[" not in shown.raw
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in run("ls", "nope").err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["ls", "--limit", "a; b"], "'a; b' is not a valid integer"),
        (["ls", "--columns", "x; y"], "x; y"),
        (["ls", "it's; x"], "it's; x"),
    ],
)
def test_a_semicolon_in_a_name_is_a_part_of_it(
    filled: Registry, run: Run, words: list[str], what: str
) -> None:
    first = run(*words).err.splitlines()[0]
    assert what in first


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["show", "lenet5", "--frmat", "x"], "see registry show --help"),
        (["ls", "--limt", "3"], "did you mean --limit?"),
        (["history", "lenet5", "--sort", "accuracy"], "see registry history --help"),
    ],
)
def test_an_option_is_suggested_only_if_it_is_like_the_typed_one(
    filled: Registry, run: Run, words: list[str], hint: str
) -> None:
    assert run(*words).err.splitlines()[-1] == f"hint:  {hint}"


def test_advice_names_the_root_that_counts(filled: Registry, run: Run, tmp_path: Path) -> None:
    gone = tmp_path / "none"
    done = run("--root", filled.root, "ls", "--root", gone)
    assert f"registry --root {gone} init" in done.err


def test_a_run_in_the_place_of_a_version_is_told(filled: Registry, run: Run) -> None:
    done = run("show", "lenet5/run-1")
    assert done.err.startswith("error: 'lenet5/run-1' is a run or a path")
    assert "registry log RUN" in done.err
