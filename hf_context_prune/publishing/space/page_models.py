"""The models of a Space as its page shows them: what a visitor can choose, and what stands there before a request."""

from __future__ import annotations

import logging
from typing import Any

from .compare import Comparer, View
from .facts import read_facts
from .generation import CHAT, COLOUR, CONTINUE
from .html import render
from .settings import Entry, Settings

FINISHED = "A finished example: one run, on the machine that made this page. Press Compare for a run of your own."
_LOGGER = logging.getLogger(__name__)


class PageModels:
    """The models of a Space, as the handlers of its page see them."""

    def __init__(self, gr: Any, settings: Settings, comparer: Comparer) -> None:  # noqa: ANN401 - gradio
        self.gr, self.settings, self.comparer = gr, settings, comparer
        self.domains = settings.domains
        self.facts = {entry.name: read_facts(entry) for entry in settings.entries}
        for name, fact in self.facts.items():
            for problem in fact.problems:
                _LOGGER.warning("%s: %s", name, problem)

    def entry(self, domain: Any, size: Any) -> Entry:  # noqa: ANN401 - whatever a visitor sends
        """Return the model that a visitor chose.

        Raises:
            ConfigError: There is no such domain.
        """
        if not isinstance(domain, str) or domain not in self.domains:
            return self.comparer.entry(domain)
        sizes = self.domains[domain]
        number = int(size) if isinstance(size, int | float) and 1 <= size <= len(sizes) else 1
        return sizes[number - 1]

    def opening(self, entry: Entry) -> View:
        """Return the view before a request: the finished example, if there is one."""
        example = self.facts[entry.name].example
        return self.comparer.idle(entry.name) if example is None else example.view

    def opening_status(self, entry: Entry) -> str:
        """Return the line of the status before a request; the speed of one old run is not worth a sentence."""
        text = self.comparer.idle(entry.name).status if self.facts[entry.name].example is None else FINISHED
        return render("status", text=text, bad=False)

    def opening_prompt(self, entry: Entry) -> str:
        """Return the text of the finished example; "" without one."""
        example = self.facts[entry.name].example
        return "" if example is None else example.prompt

    def modes(self, entry: Entry) -> list[str]:
        """Return what the models of an entry can do; without an example it is not known whether they can answer."""
        example = self.facts[entry.name].example
        return [CONTINUE, COLOUR] if example is not None and not example.can_chat else [CONTINUE, CHAT, COLOUR]
