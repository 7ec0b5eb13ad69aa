"""The stages of a long run: each is named as it begins, with its place among all."""

from __future__ import annotations

import logging
import time


class Stages:
    """Names the stages of a run, in order, and says in the end how long all of them took."""

    def __init__(self, logger: logging.Logger, *names: str) -> None:
        """Take the names of all stages.

        Args:
            logger: Where they are shown.
            names: What happens in each.
        """
        self._logger, self._names, self._done, self._began = logger, names, 0, time.monotonic()

    def begin(self, name: str) -> None:
        """Show that a stage begins.

        Raises:
            ValueError: It is not the next one of the run.
        """
        if self._names[self._done] != name:
            raise ValueError(f"The next stage is {self._names[self._done]!r}, not {name!r}.")
        self._done += 1
        self._logger.info("[%d/%d] %s", self._done, len(self._names), name)

    def end(self) -> None:
        """Show how long the run took."""
        self._logger.info("Took %s.", format_seconds(time.monotonic() - self._began))


def format_seconds(seconds: float) -> str:
    """Return a time of two digits at most, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{round(seconds / 3600)} h"
