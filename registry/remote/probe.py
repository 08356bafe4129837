"""The probe: does a store create an object only if there is none of its key, also where several clients race?

Creating twice in a row finds a store that ignores the condition. Only a race finds one that looks first and puts then.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

from registry.remote.bucket import Bucket, Denied, Unreachable

_CLIENTS, _RACES = 8, 4
_LIMIT = 1 << 10


def probe(bucket: Bucket) -> str | None:
    """Why a store cannot hold a shared registry, in words; None if nothing was found against it.

    Raises:
        Unreachable, Denied: as the bucket's methods do.
    """
    made: list[str] = []

    def new() -> str:
        made.append(f"probe/{secrets.token_hex(8)}")
        return made[-1]

    try:
        key = new()
        if not bucket.create(key, b"first"):
            return _not_created(bucket, key)
        if bucket.create(key, b"second") or bucket.get(key, _LIMIT) != b"first":
            return "it overwrites an object that was only to be created (it ignores If-None-Match)"
        with ThreadPoolExecutor(_CLIENTS, "registry-probe") as pool:
            for _ in range(_RACES):
                if problem := _race(bucket, new(), pool):
                    return problem
        try:
            if bucket.get("probe/missing", _LIMIT) is not None:
                return "it gives an object that nobody made"
        except Denied:
            return "it answers 403 where an object is not there: these keys lack the right to list the bucket"
    finally:
        # What is left lies below probe/ and does no harm.
        with contextlib.suppress(Unreachable, Denied):
            bucket.delete(made)
    return None


def _not_created(bucket: Bucket, key: str) -> str | None:
    if bucket.get(key, _LIMIT) is None:
        raise Unreachable(f"{bucket.url}: does not create an object", "repeat")
    return "it says that an object is there which nobody made"


def _race(bucket: Bucket, key: str, pool: ThreadPoolExecutor) -> str | None:
    barrier = threading.Barrier(_CLIENTS)

    def client(number: int) -> bool:
        barrier.wait()
        try:
            return bucket.create(key, b"%d" % number)
        except Unreachable:
            # Its answer was lost, so it does not claim to have won.
            return False

    won = [number for number, created in enumerate(pool.map(client, range(_CLIENTS))) if created]
    if len(won) > 1:
        return f"it does not create objects atomically: {len(won)} of {_CLIENTS} clients created one (If-None-Match)"
    if won and bucket.get(key, _LIMIT) != b"%d" % won[0]:
        return "it tells one client that it created an object, and keeps another's (If-None-Match)"
    # Where nobody won, the winner's answer was lost, which says nothing against the store.
    return None
