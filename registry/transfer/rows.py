"""Rows of a classifier: which row of the source goes where in the target, by the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from registry.store.errors import Invalid
from registry.store.text import quoted


class Rows(BaseModel):
    """Which rows of a classifier go where.

    Attributes:
        pairs: a row in the source, and the row in the target that it goes to.
        of: how many rows the target has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: tuple[tuple[int, int], ...]
    of: int = Field(ge=1)

    @classmethod
    def by_class(cls, old: Sequence[str], new: Sequence[str]) -> Rows:
        """Rows by the names of their classes.

        >>> Rows.by_class(["cat", "dog"], ["fox", "cat"]).pairs
        ((0, 1),)

        Raises:
            Invalid: if a class is named twice, or none is on both sides.
        """
        for names in (old, new):
            if len(set(names)) < len(names):
                twice = next(name for name in names if list(names).count(name) > 1)
                raise Invalid(f"the class {quoted(twice)} is named twice")
        places = {name: i for i, name in enumerate(old)}
        pairs = tuple((places[name], i) for i, name in enumerate(new) if name in places)
        if not pairs:
            raise Invalid("no class of the target is one of the source's")
        return cls(pairs=pairs, of=len(new))
