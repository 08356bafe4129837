"""The process of a run: how its two handlers of SIGTERM nest."""

from __future__ import annotations

import os
import signal

import pytest

from registry.runs.process import Interrupts, ending, sigterm_as_exit


def terminate() -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def as_the_system_sets_it() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_inside_a_run_holds_sigterm_back_and_gives_it_back_to_the_run() -> None:
    with sigterm_as_exit():
        of_the_run = signal.getsignal(signal.SIGTERM)
        with Interrupts() as interrupts:
            terminate()
            assert interrupts.pending == signal.SIGTERM
            with pytest.raises(SystemExit) as left:
                interrupts.deliver()
            assert left.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is of_the_run
        with pytest.raises(SystemExit):
            terminate()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_comes_through_at_once() -> None:
    with Interrupts() as interrupts:
        terminate()
        with pytest.raises(SystemExit):
            terminate()
        interrupts.pending = None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_program_keeps_the_handler_of_its_own() -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with sigterm_as_exit():
            terminate()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (ValueError("x"), "failed: ValueError"),
    ],
)
def test_an_ending_is_told_by_its_exception(error: BaseException, told: str) -> None:
    assert ending(error) == told
