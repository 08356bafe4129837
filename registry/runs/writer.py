"""The TensorBoard writer of a run, which also appends scalars to a file that anything can read while training goes on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from registry.catalog.runs import INNER
from registry.catalog.scalars import SCALARS, Point, write_line
from registry.store.durable import extend
from registry.store.errors import RegistryError

_SECONDS = 1.0
"""How long a line waits for others, so that the file is written about once a second."""

_logger = logging.getLogger(__name__)


class RunWriter(SummaryWriter):
    """A `SummaryWriter` of torch on a run's folder, which appends scalars to `scalars.jsonl` as well.

    What `add_scalars` is given has the tag `MAIN_TAG/TAG` there. If the file cannot be written, a warning says so once,
    and training goes on: the events have everything.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SCALARS
        self._lines: list[bytes] = []
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._pid = os.getpid()
        self._has_failed = False
        super().__init__(str(folder))

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        new_style: bool = False,
        double_precision: bool = False,
    ) -> None:
        """As `SummaryWriter.add_scalar`."""
        super().add_scalar(tag, scalar_value, global_step, walltime, new_style, double_precision)
        self._add(tag, scalar_value, step=global_step, moment=walltime)

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """As `SummaryWriter.add_scalars`, which does not go through `add_scalar`."""
        super().add_scalars(main_tag, tag_scalar_dict, global_step, walltime)
        for tag, value in tag_scalar_dict.items():
            self._add(f"{main_tag}/{tag}", value, step=global_step, moment=walltime)

    def flush(self) -> None:
        """Write what waits, as `SummaryWriter.flush` does."""
        super().flush()
        self._write()

    def close(self) -> None:
        """Write what waits, and close the events, as `SummaryWriter.close` does."""
        super().close()
        self._write()

    def _add(self, tag: str, value: Any, *, step: int | None, moment: float | None) -> None:
        """Let a line wait to be written; what is no number, such as the name of a blob, has none."""
        # A process that was forked has no thread that writes, neither here nor in TensorBoard.
        if self._has_failed or os.getpid() != self._pid:
            return
        try:
            # A tensor or an array of one element has the number inside.
            value = value.item() if hasattr(value, "item") else value
            point = Point(int(step or 0), float(time.time() if moment is None else moment), float(value))
            if not math.isfinite(point.time):
                return
            line = write_line(point, str(tag))
        except (TypeError, ValueError, OverflowError):
            return
        with self._lock:
            self._lines.append(line)
            if self._timer is None:
                self._timer = threading.Timer(_SECONDS, self._write)
                self._timer.daemon = True
                # The interpreter starts no thread while it ends; `close` writes then.
                with contextlib.suppress(RuntimeError):
                    self._timer.start()

    def _write(self) -> None:
        """Append the lines that wait."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            lines, self._lines, self._timer = self._lines, [], None
            if not lines or self._has_failed:
                return
            try:
                extend(self._path, b"".join(lines), inner=INNER)
            except (OSError, RegistryError) as error:
                self._has_failed = True
                _logger.warning("%s is not written any more: %s", self._path.name, error)
