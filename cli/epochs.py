"""What a training shows: a table that grows by a line an epoch, and on a terminal a live line below it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from registry.cli.output import encodable, width_of_terminal, with_root
from registry.cli.tables import Column, Growing
from registry.live import ranks
from registry.models.training import Epoch, Training, TrainingState, Watcher
from registry.reports.words import measured
from registry.store.errors import RegistryError
from registry.store.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from registry import Run

_logger = logging.getLogger(__name__)

_COLUMNS = (
    Column("EPOCH"),
    Column("LOSS", 1),
    Column("ACCURACY", 4),
    Column("TEST LOSS", 3),
    Column("TEST ACCURACY", 2),
    Column("TIME", 5),
    Column("SAVED AS", 0, is_text=True),
)
_WIDEST = ("9.9999", "0.999", "9.9999", "0.9999", "59.9 s", "v999 best")
"""The widest cells behind the first that are expected; a wider one moves what comes behind it."""


_ROOM_FOR_RATE = 72
"""Columns of a terminal from which on the live line has room for how fast a training is."""


class EpochTable(Watcher):
    """Prints a training.

    The line of an epoch appears when its version is stored, so that it names the version. It says `best` where the alias
    `best` of the model came to point at that version. A run in which no epoch is as good as a version before it has none.

    Args:
        is_quiet: print nothing.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._place = "before the first batch"
        self._step = 0
        self._run: Run | None = None
        self._waiting: Epoch | None = None
        self._table: Growing | None = None
        self._epochs = 0
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._first: tuple[int, int] | None = None

    def begins(self, training: Training, run: Run) -> None:
        """Say what is trained on what, and print the headings."""
        self._run = run
        data, parameters = training.data, sum(one.numel() for one in training.plain.parameters())
        where = ", ".join(map(str, training.devices))
        together = f"{ranks.count()} × " if ranks.count() > 1 else ""
        self._epochs = training.config.epochs
        self._print(
            f"{run.name}   {data.name}: {len(data.train):,} to train, {len(data.test):,} to test   "  # type: ignore[arg-type]
            f"{parameters:,} parameters   {together}{where}"
        )
        width = width_of_terminal()
        self._table = Growing(_COLUMNS, (f"{self._epochs}/{self._epochs}", *_WIDEST), width)
        self._print(self._table.heading)

    def steps(self, training: Training, state: TrainingState, run: Run) -> None:
        """Move the live line on."""
        self._tell_saved(run)
        position, batches = training.loader.position, len(training.loader)
        number = state.epoch + 1
        after = f"after epoch {number}"
        self._place = after if position == batches else f"in epoch {number}, batch {position} of {batches}"
        self._step = state.step
        if self._live is None:
            return
        if self._first is None or self._first[0] != state.epoch:
            # Images of this epoch that an earlier process saw took no time here.
            self._first = (state.epoch, state.seen)
            self._restart(number, position, batches)
        assert self._task is not None
        seconds, seen = self._live.tasks[0].elapsed or 0.0, state.seen - self._first[1]
        has_room = shutil.get_terminal_size().columns >= _ROOM_FOR_RATE
        rate = f"{seen * ranks.count() / seconds:,.0f} images/s" if has_room and seen and seconds else ""
        self._live.update(
            self._task,
            completed=position,
            count=f"{position}/{batches}",
            loss=f"loss {state.mean_loss:.3f}",
            rate=rate,
        )

    def finishes(self, epoch: Epoch, run: Run) -> None:
        """Keep an epoch's line until its version is stored."""
        self._tell_saved(run)
        self._waiting = epoch

    def ends(self, run: Run) -> None:
        """Print what waits: all versions are stored."""
        run.wait()
        self._tell_saved(run)

    def leaves(self) -> None:
        """Print what waits where the training ends early: its version may have been stored in the meantime."""
        if self._run is not None:
            self._tell_saved(self._run)

    def interrupted(self) -> tuple[str, str]:
        """What to say of an interruption, and how to go on."""
        saved = self._run.saved if self._run else None
        if saved is None:
            return f"interrupted {self._place}; nothing was saved", ""
        as_what = (
            f"saved as {saved.name}" if saved.step == self._step else f"{saved.name} is the last version"
        )
        if (saved.epoch or 0) >= self._epochs:
            # Nothing is left to go on with.
            more = f"registry train --resume {saved.name} --set epochs={2 * self._epochs}"
            return f"interrupted {self._place}, which was the last; {as_what}", f"for more epochs: {more}"
        return f"interrupted {self._place}; {as_what}", f"go on with: registry train --resume {saved.name}"

    @contextlib.contextmanager
    def alive(self, loading: str) -> Iterator[None]:
        """Show a live line, where standard output is a terminal.

        Args:
            loading: what it says before the first batch.
        """
        if not sys.stdout.isatty():
            yield
            return
        # Lazy: loads rich.
        from rich.console import Console, ConsoleDimensions
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        class Narrower(Console):
            """Leaves room for the `^C` that a terminal prints, which would push the live line into a second row."""

            @property
            def size(self) -> ConsoleDimensions:
                width, height = super().size
                return ConsoleDimensions(max(10, width - 3), height)

            @size.setter
            def size(self, given: tuple[int, int]) -> None:
                self._width, self._height = given

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Narrower(), transient=True) as self._live:
            self._task = self._live.add_task(loading, total=None, count="", loss="", rate="")
            try:
                yield
            finally:
                self._live.stop()
                self._live = None

    def _restart(self, number: int, position: int, batches: int) -> None:
        """Begin the live line of an epoch."""
        assert self._live is not None
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(
            f"{number}/{self._epochs}", total=batches, completed=position, count="", loss="", rate=""
        )

    def _tell_saved(self, run: Run) -> None:
        """Print the line that waits, if its version is stored."""
        epoch, saved = self._waiting, run.saved
        if epoch is None or saved is None or (saved.epoch or 0) < epoch.number:
            return
        self._waiting = None
        # The save behind this epoch's may be done, too.
        is_its_own = saved.epoch == epoch.number and "accuracy" in saved.metrics
        name = saved.name if is_its_own else str(saved.row.record.get("parent"))
        cells = (
            f"{epoch.number}/{self._epochs}",
            measured(epoch.loss),
            f"{epoch.accuracy:.3f}",
            measured(epoch.test_loss),
            f"{epoch.test_accuracy:.4f}",
            _time(epoch.seconds),
            name.partition(":")[2] + (" best" if _is_best(run, name) else ""),
        )
        assert self._table is not None
        self._print(self._table.row(cells))

    def _print(self, line: str) -> None:
        if self._is_quiet:
            return
        if self._live is None:
            try:
                click.echo(encodable(line))
            except OSError as error:
                # Nobody reads on, as behind `| head`, or the disk is full. The training does not end for that.
                self._is_quiet = True
                _logger.warning("standard output takes nothing any more: %s", error.strerror)
        else:
            # Lazy: loads rich.
            from rich.text import Text

            self._live.console.print(Text.from_ansi(encodable(line)), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a message above the live line."""
        self._print(with_root(printable(text)))


def _is_best(run: Run, name: str) -> bool:
    """Whether the alias `best` came to point at a version when it was saved, as no version of the model before is better."""
    # Lazy: start-up.
    from registry.catalog.versions import Condition, rank_versions

    number = name.rpartition(":v")[2]
    if not number.isdigit():
        # It waits to be shared, and aliases point at what is shared.
        return False
    with contextlib.suppress(RegistryError):
        until = Condition("v.version <= ?", [int(number)])
        found, _ = rank_versions(run.registry.catalog, run.model, "accuracy", also=until, limit=1)
        return [one.name for one in found] == [name]
    return False


def _time(seconds: float) -> str:
    """A duration, such as `1.9 s`, `2:05 min`, `1:02 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours}:{left:02} h" if hours else f"{minutes}:{rest:02} min"
