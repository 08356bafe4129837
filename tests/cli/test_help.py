"""The help: every command ends in an example that works, and the page made from it is up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Run, commands, examples, words_of

from registry import Registry
from registry.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[2]


ALL = dict(commands())


@pytest.mark.parametrize("path", ALL)
def test_the_help_ends_in_an_example_that_can_be_typed(path: str) -> None:
    found = examples(ALL[path])
    assert found
    for line in found:
        words = words_of(line)
        assert words[: len(path.split())] == path.split()
        words = words[1:]
        group: click.Command = app
        context = click.Context(app)
        while isinstance(group, click.Group):
            below = group.get_command(context, words.pop(0))
            assert below is not None
            group = below
        for parameter in group.params:
            parameter.type = click.STRING if isinstance(parameter.type, click.Path) else parameter.type
        group.make_context(path, words, parent=context)


@pytest.mark.parametrize("path", ALL)
def test_the_help_fits_a_terminal_and_says_what_every_option_does(path: str) -> None:
    command = ALL[path]
    text = command.get_help(click.Context(command, info_name=path, terminal_width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert not command.get_short_help_str(57).endswith("...")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, (path, parameter.name)


@pytest.mark.parametrize(
    "path", [path for path, command in ALL.items() if not isinstance(command, click.Group)]
)
def test_every_command_takes_json_and_debug(path: str) -> None:
    names = {parameter.name for parameter in ALL[path].params}
    assert {"debug", "root"} <= names
    assert "as_json" in names or path == "registry completion"


def test_the_list_of_commands_says_of_each_what_its_help_begins_with() -> None:
    context = click.Context(app)
    begins = {}
    for name in COMMANDS:
        command = app.get_command(context, name)
        assert command is not None
        begins[name] = command.get_short_help_str(200)
    assert {name: row.brief for name, row in COMMANDS.items()} == begins


def test_the_commands_stand_in_groups_and_none_is_cut() -> None:
    text = app.get_help(click.Context(app, info_name="registry", terminal_width=80))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "..." not in text.replace("COMMAND [ARGS]...", "")
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[1:10] == [
        "Save and load",
        "Train",
        "Look",
        "Compare and transfer",
        "Name",
        "Share",
        "Keep house",
        "See",
        "Set up",
    ]
    told = {line.split()[0] for line in lines if line.startswith("  ") and line[2:3].isalpha()}
    assert set(COMMANDS) <= told


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("list lenet5", "ls lenet5"),
        ("lineage lenet5", "log lenet5"),
        ("verify-frozen lenet5:v1 lenet5:v2", "verify --frozen lenet5:v1 lenet5:v2"),
        ("rm lenet5:v1 --dry-run", "rm lenet5:v1 -n"),
        ("gc --dry-run", "gc -n"),
        ("compact --dry-run", "compact -n"),
        ("alias --remove lenet5@none", "alias -d lenet5@none"),
        ("tag lenet5 none --remove", "tag lenet5 none -d"),
    ],
)
def test_old_words_do_the_same_as_the_new_ones(filled: Registry, run: Run, old: str, new: str) -> None:
    assert run(*old.split()) == run(*new.split())


def test_old_words_are_not_in_the_help() -> None:
    text = app.get_help(click.Context(app, info_name="registry"))
    told = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].isalpha()}
    assert told & {"list", "lineage", "verify-frozen"} == set()


def test_the_page_of_the_commands_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_cli_docs.py"), "--check"]
    subprocess.run(command, check=True)
