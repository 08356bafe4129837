"""`check_resume` with a framework: what its own checkpoint loses is named, and ours is exact."""

from __future__ import annotations

from benchmarks.exactness import CASES, SCRIPTS
from registry import check_resume


def test_a_training_with_accelerate_is_checked() -> None:
    (case,) = (one for one in CASES if one.package == "accelerate" and "window" in one.name)
    words = case.words.split()
    check_resume(SCRIPTS / case.script, *words, at=case.at).assert_exact()
    theirs = check_resume(SCRIPTS / case.script, *words, "--native", at=case.at)
    assert theirs.difference is not None
    assert (theirs.version, theirs.resumed) == (None, 7)
