"""Checking: runs a training script three times, and says whether the resumed training is the same training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.catalog.versions import list_versions
from registry.home import Home, default_root
from registry.resuming.causes import CAUSES, Saved, cause_of, cause_of_no_repeat
from registry.resuming.scratch import COPIES, registries, scratch_root, trace_file
from registry.resuming.trace import KINDS, Observation, Trace, first_difference, first_steps, unseeded
from registry.store.errors import Conflict, Invalid, NotFound
from registry.store.text import printable

_WIDTH = 80
_SHOWN = 3
"""Names that are told of those that differ."""


@dataclass(frozen=True)
class Difference:
    """The first thing that differs.

    Attributes:
        step: it differs just before this step of an optimizer, from 1 on; behind the last one it is the end.
        rank: the process in which it differs.
        kind: what it is, such as `learning rates`; `steps` if one training has more of them than the other.
        names: which ones.
        cause: the usual cause.
        advice: what to do about it.
    """

    step: int
    rank: int
    kind: str
    names: tuple[str, ...]
    cause: str
    advice: str


@dataclass(frozen=True)
class ResumeCheck:
    """What a check has found.

    Attributes:
        script: the script.
        steps: optimizer steps of the training in one go.
        killed: the steps after which it was killed.
        resumed: the steps after which the resumed training went on.
        version: the newest version when it was killed, such as `net:v3`; None if it saves elsewhere.
        repeats: whether the script does the same twice; if not, nothing can be said of its resuming.
        first: for parameters, batches and so on the first step before which they differ; None if they never do.
        difference: the first thing that differs; None if all is equal.
    """

    script: str
    steps: int
    killed: int
    resumed: int
    version: str | None
    repeats: bool
    first: Mapping[str, int | None]
    difference: Difference | None

    @property
    def exact(self) -> bool:
        """Whether the resumed training is the same bit for bit."""
        return self.difference is None

    def assert_exact(self) -> None:
        """Fail if the resumed training is not the same, saying what differs.

        Raises:
            AssertionError: with the text of the report.
        """
        if not self.exact:
            raise AssertionError(str(self))

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"exact": self.exact, **asdict(self)}

    def __str__(self) -> str:
        where = f"resumed{f' from {self.version}' if self.version else ''} after step {self.resumed}"
        if not self.repeats:
            head = (
                f"{self.script} does not repeat itself: two runs of it differ, so resuming cannot be checked."
            )
        elif self.exact:
            head = f"{self.script} resumes exactly: killed after step {self.killed} of {self.steps}, {where}."
        else:
            head = f"{self.script} does not resume exactly: killed after step {self.killed} of {self.steps}, {where}."
        lines = [*textwrap.wrap(head, _WIDTH)]
        width = max(map(len, self.first), default=0)
        for name, step in self.first.items():
            lines.append(f"  {name:{width}}  {'equal' if step is None else self._when(step)}")
        if self.difference is not None:
            lines += self._told(self.difference)
        return "\n".join(lines)

    def _when(self, step: int) -> str:
        return "differ at the end" if step > self.steps else f"differ from step {step} on"

    def _told(self, found: Difference) -> list[str]:
        names = ", ".join(found.names[:_SHOWN])
        more = f" and {len(found.names) - _SHOWN} more" if len(found.names) > _SHOWN else ""
        when = "the end" if found.step > self.steps else f"step {found.step}"
        rank = f" in process {found.rank}" if found.rank else ""
        parts = [
            f"First difference: {found.kind} at {when}{rank}{f': {names}{more}' if names else ''}",
            f"Usual cause: {found.cause}",
            found.advice,
        ]
        return [
            line
            for part in parts
            for line in textwrap.wrap(printable(part), _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        ]


def check_resume(
    script: str | os.PathLike[str],
    *arguments: str,
    at: int | None = None,
    resume_with: Sequence[str] = (),
    processes: int = 1,
    root: str | os.PathLike[str] | None = None,
    copy: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> ResumeCheck:
    """Run a training script in one go, then killed by SIGKILL and resumed in a new process, and compare them.

        check_resume("train.py", "--epochs", "3", at=17).assert_exact()

    What is compared is one trajectory: after the kill, the resumed training must go on as the one in one go did, with the
    same batches, parameters, buffers, gradients, optimizer states, learning rates and random numbers before each step
    of an optimizer. Registries that the script opens are replaced by scratch ones.

    Args:
        script: the script. It resumes by itself where its registry has a version, or with `resume_with`.
        arguments: its arguments.
        at: the number of optimizer steps after which it is killed; two thirds of the training by default.
        resume_with: further arguments for the process that resumes, such as `["--resume"]`.
        processes: how many processes train together, under torchrun.
        root: the user's registry, as for `Registry`.
        copy: begin with a copy of the user's registry, for a script that starts from a version in it. Otherwise the
            registry is empty.
        tell: called with a line about each run before it begins.

    Raises:
        NotFound: if there is no such script.
        Invalid: if it fails, makes no step, ends before the kill, saves nothing before it, or does not resume.
        Conflict: if it keeps checkpoints outside the registry, where an earlier run finds them again.
    """
    if not Path(script).is_file():
        raise NotFound(f"there is no script {script}")
    with tempfile.TemporaryDirectory(prefix="check-resume-") as folder:
        runs = _Runs(
            Path(folder).resolve(), Path(script), arguments, processes=processes, root=root, copy=copy
        )
        return _checked(runs, at, resume_with, tell)


class _Runs:
    """Starts a script, each time with a folder of its own for its registries and its traces."""

    def __init__(
        self,
        folder: Path,
        script: Path,
        arguments: Sequence[str],
        *,
        processes: int,
        root: str | os.PathLike[str] | None,
        copy: bool,
    ) -> None:
        self.name = script.name
        self._folder = folder
        self._script = script
        self._arguments = arguments
        self._processes = processes
        self._root = Path(default_root() if root is None else root)
        self._copy = copy

    def run(self, place: str, *more: str, kill: int = 0, is_resumed: bool = False) -> list[Trace]:
        """Run it, and read what each process did.

        Args:
            place: the name of the folder.
            more: further arguments.
            kill: the steps after which it is to be killed; 0 for never.
            is_resumed: whether another process has been there before; for the error.

        Raises:
            Invalid: if it fails.
        """
        folder = self._folder / place
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "REGISTRY_ROOT": str(scratch_root(folder, self._root, copies=self._copy)),
            COPIES: "1" if self._copy else "",
        }
        launcher = [sys.executable]
        if self._processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._processes}"]
            environment.setdefault("OMP_NUM_THREADS", "1")
        words = [*launcher, "-m", "registry.resuming.traced", str(folder), str(kill), str(self._script)]
        log = folder / "output.txt"
        with log.open("wb") as output:
            done = subprocess.run(
                [*words, *self._arguments, *more],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        traces = [Trace.read(trace_file(folder, rank)) for rank in range(self._processes)]
        was_killed = bool(kill) and any(trace.end is None and len(trace.steps) == kill for trace in traces)
        if done.returncode and not was_killed:
            raise Invalid(
                f"{self.name} failed {'when it was resumed ' * is_resumed}{_failure(done.returncode, log)}"
            )
        return traces

    def saved(self, place: str) -> Saved | None:
        """The newest version in the registries of a folder."""
        versions = [
            version
            for root in registries(self._folder / place)
            for version in list_versions(Home(root, create=False).catalog, None)[0]
            if version.record.get("run")
        ]
        if not versions:
            return None
        newest = max(versions, key=lambda version: (version.created, version.version))
        kinds = newest.record.get("provenance", {}).get("kinds", {})
        return Saved(newest.name, {**dict.fromkeys(newest.record["components"], ""), **kinds})


def _checked(
    runs: _Runs, at: int | None, resume_with: Sequence[str], tell: Callable[[str], None]
) -> ResumeCheck:
    tell(f"running {runs.name} in one go")
    straight = runs.run("straight")
    steps = len(straight[0].steps)
    if not steps:
        raise Invalid(f"{runs.name} made no step of an optimizer of torch, so there is nothing to compare")
    at = max(1, steps * 2 // 3) if at is None else at
    if not 0 < at < steps:
        raise Invalid(
            f"{runs.name} ended before step {at + 1}: it makes {steps} steps",
            f"kill it after one from 1 to {steps - 1}",
        )
    tell(f"running it again, to be killed after step {at} of {steps}")
    killed = runs.run("killed", kill=at)
    _check_began_anew(runs.name, straight[0], killed[0].steps)
    again = first_difference(straight, killed, until=at)
    # A generator may have no seed and no effect.
    idle = unseeded(straight, killed) if again is not None else frozenset()
    straight, killed = ([trace.without(idle) for trace in traces] for traces in (straight, killed))
    if again is not None and first_difference(straight, killed, until=at) is not None:
        return _not_repeated(runs.name, steps, at, again)
    saved = runs.saved("killed")
    tell(f"resuming it{f' from {saved.name}' if saved else ''}")
    # More steps than these are a difference; there might be no end of them.
    resumed = runs.run("killed", *resume_with, kill=steps + 1, is_resumed=True)
    resumed = [trace.without(idle) for trace in resumed]
    after = _resumed_after(runs.name, straight[0], resumed[0], at, saved)
    found = first_difference(straight, resumed, after=after)
    if found is not None and found[0] > at and found[1]:
        tell("it differs; running it in one go once more, to see whether it repeats itself")
        again = first_difference(straight, [trace.without(idle) for trace in runs.run("again")])
        if again is not None and again[0] <= found[0]:
            return _not_repeated(runs.name, steps, at, again)
    firsts = first_steps(straight, resumed, after)
    return ResumeCheck(
        script=runs.name,
        steps=steps,
        killed=at,
        resumed=after,
        version=saved.name if saved else None,
        repeats=True,
        first={KINDS[kind]: step for kind, step in firsts.items()},
        difference=_difference(found, straight, resumed, after, saved) if found else None,
    )


def _check_began_anew(script: str, straight: Trace, killed: Sequence[Observation]) -> None:
    """See that the second run did not resume what the first one has saved elsewhere.

    Raises:
        Conflict: if it did.
    """
    steps = len(straight.steps)
    if not killed or (steps > 1 and straight.resumed_at(killed[0], steps - 1) not in (0, None)):
        raise Conflict(
            f"{script} went on where its first run had ended: it keeps checkpoints outside the registry",
            "save them with registry.run, or beside the folder that REGISTRY_ROOT names",
        )


def _resumed_after(script: str, straight: Trace, resumed: Trace, at: int, saved: Saved | None) -> int:
    """After how many steps the resumed training went on.

    Raises:
        Invalid: if it began anew, or did nothing.
    """
    if not resumed.steps:
        raise Invalid(
            f"{script} made no step when it was resumed, though {len(straight.steps) - at} were left"
        )
    after = straight.resumed_at(resumed.steps[0], at)
    if after:
        return after
    if saved is None:
        raise Invalid(
            f"{script} saved nothing before step {at}, so there is nothing to resume",
            "save earlier, or kill it later (--at)",
        )
    model = saved.name.partition(":")[0]
    live = ", ".join(f"{name}={name}" for name in saved.components if name.isidentifier() and name != "rng")
    began = "began anew" if after == 0 else "began with other parameters than those of any step before"
    raise Invalid(
        f"{script} does not resume: {saved.name} was there, and the new process {began}",
        f'add: before = "{model}" if '
        f'"{model}" in registry else None | with registry.run("{model}", resume=before) as run: | '
        f"if before: run.resumed.restore({live})",
    )


Found = tuple[int, dict[int, dict[str, list[str]]]]


def _difference(
    found: Found, straight: Sequence[Trace], resumed: Sequence[Trace], after: int, saved: Saved | None
) -> Difference:
    step, differs = found
    rank = min(differs, default=0)
    cause = cause_of(step, differs, straight[rank], resumed[rank], after=after)
    name, advice = cause.name, cause.advice
    if cause.component and saved is not None:
        if saved.has(cause):
            name = name.replace("not saved", "not restored")
            advice += f" {saved.name} has one; see that it is restored, and last."
        else:
            advice += f" {saved.name} has {', '.join(one for one in saved.components if '/' not in one)}."
    kind, names = next(iter(differs[rank].items())) if differs else ("steps", [])
    if cause is CAUSES["rank"]:
        rank = min(one for one in differs if "random" in differs[one])
        kind, names = "random", differs[rank]["random"]
    return Difference(step, rank, KINDS.get(kind, kind), tuple(names), name, advice)


def _not_repeated(script: str, steps: int, at: int, found: Found) -> ResumeCheck:
    step, differs = found
    rank = min(differs, default=0)
    cause = cause_of_no_repeat(step, differs)
    kind, names = next(iter(differs[rank].items())) if differs else ("steps", [])
    return ResumeCheck(
        script=script,
        steps=steps,
        killed=at,
        resumed=0,
        version=None,
        repeats=False,
        first={},
        difference=Difference(step, rank, KINDS.get(kind, kind), tuple(names), cause.name, cause.advice),
    )


def _failure(status: int, log: Path) -> str:
    """How a process ended, and the last line of its output."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"{how}: {printable(lines[-1][:200]) if lines else 'it printed nothing'}"
