"""How long a test that draws its own cases goes on, which seeds it takes, and where it counts what it tried.

In the suite each such test has a small budget of its own. `make soak` gives it more: `SOAK_SECONDS` says how many
seconds. A seed that failed is kept in `seeds/`, and every later run replays it first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
COUNTS = HERE.parents[1] / "build" / "soak"


def seconds(default: float) -> float:
    """The time that a test may take: its own budget, or what `make soak` gives it."""
    return float(os.environ.get("SOAK_SECONDS", default))


def kept(stem: str) -> list[int]:
    """The seeds that failed once."""
    path = HERE / "seeds" / f"{stem}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


def seeds(stem: str, default: float) -> Iterator[int]:
    """The seeds that failed once, then fresh ones until the time is up; at least one of these.

    `SOAK_SEED` replays one seed and no other.
    """
    if "SOAK_SEED" in os.environ:
        yield int(os.environ["SOAK_SEED"])
        return
    yield from kept(stem)
    end = time.monotonic() + seconds(default)
    while True:
        yield random.SystemRandom().randrange(1 << 40)
        if time.monotonic() >= end:
            return


@contextlib.contextmanager
def replayable(stem: str, seed: int, about: str = "") -> Iterator[None]:
    """Keep the seed of a case that fails, and say in its error how to replay it.

    Args:
        about: what else helps to find out why.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        keep(stem, seed)
        error.add_note(f"SOAK_SEED={seed} replays it{about}")
        raise


def keep(stem: str, seed: int) -> None:
    """Note a seed that failed, so that every later run replays it."""
    if seed not in kept(stem):
        path = HERE / "seeds" / f"{stem}.txt"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"{seed}\n")


def count(stem: str, **numbers: float) -> None:
    """Add what a test tried to `build/soak/<stem>.json`."""
    COUNTS.mkdir(parents=True, exist_ok=True)
    with open(COUNTS / f"{stem}.json", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        total = json.loads(file.read() or "{}")
        for name, number in numbers.items():
            total[name] = total.get(name, 0) + number
        file.truncate(0)
        file.write(json.dumps(total, indent=1))


def main() -> None:
    """Say what the tests have tried."""
    for path in sorted(COUNTS.glob("*.json")):
        numbers = json.loads(path.read_text())
        print(f"{path.stem:22} " + ", ".join(f"{number:,.0f} {name}" for name, number in numbers.items()))


if __name__ == "__main__":
    main()
