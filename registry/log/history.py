"""The history of a registry: the entries of its log in their order, each following from the one before.

The log exists twice, in the folder and as a copy in the catalog. What is damaged in one is read from the other; what is
damaged in both is a gap, which is named and never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from registry.log.entries import START, Entry
from registry.log.journal import SEGMENT, Journal, Line, Position


class Placed(NamedTuple):
    """An entry, and where it lies in the folder's log.

    Attributes:
        start, end: None if only the catalog's copy has the entry.
        in_copy: whether the catalog's copy has it.
    """

    entry: Entry
    start: Position | None
    end: Position | None
    in_copy: bool = False


class Gap(NamedTuple):
    """Entries that cannot be read.

    Attributes:
        first, last: their numbers. `last` is smaller than `first` if no entry is missing there, but the log holds
            something that is no entry.
        problem: why they cannot be read.
        before, after: times of the entries around them, as far as they are known.
        size: bytes of the lines there, if no entry comes behind them, so that it is not known how many there were.
    """

    first: int
    last: int
    problem: str
    before: str = ""
    after: str = ""
    size: int = 0

    def __str__(self) -> str:
        times = [f"{word} {time}" for word, time in (("after", self.before), ("before", self.after)) if time]
        when = f", written {' and '.join(times)}" if times else ""
        if self.last < self.first:
            return f"the log holds something that is not an entry before entry {self.first}: {self.problem}"
        numbers = f"entry {self.first}" if self.first == self.last else f"entries {self.first} to {self.last}"
        return f"{numbers} of the log cannot be read{when}: {self.problem}"


class End(NamedTuple):
    """Where the folder's log ends.

    Attributes:
        is_torn: whether a last line stands there that is no entry: a crash cut it short, before it was acknowledged.
    """

    position: Position
    is_torn: bool


class Fork(NamedTuple):
    """The folder's log and the catalog's copy differ from an entry on, and each follows from the entries before."""

    seq: int
    in_log: Entry
    in_copy: Entry

    def __str__(self) -> str:
        return (
            f"the folder's log and the catalog tell different histories from entry {self.seq} on: one was written "
            f"{self.in_log.at}, the other {self.in_copy.at}, as after a backup of one of them was restored"
        )


def walk(lines: Iterable[Line], seq: int = 0, digest: str = START) -> Iterator[Placed | Gap | End]:
    """The entries of the folder's log, in order, and where it ends.

    Args:
        seq, digest: of the entry before the first line.
    """
    expected, prev, before = seq + 1, digest, ""
    # Whether `prev` is the digest of the last entry; behind an entry that does not follow, it is not.
    known = True
    problem = ""
    end: End | None = None
    rest = _Rest()
    for line in lines:
        entry = line.entry
        end = End(line.end, False)
        if line.is_torn:
            end = End(rest.beginning(line), True)
            problem = "" if rest.is_one else problem
        elif entry is None:
            problem = problem or line.problem
            rest.add(line)
        elif entry.seq < expected:
            problem = problem or f"entry {entry.seq} stands there again"
            rest.add(line)
        elif entry.seq == expected and known and entry.prev != prev:
            yield Gap(
                expected,
                expected,
                "it does not follow from the entry before it",
                before=before,
                after=entry.at,
            )
            expected, known, before, problem = expected + 1, False, entry.at, ""
            rest = _Rest()
        else:
            if entry.seq > expected or problem:
                yield Gap(expected, entry.seq - 1, problem or "it is missing", before=before, after=entry.at)
            yield Placed(entry, line.start, line.end)
            expected, prev, before, known, problem = entry.seq + 1, entry.digest, entry.at, True, ""
            rest = _Rest()
    if problem:
        yield Gap(expected, expected + max(rest.count, 1) - 1, problem, before=before, size=rest.size)
    if end is not None:
        yield end


def merge(
    found: Iterable[Placed | Gap | End], copies: Iterable[Entry]
) -> Iterator[Placed | Gap | End | Fork]:
    """The entries that the folder's log or the catalog's copy has, in order; what neither has is a gap.

    Whatever the log holds between its entries that is no entry comes as a gap in which none is missing.
    """
    log, copy = _Log(found), _Copy(copies)
    expected, prev, before = 1, START, ""
    known = True
    # Bytes of the entries that only the copy has, for those that cannot be read at the log's end.
    filled = 0
    while True:
        next_in_log = log.peek()
        yield from log.odd()
        copy.skip_to(expected)
        next_in_copy = copy.peek()
        if next_in_log is None and next_in_copy is None:
            break
        both = (next_in_log.entry if next_in_log else None, next_in_copy)
        seq = min(one.seq for one in both if one is not None)
        in_log = log.take() if next_in_log is not None and next_in_log.entry.seq == seq else None
        in_copy = copy.take() if next_in_copy is not None and next_in_copy.seq == seq else None
        at = in_log.entry.at if in_log else in_copy.at if in_copy else ""
        if seq > expected:
            yield Gap(expected, seq - 1, log.problem(expected, seq - 1), before=before, after=at)
            known = False
        fits = [one for one in (in_log and in_log.entry, in_copy) if one and (not known or one.prev == prev)]
        if in_log and in_copy and in_log.entry.digest != in_copy.digest and len(fits) == 2:
            yield Fork(seq, in_log.entry, in_copy)
            return
        if in_log and in_log.entry in fits:
            yield in_log._replace(in_copy=in_copy is not None and in_copy.digest == in_log.entry.digest)
        elif in_copy and in_copy in fits:
            filled += len(in_copy.line) if log.tail and seq >= log.tail.first else 0
            yield Placed(in_copy, None, None, in_copy=True)
        else:
            yield Gap(
                seq,
                seq,
                log.problem(seq, seq, "it does not follow from the entry before it"),
                before=before,
                after=at,
            )
        known = bool(fits)
        if known:
            prev = fits[0].digest
        before, expected = at, seq + 1
    if log.tail and log.tail.size > filled:
        yield Gap(expected, max(expected, log.tail.last), log.tail.problem, before=before)
    if log.end:
        yield log.end


def heal(
    journal: Journal, history: Iterable[Placed | Gap | End | Fork], accepted: Sequence[range] = ()
) -> tuple[list[int], list[int]]:
    """Write anew the segments that lack entries which the catalog's copy has, or that hold anything but entries.

    A segment stays as it is if some of its entries are lost in both, and nobody has accepted that.

    Args:
        history: the whole history, from `merge`.
        accepted: numbers of entries that were accepted as lost.

    Returns:
        The segments that were written, and the numbers of the entries that they got back.
    """
    names = set(journal.segments()) | {1}
    written: list[int] = []
    healed: list[int] = []
    segment, size = 0, 0
    group: list[Placed] = []
    # Accepted losses between the entries of the group, and behind the last one.
    missing, behind = 0, 0

    def finish() -> None:
        # An entry of the segment is lost.
        if not group or len(group) + missing != group[-1].entry.seq - segment + 1:
            return
        lost = [item.entry.seq for item in group if item.start is None or item.start.segment != segment]
        if lost or journal.size(segment) != size:
            journal.rewrite(segment, [item.entry for item in group])
            written.append(segment)
            healed.extend(lost)

    for item in history:
        if isinstance(item, Gap) and item.last >= item.first:
            if any(item.first in numbers and item.last in numbers for numbers in accepted):
                if item.first in names:
                    finish()
                    segment, size, group, missing, behind = item.first, 0, [], 0, 0
                behind += item.last - item.first + 1
            elif item.first not in names:
                # The lost entries belong to this segment, perhaps to its end.
                group, missing, behind = [], 0, 0
        if not isinstance(item, Placed):
            continue
        if not segment or item.entry.seq in names or size >= SEGMENT:
            finish()
            segment, size, group, missing, behind = item.entry.seq, 0, [], 0, 0
        size += len(item.entry.line)
        group.append(item)
        missing, behind = missing + behind, 0
    finish()
    return written, healed


class _Rest:
    """The lines behind the last entry that are no entries.

    A crash may have left them all of one single line: where its bytes had not been written, a file system may show
    anything, line feeds too. But a line before the last that ends like an entry was an acknowledged one.

    Attributes:
        is_one: whether they may all be left of one line.
        size: their bytes, without those of a line that a crash cut short.
        count: how many of these lines were entries, at least.
    """

    def __init__(self) -> None:
        self.is_one = True
        self.size = 0
        self.count = 0
        self._start: Position | None = None

    def add(self, line: Line) -> None:
        self._start = self._start or line.start
        self.size += line.end.offset - line.start.offset
        self.count += line.entry is None and line.has_end
        is_entry = line.entry is not None or line.has_end
        self.is_one = self.is_one and not is_entry and line.start.segment == self._start.segment

    def beginning(self, last: Line) -> Position:
        """Where the line begins that a crash cut short; that is where `last` begins unless all are left of one line."""
        if self._start is None:
            return last.start
        self.is_one = self.is_one and last.start.segment == self._start.segment
        return self._start if self.is_one else last.start


class _Log:
    """Looks one entry ahead in the folder's log, and keeps what is wrong between entries."""

    def __init__(self, items: Iterable[Placed | Gap | End]) -> None:
        self._items = iter(items)
        self._next: Placed | None = None
        self._odd: list[Gap] = []
        self._problems: dict[int, str] = {}
        self.tail: Gap | None = None
        """What cannot be read behind the last entry."""
        self.end: End | None = None

    def peek(self) -> Placed | None:
        while self._next is None:
            item = next(self._items, None)
            if item is None:
                break
            if isinstance(item, Placed):
                self._next = item
            elif isinstance(item, End):
                self.end = item
            elif item.last < item.first:
                self._odd.append(item)
            else:
                self._problems[item.first] = item.problem
                self.tail = item if item.size else None
        return self._next

    def take(self) -> Placed | None:
        taken, self._next = self._next, None
        return taken

    def odd(self) -> list[Gap]:
        """The gaps so far in which no entry is missing, each once."""
        found, self._odd = self._odd, []
        return found

    def problem(self, first: int, last: int, otherwise: str = "it is missing") -> str:
        """Why one of some entries cannot be read."""
        found = [seq for seq in self._problems if first <= seq <= last]
        return self._problems[found[0]] if found else otherwise


class _Copy:
    """Looks one entry ahead in the catalog's copy."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = iter(entries)
        self._next = next(self._entries, None)

    def peek(self) -> Entry | None:
        return self._next

    def take(self) -> Entry | None:
        taken, self._next = self._next, next(self._entries, None)
        return taken

    def skip_to(self, seq: int) -> None:
        while self._next is not None and self._next.seq < seq:
            self.take()
