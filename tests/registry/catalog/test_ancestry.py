"""The trees of what a version came from, and of what came from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.catalog.ancestry import Branch, descendants, origins


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A teacher of three versions; a student from the second, and a mixture of the student and the teacher's third."""
    registry = Registry(tmp_path / "r")
    save(registry, "teacher")
    save(registry, "teacher", parent="teacher:v1")
    save(registry, "teacher", parent="teacher:v2")
    save(registry, "student", ("transferred-from", registry["teacher:v2"].id), ("imported-from", "model.pt"))
    save(registry, "mixed", *(("merged-from", registry[name].id) for name in ("student", "teacher")))
    return registry


def save(registry: Registry, model: str, *edges: tuple[str, str], parent: str | None = None) -> None:
    tree = {"w": torch.tensor([float(len(registry.versions()))])}
    lineage = [{"kind": kind, "parent": above} for kind, above in edges]
    registry.save(model, {"model": tree}, lineage=lineage, parent=parent)


def told(branches: Sequence[Branch]) -> list[object]:
    """Branches as lists: kind, name, why it is cut, and what is beyond."""
    return [(one.kind, one.name, one.cut, told(one.branches)) for one in branches]


def test_a_version_comes_from_its_edges_or_else_from_the_version_before_it(registry: Registry) -> None:
    found = origins(registry.catalog, registry.resolve("student"))
    first = ("continued from", "teacher:v1", "", [])
    assert told(found) == [
        ("transferred-from", "teacher:v2", "", [first]),
        ("imported-from", "model.pt", "", []),
    ]
    assert [one.version for one in found] == [registry.resolve("teacher:v2"), None]
    assert origins(registry.catalog, registry.resolve("teacher:v1")) == []


def test_what_two_ways_lead_to_is_shown_once(registry: Registry) -> None:
    student, teacher = origins(registry.catalog, registry.resolve("mixed"))
    assert (student.name, teacher.name) == ("student:v1", "teacher:v3")
    assert student.branches[0].branches
    assert told(teacher.branches) == [("continued from", "teacher:v2", "repeated", [])]


def test_what_came_from_a_version(registry: Registry) -> None:
    found = descendants(registry.catalog, registry.resolve("teacher:v2"))
    assert told(found) == [
        ("transferred-from", "student:v1", "", [("merged-from", "mixed:v1", "", [])]),
    ]
    assert descendants(registry.catalog, registry.resolve("mixed")) == []


def test_a_tree_ends_at_its_deepest_level(registry: Registry) -> None:
    found = origins(registry.catalog, registry.resolve("teacher"), deepest=1)
    assert told(found) == [
        ("continued from", "teacher:v2", "", [("continued from", "teacher:v1", "deep", [])]),
    ]


def test_a_parent_that_was_removed_is_left_out(registry: Registry) -> None:
    save(registry, "net", parent="gone:v7")
    assert origins(registry.catalog, registry.resolve("net")) == []
