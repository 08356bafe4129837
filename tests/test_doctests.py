"""The examples in the docstrings work."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import registry


def modules() -> list[str]:
    found = [name for _, name, _ in pkgutil.walk_packages(registry.__path__, "registry.")]
    for part in ("store", "models", "cli"):
        package = importlib.import_module(f"registry.{part}")
        found += [name for _, name, _ in pkgutil.walk_packages(package.__path__, f"registry.{part}.")]
    # Those of the integrations run in tests/integrations, where the frameworks are.
    left_out = ("registry.integrations.",)
    return sorted({name for name in found if not name.endswith("__main__") and not name.startswith(left_out)})


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test for name in modules() for test in finder.find(importlib.import_module(name)) if test.examples
    ]
    assert len(found) > 8
