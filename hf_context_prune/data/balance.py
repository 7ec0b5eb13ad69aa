"""Sources of a text, each of which counts equally (`balance_sources`): what they are, and equal shares of a budget.

What runs a model on a limited number of tokens draws as many of every source, as far as the source has them. What reads
a whole text weighs its sources: tokens are counted source by source, and training repeats documents of small ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hf_context_prune.errors import DataError

from .documents import TextDocument, TextSource, stable_hash

_MOST_COPIES = 4
"""Text that is read up to four times teaches a language model nearly as much as new text (arXiv 2305.16264)."""


def group_by_source(documents: Iterable[TextDocument]) -> dict[str, list[TextDocument]]:
    """Return the documents of each source, sources in the order of their names."""
    groups: dict[str, list[TextDocument]] = {}
    for document in documents:
        groups.setdefault(document.source, []).append(document)
    return dict(sorted(groups.items()))


def split_by_source(text: TextSource) -> list[TextSource]:
    """Return a text for each source, under the name of the whole."""
    groups = group_by_source(text.documents).values()
    return [TextSource.from_documents(group, name=text.name, revision=text.revision) for group in groups]


def count_sources(text: TextSource) -> int:
    """Return the number of sources of a text."""
    return len({document.source for document in text.documents})


def identify_sources(text: TextSource) -> str:
    """Return a hash of the sources of the documents, in order: fingerprints are of the texts alone."""
    return stable_hash(*(document.source for document in text.documents)).hex()


def check_sources(text: TextSource) -> None:
    """Refuse to balance the sources of a text that has one.

    Raises:
        DataError: Says how a text names its sources.
    """
    sources = group_by_source(text.documents)
    if len(sources) < 2:
        raise DataError(
            f"{text.name}: balance_sources (--balance-sources) takes as much text of every source, but all "
            f"documents are of one ({', '.join(map(repr, sources))}). Name the source of each record in a column "
            f"'source', or give a folder with a file (.jsonl, .csv, .parquet) for each; or leave balance_sources out."
        )


def share_evenly(sizes: Sequence[int], total: int) -> list[int]:
    """Share a total out evenly: each takes at most its size, and what small ones leave goes to the others.

    Args:
        sizes: The most that each can take.
        total: What is shared out.
    """
    shares, left = [0] * len(sizes), total
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        shares[index] = min(sizes[index], left // (len(sizes) - place))
        left -= shares[index]
    return shares


def repeat_small_sources(text: TextSource) -> TextSource:
    """Repeat the documents of each source until it is as large as the largest, each at most four times in all."""
    groups = group_by_source(text.documents)
    sizes = {name: sum(len(document.text) for document in group) for name, group in groups.items()}
    repeated = list(text.documents)
    for name, group in groups.items():
        missing = max(sizes.values()) - sizes[name]
        for copy, document in itertools.product(range(2, _MOST_COPIES + 1), group):
            if missing < len(document.text):
                break
            repeated.append(replace(document, doc=f"{document.doc} ({copy})"))
            missing -= len(document.text)
    return TextSource.from_documents(repeated, name=text.name, revision=text.revision)
