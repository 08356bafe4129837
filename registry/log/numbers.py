"""Numbers: which number a version of a model may have. A model never gives one twice."""

from __future__ import annotations

from registry.log.refusals import refuse_if
from registry.log.undoing import Undo


class Numbers:
    """The numbers of versions.

    Attributes:
        next: the number that the next version gets, by model.
        missing: the numbers that a model has had and that no readable entry accounts for, by model.
    """

    def __init__(self, undo: Undo) -> None:
        self.next: dict[str, int] = {}
        self.missing: dict[str, tuple[range, ...]] = {}
        self._undo = undo

    def give(self, model: str, version: int, *, is_adopted: bool) -> None:
        """Give a version its number.

        Args:
            is_adopted: whether it may also be one of the missing numbers.

        Raises:
            Refused: if the model has had a version of that number.
        """
        following, missing = self.next.get(model, 1), self.missing.get(model, ())
        is_free = version >= following or (is_adopted and any(version in numbers for numbers in missing))
        refuse_if(not is_free, f"{model} has had a version v{version}")
        if version > following:
            missing = (*missing, range(following, version))
        if version < following:
            missing = _without(missing, version)
        self._undo.set_unless_empty(self.missing, model, missing)
        self._undo.set(self.next, model, max(version + 1, following))

    def go_on_at(self, model: str, version: int) -> None:
        """Set the number that a model's next version gets.

        Raises:
            Refused: if the model has had a version of that number.
        """
        refuse_if(version < self.next.get(model, 1), f"{model} has had a version v{version}")
        self._undo.set(self.next, model, version)


def _without(missing: tuple[range, ...], version: int) -> tuple[range, ...]:
    """Ranges of numbers, with one number taken out."""
    parts = ((range(one.start, version), range(version + 1, one.stop)) for one in missing if version in one)
    others = (one for one in missing if version not in one)
    return (*others, *(part for pair in parts for part in pair if part))
