"""Work on all cores: threads over jobs that release the interpreter lock, as hashing and reading do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")

Run = Callable[[Sequence[Any], Callable[[Any], None]], None]
"""Calls a function for each of some jobs, on as many threads as it likes."""

SMALL = 1 << 20
"""Bytes below which starting threads costs more than they save."""

_THREADS = min(os.cpu_count() or 1, 16)


def in_parallel(
    jobs: Sequence[Job],
    work: Callable[[Job], None],
    sizes: Sequence[int],
    stop: threading.Event | None = None,
) -> None:
    """As `in_order`, the largest jobs first.

    Args:
        sizes: bytes of each job.
        stop: ends it early, with jobs left undone.
    """
    places = sorted(range(len(jobs)), key=sizes.__getitem__, reverse=True)
    in_order((jobs[i] for i in places), work, size=sum(sizes), stop=stop)


def in_order(
    jobs: Iterator[Job],
    work: Callable[[Job], None],
    size: int,
    stop: threading.Event | None = None,
    threads: int = _THREADS,
) -> None:
    """Run work over jobs on all cores, as they come; the first error wins and stops the rest.

    Args:
        size: bytes of all jobs together.
        stop: ends it early, with jobs left undone.
        threads: how many work at once, where the jobs are large enough; more than cores where they wait for the disk.
    """
    lock = threading.Lock()
    stop = stop or threading.Event()
    end = object()

    def worker() -> None:
        while not stop.is_set():
            try:
                with lock:
                    job: Any = next(jobs, end)
                if job is end:
                    return
                work(job)
            except BaseException:
                stop.set()
                raise

    if size < SMALL or threads == 1:
        worker()
        return
    with ThreadPoolExecutor(threads - 1, "registry-load") as pool:
        others = [pool.submit(worker) for _ in range(threads - 1)]
        worker()
        for future in others:
            future.result()


def portions(jobs: Iterable[Job], size_of: Callable[[Job], int], size: int) -> Iterator[list[Job]]:
    """Jobs in lists that reach a size each, as handing over single ones may cost more than doing them.

    >>> list(portions([3, 3, 1, 9, 2], lambda job: job, 6))
    [[3, 3], [1, 9], [2]]
    """
    found: list[Job] = []
    done = 0
    for job in jobs:
        found.append(job)
        done += size_of(job)
        if done >= size:
            yield found
            found, done = [], 0
    if found:
        yield found
