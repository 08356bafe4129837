"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")
# machines are shared: how long an example takes proves nothing
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """A finalizer that Python's collector runs where the stack is full already fails through no fault of its own.

    Texts that nest too deep bring the stack there on purpose. A finalizer that fills the stack itself has a long
    traceback, and is told as ever.
    """
    told = sys.unraisablehook

    def hook(failed: sys.UnraisableHookArgs, /) -> None:
        frames = sum(1 for _ in traceback.walk_tb(failed.exc_traceback))
        if not (isinstance(failed.exc_value, RecursionError) and frames < 20):
            told(failed)

    sys.unraisablehook = hook


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; where there is none they are skipped, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(autouse=True, scope="session")
def has_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite leaves nothing in the cache of the user who runs it, and takes nothing from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def holds_what_its_log_says(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: what its registries hold follows from their logs, and every invariant holds.

    A test that leaves one otherwise on purpose is marked `damages`.
    """
    folder: Path | None = None
    if "tmp_path" in request.fixturenames and not request.node.get_closest_marker("damages"):
        folder = request.getfixturevalue("tmp_path")
    yield
    if folder is not None:
        broken = {str(root): found for root in _registries_below(folder) if (found := _broken_rules(root))}
        assert not broken


def _registries_below(folder: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(folder):
        if "journal" in folders:
            folders.clear()
            # The log of a bucket has an object for each entry.
            if not any(Path(path, "journal").glob("*.zst")):
                yield Path(path)


def _broken_rules(root: Path) -> list[str]:
    from support import broken_rules

    from registry import Registry
    from registry.store.errors import RegistryError

    try:
        registry = Registry(root, create=False)
        try:
            return broken_rules(registry)
        finally:
            registry.catalog.close()
    except RegistryError as error:
        return [str(error)]
