"""One request from the first check to the last token, as values that a page or a program can show."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from hf_context_prune.errors import ConfigError, ContextPruneError
from hf_context_prune.evaluation.windows import context_token
from hf_context_prune.storage.loading import LoadedModel

from .generation import CHAT, COLOUR, Progress, Request, Runner, encode_prompt, race
from .settings import Entry, Settings, Source
from .store import ModelStore
from .surprise import Span, compare_surprise

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN = 0.08  # a page can't show views faster, and sending them takes time from the models


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        kind: ``"dense"`` or ``"pruned"``.
        name: Name of the model.
        megabytes: Size of its weights in memory; None while it is not loaded.
        progress: The text so far, with its times.
        problem: Reason why it can't write; "" if it can.
    """

    kind: str
    name: str
    megabytes: float | None = None
    progress: Progress = field(default_factory=Progress)
    problem: str = ""


@dataclass(frozen=True)
class View:
    """The state of a request at one moment.

    Attributes:
        sides: The dense and the pruned model.
        status: A sentence on the state.
        refused: Whether the request was refused; `status` has the reason.
        spans: The text, piece by piece, with its surprise for both models; empty until it is known.
    """

    sides: tuple[Side, Side]
    status: str = ""
    refused: bool = False
    spans: tuple[Span, ...] = ()


class Comparer:
    """Comparison of the two models of a domain."""

    def __init__(self, settings: Settings, store: ModelStore) -> None:
        """Keep the models that the Space may show.

        Args:
            settings: The allowed models, and the limits.
            store: The copies of the models in memory.
        """
        self.settings = settings
        self._entries = {entry.name: entry for entry in settings.entries}
        self._store = store

    def entry(self, domain: str) -> Entry:
        """Return a domain by name.

        Raises:
            ConfigError: There is no domain of that name.
        """
        if not isinstance(domain, str) or domain not in self._entries:
            raise ConfigError(f"Choose one of the domains: {', '.join(self._entries)}.")
        return self._entries[domain]

    def idle(self, domain: str) -> View:
        """Return the view before a request."""
        entry = self.entry(domain)
        return View((self._side("dense", entry.base), self._side("pruned", entry.model)))

    def compare(self, domain: str, request: Request) -> Iterator[View]:
        """Let both models of a domain write, and compare a text piece by piece.

        They stop between two tokens when the iterator is closed. The text is the prompt with the base's continuation,
        or the base's answer alone.

        Args:
            domain: Name of the domain.
            request: The request; checked here.

        Yields:
            Views, a few per second.
        """
        try:
            entry, request = self.entry(domain), request.checked(self.settings.limits)
        except ConfigError as error:
            known = isinstance(domain, str) and domain in self._entries
            shown = self.idle(domain if known else self.settings.entries[0].name)
            yield replace(shown, status=str(error), refused=True)
            return
        sides = list(self.idle(domain).sides)
        runners: dict[int, Runner] = {}
        for index, source in enumerate((entry.base, entry.model)):
            if not self._store.has(source):
                yield View((sides[0], sides[1]), f"Loading {source.label} (once, for everybody) ...")
            try:
                loaded = self._store.get(source)
                sides[index] = self._side(sides[index].kind, source)
                runners[index] = Runner(loaded, request, self.settings.limits, sides[index].kind)
            except ContextPruneError as error:
                problem = str(error)
                if source.path is not None:  # visitors need not know the place on the server
                    problem = problem.replace(str(source.path.absolute()), source.path.name)
                sides[index] = replace(sides[index], problem=problem)
            except Exception:  # one model must not stop the other; visitors see no internals
                _LOGGER.exception("%s can't be used", source.label)
                sides[index] = replace(
                    sides[index], problem="The model can't be loaded; the log of the Space has the reason."
                )
        status = "Done."
        if request.mode != COLOUR:
            for view in self._race(sides, runners):
                sides = list(view.sides)
                yield view
            status = self._summary(sides)
        if len(runners) < len(sides):
            yield View((sides[0], sides[1]), status)
            return
        yield View((sides[0], sides[1]), "Comparing the text, token by token ...")
        try:
            spans = self._surprise(entry, request, sides[0].progress.text)
        except ContextPruneError as error:
            yield View((sides[0], sides[1]), f"{status} The text can't be coloured: {error}")
            return
        yield View((sides[0], sides[1]), status, spans=spans)

    def _race(self, sides: list[Side], runners: dict[int, Runner]) -> Iterator[View]:
        shown = 0.0
        sides = [*sides]
        was_first = dict.fromkeys(runners, False)
        yield View((sides[0], sides[1]), "Writing, in turns on the same processor ...")
        with closing(race(list(runners.values()), self.settings.limits.seconds)) as running:
            for all_progress in running:
                news = False
                for index, progress in zip(runners, all_progress, strict=True):
                    news = news or bool(progress.tokens and not was_first[index])
                    was_first[index] = bool(progress.tokens)
                    sides[index] = replace(sides[index], progress=progress)
                if news or time.perf_counter() - shown >= _SECONDS_BETWEEN:
                    yield View((sides[0], sides[1]), "Writing, in turns on the same processor ...")
                    shown = time.perf_counter()
        yield View((sides[0], sides[1]), "Written.")

    def _surprise(self, entry: Entry, request: Request, written: str) -> tuple[Span, ...]:
        def lead(loaded: LoadedModel) -> list[int]:
            if request.mode == CHAT:  # the same conversation for both
                return [int(token) for token in encode_prompt(loaded, request, "dense")[0]]
            return [context_token(loaded.tokenizer)]

        text = written if request.mode == CHAT else request.prompt + written
        base, pruned = (self._store.get(source) for source in (entry.base, entry.model))
        return compare_surprise(base, pruned, text, lead)

    def _side(self, kind: str, source: Source) -> Side:
        size = self._store.get(source).model.get_memory_footprint() / 1e6 if self._store.has(source) else None
        return Side(kind, source.label, size)

    def _summary(self, sides: list[Side]) -> str:
        dense, pruned = (side.progress for side in sides)
        if all(side.problem for side in sides):
            return "Neither model could write."
        if "time" in (dense.stopped, pruned.stopped):
            return f"Stopped after {self.settings.limits.seconds} seconds, the limit of this page."
        fast, slow = pruned.tokens_per_second, dense.tokens_per_second
        before, after = sides[0].megabytes, sides[1].megabytes
        if not fast or not slow or not before or not after:
            return "Done."
        faster, smaller = fast / slow, after / before
        return f"The pruned model wrote {faster:.2f} times as fast as the dense one, with {smaller:.0%} of its bytes."
