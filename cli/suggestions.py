"""What to say of a command line that cannot be understood: what was meant, perhaps, and where to read more."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click

_OTHER_WORDS = {
    "add": "import",
    "browse": "ui",
    "clone": "pull",
    "commit": "import",
    "cp": "export",
    "dashboard": "ui",
    "delete": "rm",
    "delete-cache": "prune",
    "df": "du",
    "download": "pull",
    "evaluate": "eval",
    "exp": "runs",
    "experiments": "runs",
    "fetch": "pull",
    "fsck": "verify",
    "info": "show",
    "inspect": "show",
    "load": "export",
    "open": "ui",
    "remove": "rm",
    "repack": "compact",
    "save": "import",
    "scan-cache": "du",
    "search": "ls --match",
    "serve": "ui",
    "tensorboard": "board",
    "test": "eval",
    "upload": "push",
    "watch": "follow",
    "web": "ui",
}
"""Commands of git, dvc, hf, docker and others, and ours for the same."""


_OTHER_OPTIONS = {("log", "-f"): "registry logs", ("log", "--follow"): "registry logs"}
"""Options that a command does not have, and what to type for the same."""


class WrongUse(click.UsageError):
    """A command line that contradicts itself, or names what is not there.

    Args:
        hint: what to type instead.
    """

    def __init__(self, message: str, hint: str = "", context: click.Context | None = None) -> None:
        super().__init__(message, context)
        self.hint = hint


def usage_error(error: click.ClickException) -> tuple[str, str]:
    """A usage error as what is wrong, and what to do."""
    context = getattr(error, "ctx", None)
    help_of = f"see {context.command_path} --help" if context else ""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.NoSuchOption):
        other = _OTHER_OPTIONS.get((context.info_name or "", error.option_name)) if context else None
        if other:
            return f"no such option: {error.option_name}", f"{other} has it"
        names = _options(context) if context else []
        near = _nearest(error.option_name, names)
        return f"no such option: {error.option_name}", _meant(near) or help_of
    return " ".join(message.split()), (error.hint if isinstance(error, WrongUse) else "") or help_of


def _nearest(option: str, names: Sequence[str]) -> list[str]:
    """The option that was meant, perhaps. Dashes make nothing alike."""
    by_word = {name.lstrip("-"): name for name in names}
    found = difflib.get_close_matches(option.lstrip("-"), by_word, 1, cutoff=0.7)
    return [by_word[word] for word in found]


def no_such_command(word: str, names: Sequence[str], context: click.Context) -> WrongUse:
    """The error about a word that is no command of a group.

    Args:
        names: the commands of the group.
    """
    what = f"there is no command {word!r}"
    other = _OTHER_WORDS.get(word, "") if context.parent is None else ""
    if other.partition(" ")[0] in names:
        return WrongUse(what, f"{context.command_path} {other} does that", context)
    near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 3)
    return WrongUse(what, _meant([f"{context.command_path} {name}" for name in near[:3]]), context)


def _options(context: click.Context) -> list[str]:
    """The options of a command."""
    params = context.command.get_params(context)
    return [
        word
        for param in params
        if isinstance(param, click.Option) and not param.hidden
        for word in [*param.opts, *param.secondary_opts]
    ]


def _meant(names: Sequence[str]) -> str:
    return f"did you mean {' or '.join(names)}?" if names else ""
