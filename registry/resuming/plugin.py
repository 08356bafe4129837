"""The plugin for pytest: the fixture `check_resume`, which is there wherever this package is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from registry.resuming.checking import ResumeCheck


@pytest.fixture(name="check_resume", scope="session")
def check_resume_fixture() -> Callable[..., ResumeCheck]:
    """`registry.check_resume`, for tests such as `check_resume("train.py", at=17).assert_exact()`."""
    # Lazy: loads sqlite3.
    from registry.resuming.checking import check_resume

    return check_resume
