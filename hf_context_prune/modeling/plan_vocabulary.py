"""The part of a plan that names the kept vocabulary entries."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from hf_context_prune.errors import PlanError, VocabularyError


@dataclass(frozen=True)
class Vocabulary:
    """The kept vocabulary entries; the position of an entry is its new id.

    Attributes:
        dense: Embedding rows of the base model.
        kept: Old ids in the order of the new ids.
    """

    dense: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse ids that are not integers, out of range or repeated.

        Raises:
            PlanError: An id or a count is wrong; the message has the value.
        """
        if isinstance(self.dense, bool) or not isinstance(self.dense, int) or not self.kept:
            raise PlanError(
                f"The plan's vocabulary keeps {len(self.kept)} of {self.dense!r} tokens; both must be counts."
            )
        for index in self.kept:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.dense:
                raise PlanError(f"The plan's vocabulary has {index!r}; ids are integers from 0 to {self.dense - 1}.")
        if len(set(self.kept)) != len(self.kept):
            raise PlanError("The plan's vocabulary has an id twice.")

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """New ids by old ids."""
        return {old: new for new, old in enumerate(self.kept)}

    def to_new(self, ids: Iterable[int]) -> list[int | None]:
        """Return the new ids of a flat sequence (or tensor) of old ids; None for a removed token.

        Raises:
            VocabularyError: A value is not an id of the old vocabulary.
        """
        return [self.new_ids.get(index) for index in _check_ids(ids, self.dense, "old")]

    def to_old(self, ids: Iterable[int]) -> list[int]:
        """Return the old ids of a flat sequence (or tensor) of new ids.

        Raises:
            VocabularyError: A value is not an id of the new vocabulary.
        """
        return [self.kept[index] for index in _check_ids(ids, len(self.kept), "new")]


def _check_ids(ids: Iterable[int], count: int, which: str) -> Iterator[int]:
    for value in ids:
        try:
            index = operator.index(value)
        except TypeError:
            index = -1  # a list of lists, or a fraction
        if not 0 <= index < count:
            raise VocabularyError(
                f"{value!r} is not an id of the {which} vocabulary; give a flat sequence of integers from 0 to "
                f"{count - 1:,}, without labels such as -100."
            )
        yield index
