"""The writer of a run: scalars in a file of lines beside the events, and the events of runs without that file."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from registry import Registry
from registry.catalog.runs import INNER
from registry.catalog.scalars import SCALARS, read_scalars
from registry.runs import writer as writing
from registry.runs.events import read_events
from registry.runs.run import Run


def points(run: Run) -> dict[str, list[tuple[int, float]]]:
    found, _ = read_scalars(run.folder / SCALARS, inner=INNER)
    return {tag: [(point.step, point.value) for point in part] for tag, part in found.items()}


def test_a_run_writes_scalars_beside_its_events(registry: Registry) -> None:
    with registry.run("net") as run:
        for step in range(3):
            run.writer.add_scalar("Training/Loss", 1 / (step + 1), step)
        run.writer.add_scalar("kinds", torch.tensor([0.5]), torch.tensor(1))
        run.writer.add_scalar("kinds", np.float32(0.25), np.int64(2), walltime=5.25)
        run.writer.add_scalar("kinds", np.array([0.125]), 3)
        run.writer.add_scalar("odd", math.nan)
        run.writer.add_scalars("both", {"a": 1.0, "b": 2.0}, 7)
    found = points(run)
    assert found.pop("Training/Loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert found.pop("kinds") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert repr(found.pop("odd")) == "[(0, nan)]"
    assert found == {"both/a": [(7, 1.0)], "both/b": [(7, 2.0)]}
    assert read_scalars(run.folder / SCALARS)[0]["kinds"][1].time == 5.25
    events = read_events(run.folder)
    assert [(point.step, round(point.value, 6)) for point in events["Training/Loss"]] == [
        (0, 1.0),
        (1, 0.5),
        (2, 0.333333),
    ]
    assert set(events) == {"Training/Loss", "kinds", "odd"}


def test_a_writer_is_one_of_torch_and_takes_what_that_takes(registry: Registry) -> None:
    with registry.run("net") as run:
        assert isinstance(run.writer, SummaryWriter)
        run.writer.add_scalar("x", 1.0, 1, new_style=True, double_precision=True)
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            run.writer.add_scalar("x", torch.ones(2), 2)
    assert points(run) == {"x": [(1, 1.0)]}


def test_lines_are_written_while_the_run_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    extend = writing.extend

    def extended(*arguments: object, **named: object) -> None:
        extend(*arguments, **named)  # type: ignore[arg-type]
        written.set()

    monkeypatch.setattr(writing, "extend", extended)
    monkeypatch.setattr(writing, "_SECONDS", 0.01)
    with registry.run("net") as run:
        run.writer.add_scalar("x", 1.0, 1)
        assert written.wait(60)
        assert points(run) == {"x": [(1, 1.0)]}
        monkeypatch.setattr(writing, "_SECONDS", 1e6)
        run.writer.add_scalar("x", 2.0, 2)
        assert len(points(run)["x"]) == 1
        run.writer.flush()
        assert len(points(run)["x"]) == 2


def test_a_closed_writer_goes_on_at_the_end_of_the_file_and_a_torn_line_stays_alone(
    registry: Registry,
) -> None:
    with registry.run("net") as run:
        run.writer.add_scalar("x", 1.0, 1)
        run.writer.close()
        with (run.folder / SCALARS).open("ab") as file:
            file.write(b'{"s": 2, "t": 17')
        run.writer.add_scalar("x", 3.0, 3)
    assert points(run) == {"x": [(1, 1.0), (3, 3.0)]}


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_file_that_cannot_be_written_costs_one_warning_and_no_training(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with registry.run("net") as run, caplog.at_level(logging.WARNING):
        path = run.folder / SCALARS
        run.writer.add_scalar("x", 0.0, 0)
        run.writer.flush()
        path.unlink()
        if kind == "link":
            path.symlink_to(victim)
        else:
            path.mkdir()
        for step in range(3):
            run.writer.add_scalar("x", 1.0, step)
            run._writer._write()  # type: ignore[union-attr]
    assert len([one for one in caplog.records if "is not written any more" in one.getMessage()]) == 1
    assert victim.read_text() == "mine"
    assert registry.runs[run.name].state == "finished"


def test_threads_write_whole_lines(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SECONDS", 0.001)
    with registry.run("net") as run:
        writer = run.writer

        def add(thread: int) -> None:
            for step in range(200):
                writer.add_scalar(f"thread-{thread}", float(step), step)

        threads = [threading.Thread(target=add, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    text = (run.folder / SCALARS).read_text().splitlines()
    assert len(text) == 800
    assert all(json.loads(line) for line in text)
    assert all([step for step, _ in part] == list(range(200)) for part in points(run).values())


FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")
from registry import Registry
with Registry(sys.argv[1]).run("net") as run:
    run.writer.add_scalar("x", 1.0, 1)
    if not os.fork():
        run._writer.add_scalar("x", 9.0, 9)
        run._writer._write()
        os._exit(0)
    os.wait()
"""


def test_a_forked_process_writes_no_line_twice(registry: Registry) -> None:
    subprocess.run([sys.executable, "-c", FORKED, str(registry.root)], check=True, timeout=120)
    (text,) = (registry.root / "runs/net/run-1" / SCALARS).read_text().splitlines()
    assert json.loads(text)["v"] == 1.0


def test_a_registry_stays_whole_with_the_file(registry: Registry, tmp_path: Path) -> None:
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(2, 2))
        run.writer.add_scalar("x", 1.0, 1)
    registry.collect_garbage(grace=0)
    assert registry.verify().problems == ()
    registry.rebuild()
    registry.copy_to(Registry(tmp_path / "other"))
    assert points(run) == {"x": [(1, 1.0)]}


def test_a_run_shows_its_curves(registry: Registry) -> None:
    with registry.run("net") as run:
        for step in range(50):
            run.writer.add_scalar("Loss<b>", 1 / (step + 1), step)
    shown = registry.runs[run.name]._repr_mimebundle_()["text/html"]
    assert "Loss&lt;b&gt;" in shown
    assert "█" in shown
    assert ">0.02<" in shown


def test_hostile_files_of_events_are_left_out(registry: Registry, tmp_path: Path) -> None:
    with registry.run("net") as run:
        run.writer.add_scalar("x", 1.0, 1)
    (good,) = run.folder.glob("events*")
    data = good.read_bytes()
    for i, odd in enumerate(
        (b"", b"\xff" * 100, data[: len(data) - 3], data[:20] + b"\xff" * 30, b"\0" * 1000)
    ):
        (run.folder / f"odd.{i}.tfevents").write_bytes(odd)
    os.mkfifo(run.folder / "pipe.tfevents")
    (run.folder / "folder.tfevents").mkdir()
    (tmp_path / "outside.tfevents").write_bytes(data)
    (run.folder / "link.tfevents").symlink_to(tmp_path / "outside.tfevents")
    found = read_events(run.folder)
    assert [(point.step, point.value) for point in found["x"]] == [(1, 1.0)]
    assert read_events(run.folder / "none") == {}
