"""The log file that all modules share."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from registry import setup_logging
from registry.store.errors import Invalid, StorageError

LINE = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] - (\w+): \[([\w.]+)\]\[(\d+)\] (.*)"


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_every_module_lands_in_the_file_of_the_day(tmp_path: Path) -> None:
    path = setup_logging("monitor", directory=tmp_path / "new" / "logs")
    logging.getLogger("a.b").info("one %d", 1)
    logging.getLogger("c").warning("two")
    logging.getLogger("c").debug("hidden")
    assert path.name == f"monitor_{datetime.now():%Y-%m-%d}.txt"
    found = [re.fullmatch(LINE, line) for line in path.read_text().splitlines()]
    assert [(m[1], m[2], m[4]) for m in found if m] == [
        ("INFO", Path(__file__).name, "one 1"),
        ("WARNING", Path(__file__).name, "two"),
    ]


def test_calling_it_twice_does_not_double_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        path = setup_logging(directory=tmp_path)
    logging.getLogger("x").info("once")
    assert path.read_text().count("once") == 1
    assert capfd.readouterr().err.count("once") == 1


def test_another_call_moves_to_another_file(tmp_path: Path) -> None:
    first = setup_logging("a", directory=tmp_path)
    second = setup_logging("b", directory=tmp_path)
    logging.getLogger("x").info("here")
    assert "here" not in first.read_text()
    assert "here" in second.read_text()


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    for word in ("first", "second"):
        path = setup_logging(directory=tmp_path)
        logging.getLogger("x").info(word)
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["first", "second"]


def test_the_console_is_left_alone_on_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(directory=tmp_path, file_only=True)
    logging.getLogger("x").error("quiet")
    assert capfd.readouterr() == ("", "")


def test_handlers_of_others_stay(tmp_path: Path, root_logger: logging.Logger) -> None:
    other = logging.NullHandler()
    root_logger.addHandler(other)
    setup_logging(directory=tmp_path)
    setup_logging(directory=tmp_path)
    assert other in root_logger.handlers


def test_a_new_day_begins_a_new_file(tmp_path: Path) -> None:
    path = setup_logging(directory=tmp_path)
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "tomorrow", None, None)
    record.created = datetime(2031, 2, 3, 12).timestamp()
    logging.getLogger().handle(record)
    assert "tomorrow" in (tmp_path / "monitor_2031-02-03.txt").read_text()
    assert "tomorrow" not in path.read_text()
    logging.getLogger("x").info("today")
    assert "today" in path.read_text()


def test_losing_the_folder_does_not_stop_the_program(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup_logging(directory=tmp_path / "logs", file_only=True)
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "tomorrow", None, None)
    record.created = datetime(2031, 2, 3, 12).timestamp()
    shutil.rmtree(tmp_path / "logs")
    logging.getLogger().handle(record)
    assert "tomorrow" in (tmp_path / "logs" / "monitor_2031-02-03.txt").read_text()

    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("in the way")
    record.created = datetime(2031, 2, 4, 12).timestamp()
    logging.getLogger().handle(record)
    assert "--- Logging error ---" in capfd.readouterr().err


def test_a_message_cannot_forge_a_record(tmp_path: Path) -> None:
    path = setup_logging(directory=tmp_path)
    logging.getLogger("x").info("a\n[2026-01-01 00:00:00] - ERROR: [x.py][1] forged\rb\x1b[1A\x1b[2K\u2028")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed")
    text = path.read_text()
    lines = text.splitlines()
    assert sum(bool(re.fullmatch(LINE, line)) for line in lines) == 2
    assert text.replace("\n", "").isprintable()
    assert any("ValueError: broken" in line for line in lines)


@pytest.mark.parametrize(("level", "seen"), [("debug", 4), ("INFO", 3), ("WARNING", 2), (logging.ERROR, 1)])
def test_the_level_decides_what_is_written(tmp_path: Path, level: str | int, seen: int) -> None:
    path = setup_logging(level=level, directory=tmp_path, file_only=True)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger("x").log(number, "line")
    assert len(path.read_text().splitlines()) == seen


def test_bad_arguments_are_refused_and_change_nothing(tmp_path: Path, root_logger: logging.Logger) -> None:
    before = list(root_logger.handlers)
    with pytest.raises(Invalid, match="level is 'LOUD', expected DEBUG"):
        setup_logging(level="LOUD", directory=tmp_path)
    for name in ("a/b", "", "..", "a\0b"):
        with pytest.raises(Invalid, match="name is"):
            setup_logging(name, directory=tmp_path)
    for name, directory in (("\ud800", tmp_path), ("monitor", "a\0b")):
        with pytest.raises(Invalid, match="cannot be a path"):
            setup_logging(name, directory=directory)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another directory"):
        setup_logging(directory=tmp_path / "file")
    assert root_logger.handlers == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_warnings_of_libraries_are_logged_and_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys, warnings; from registry import setup_logging\n"
        "path = setup_logging(directory=sys.argv[1]); warnings.warn('old function')\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "print(path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    written = Path(done.stdout.strip()).read_text()
    assert "old function" in written
    assert all(line.strip() for line in written.splitlines())
    assert "old function" in done.stderr


def test_of_several_processes_the_first_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    path = setup_logging(directory=tmp_path)
    logging.getLogger("a").info("quiet")
    logging.getLogger("a").warning("loud")
    assert path.read_text() == ""
    shown = capsys.readouterr().err
    assert "quiet" not in shown
    assert re.fullmatch(r"\[rank 3\] " + LINE, shown.strip())
    monkeypatch.setenv("RANK", "0")
    setup_logging(directory=tmp_path)
    logging.getLogger("a").info("heard")
    assert "heard" in path.read_text()
