"""The command group and its global options. Errors become one line and an exit status here."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

import registry
from registry.cli.options import Group, color, example_text
from registry.cli.output import INTERRUPTED, Told, begin, complain, complain_of, name_commands
from registry.cli.suggestions import usage_error
from registry.store.errors import RegistryError


class Row(NamedTuple):
    """Where a command is, and what it may load.

    Attributes:
        module: the module of `registry.cli` that defines the command.
        function: the name of the command's function. It is the command's name with `_` for `-`. A name that Python
            uses itself, such as `import`, gets a `_` at its end.
        brief: the first sentence of the command's help. It stands here so that the list of all commands loads none.
        is_light: whether the command, or each command of a group, reads only metadata. Such a command loads no torch,
            numpy or pydantic. tests/cli/test_startup.py checks this with the examples of its help.
    """

    module: str
    function: str
    brief: str = ""
    is_light: bool = False

    @property
    def name(self) -> str:
        """The command as it is typed."""
        return self.function.rstrip("_").replace("_", "-")


_GROUPS = {
    "Save and load": (
        Row("files", "init", "Make a new registry.", is_light=True),
        Row("files", "import_", "Store files, folders or torchvision networks as versions."),
        Row("files", "export", "Write a version to a file, or to a folder."),
        Row("files", "checkout", "Write the folder that training goes on from."),
        Row("attached", "files", "List the files of a version, or write one of them.", is_light=True),
        Row("attached", "attach", "Attach files that were made from a version to it."),
    ),
    "Train": (
        Row("training", "train", "Train a network and record every epoch."),
        Row("training", "eval_", "Measure a version on held-out data."),
        Row("training", "predict", "Classify images."),
        Row("resuming", "check_resume", "Check that a training script resumes bit for bit."),
        Row("runs", "runs", "List training sessions, the newest first.", is_light=True),
        Row("runs", "logs", "Show the log file of a run.", is_light=True),
    ),
    "Look": (
        Row("reading", "ls", "List the models, or a model's versions.", is_light=True),
        Row("showing", "show", "Show a version: metrics, provenance, tensors.", is_light=True),
        Row("history", "log", "Draw what came from what: versions, runs, models.", is_light=True),
        Row("history", "history", "Show how a model came to be, version by version.", is_light=True),
        Row("history", "best", "Find the best version of a model.", is_light=True),
        Row("reading", "status", "Show storage use and what sharing saves.", is_light=True),
        Row("usage", "du", "Say who holds the bytes on the disk.", is_light=True),
    ),
    "Compare and transfer": (
        Row("diffs", "diff", "Compare two models' tensors by name, shape and value."),
        Row("diffs", "compare", "Compare a metric of models, runs or versions by epoch.", is_light=True),
        Row("transfers", "plan", "Plan which tensors of SOURCE go where in TARGET."),
        Row("transfers", "apply", "Make a new version by a plan that was written to a file."),
        Row("transfers", "transfer", "Make a new version with tensors of another, by a plan."),
        Row("transfers", "advise", "Say whether to fine-tune or freeze, by a rule of thumb."),
    ),
    "Name": (
        Row("naming", "alias", "Point an alias at a version.", is_light=True),
        Row("naming", "tag", "Attach tags to a version.", is_light=True),
        Row("naming", "note", "Attach a note to a version.", is_light=True),
        Row("naming", "rm", "Remove versions, all of them or none.", is_light=True),
    ),
    "Share": (
        Row("sharing", "push", "Copy versions to another registry."),
        Row("sharing", "pull", "Copy versions from another registry."),
        Row("sharing", "copy", "Copy versions from any registry to any other."),
        Row("sharing", "follow", "Wait for each version that a reference comes to name."),
        Row("sharing", "outbox", "Share what was saved while a bucket was away."),
        Row("remotes", "remote", "Name places of registries, for --to and --from.", is_light=True),
    ),
    "Keep house": (
        Row("upkeep", "verify", "Compare every stored byte with its digest.", is_light=True),
        Row("usage", "prune", "Free what can be had without losing anything."),
        Row("upkeep", "gc", "Free the space of what no version needs.", is_light=True),
        Row("upkeep", "compact", "Store older versions as differences, bit for bit."),
        Row("upkeep", "repair", "Put back what is damaged or missing from a second copy."),
        Row("upkeep", "rebuild", "Make the catalog anew from the log.", is_light=True),
        Row("doctor", "doctor", "Check versions, log, locks and space in a moment.", is_light=True),
        Row("caches", "cache", "Show and clear cached datasets.", is_light=True),
    ),
    "See": (
        Row("ui", "ui", "Open the registry in the browser, until Ctrl-C."),
        Row("cards", "card", "Write a model card from what was recorded.", is_light=True),
        Row("runs", "board", "Show runs in TensorBoard, until Ctrl-C."),
    ),
    "Set up": (
        Row("configs", "config", "Show, check and compare configurations.", is_light=True),
        Row("shell", "completion", "Print a script for completion in your shell.", is_light=True),
    ),
}
"""The commands by what they are for."""

COMMANDS = {row.name: row for rows in _GROUPS.values() for row in rows}
"""The row of each command, in the order in which users need them. Help, completion and docs/cli.md follow this table."""

_OLD = {row.name: row for row in (Row("upkeep", "verify_frozen", is_light=True),)}
"""Commands that others have taken the place of. They still work, and the help does not show them."""

_SYNONYMS = {"list": "ls", "lineage": "log"}
"""Other words for commands, which the help does not show."""

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


name_commands([*COMMANDS, *_OLD, *_SYNONYMS])


class App(Group):
    """The group that prints a `RegistryError` in one line. It loads only the command that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None if there is none."""
        row = (COMMANDS | _OLD).get(_SYNONYMS.get(cmd_name, cmd_name))
        if row is None:
            return None
        command: click.Command = getattr(import_module(f"registry.cli.{row.module}"), row.function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by group."""
        longest = max(map(len, COMMANDS))
        for heading, rows in _GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(row.name.ljust(longest), row.brief) for row in rows])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands, or the options, that begin with the typed text."""
        rows = [row for row in COMMANDS.values() if row.name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(row.name, help=row.brief) for row in rows), *options]

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line, and end the process with its exit status."""
        kwargs["standalone_mode"] = False
        sys.exit(_guarded(lambda: super(App, self).main(*args, **kwargs)))


def _guarded(run: Callable[[], Any]) -> int:
    """Run the command line and return its exit status.

    The status is 0 for success, 1 for a failure, 2 for wrong usage and 130 for an interruption.
    """
    begin()
    try:
        is_closed = sys.stdout is None
        if is_closed:
            sys.stdout = io.StringIO()
        result = run()
        if is_closed:
            complain("Closed", "done, but standard output is closed, so nothing was shown")
            return 1
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        complain("Usage", *usage_error(error))
        return error.exit_code
    except Told:
        return 130
    except (click.Abort, KeyboardInterrupt):
        complain(INTERRUPTED, "interrupted; nothing is half done")
        return 130
    except BrokenPipeError:
        _give_up_output()
        return 1
    except Exception as error:
        if _debug():
            raise
        if isinstance(error, RegistryError):
            complain_of(error)
        elif isinstance(error, OSError) and error.filename is None and error.errno in _NOT_WRITTEN:
            _give_up_output()
            complain("StorageError", f"cannot write to standard output: {error.strerror}")
        else:
            kind, text = type(error).__name__, str(error).partition("\n")[0]
            complain(kind, f"unexpected {kind}: {text}", "--debug shows where")
        return 1


def _give_up_output() -> None:
    """Send the rest of the output to the null device, so that the interpreter does not fail on it as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _debug() -> bool:
    return "--debug" in sys.argv[1:]


@click.group(
    cls=App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example_text(
        "registry init\nregistry import model.pt --name lenet5 --metric accuracy=0.91\nregistry ls"
    ),
)
@click.version_option(registry.__version__, "-V", "--version", prog_name="torch-registry")
@click.option("--root", metavar="DIR", help="The registry's folder. [default: $REGISTRY_ROOT or .registry]")
@color
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def app(ctx: click.Context, root: str | None, debug: bool) -> None:
    """Keep PyTorch checkpoints. Each tensor is stored once, durably, without pickle.

    A reference names a version: lenet5 (the latest), lenet5:v3, lenet5@best (an alias), or the first
    digits of an id.
    """
    ctx.obj = root
