"""Documents -> token windows -> batches, on which `perplexity.py` scores a model."""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.data.samples import leading_token
from hf_context_prune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedDocument:
    """One document as token ids, one list per record."""

    doc: str
    source: str
    num_bytes: int
    records: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all records."""
        return sum(len(ids) for ids in self.records)


@dataclass(frozen=True)
class Window:
    """A stretch of a record: `inputs` is `targets` shifted right by one, led by one unscored context token."""

    document: int
    inputs: list[int]
    targets: list[int]


def context_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that leads the first window of a record: bos, else eos.

    A bos that pads, and that the tokenizer itself puts before no text, is no beginning: GGUF files of Qwen2.5 name
    ``<|endoftext|>`` so, behind which Qwen2.5-Coder-0.5B-Instruct reads badly. Then eos leads, which also parts the
    documents of calibration samples.

    Raises:
        DataError: The tokenizer has neither.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is not None and bos == tokenizer.pad_token_id and leading_token(tokenizer) is None:
        bos = None
    token = eos if bos is None else bos
    if token is None:
        raise DataError(
            "The tokenizer has neither a bos nor an eos token to lead a document's first token. Set "
            "tokenizer.bos_token."
        )
    return int(token)


def group_records(source: TextSource, docs: Collection[str] | None) -> dict[str, list[TextDocument]]:
    """Return the records of every document, or of the documents in `docs`, in the order of `source`."""
    groups: dict[str, list[TextDocument]] = {}
    for record in source.documents:
        groups.setdefault(record.doc, []).append(record)
    if docs is None:
        return groups
    unknown = sorted(set(docs) - groups.keys())
    if unknown:
        raise DataError(f"{len(unknown)} of the given docs are not in {source.name!r}, such as {unknown[0]!r}.")
    wanted = set(docs)
    return {doc: records for doc, records in groups.items() if doc in wanted}


def encode_documents(
    groups: dict[str, list[TextDocument]],
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    seed: int,
) -> list[EncodedDocument]:
    """Tokenise the documents, only as many as `max_tokens` allows, and return them in their original order."""
    order = list(groups)
    if max_tokens is not None:
        random.Random(seed).shuffle(order)
    encoded: dict[str, EncodedDocument] = {}
    used = 0
    for doc in order:
        texts = [record.text for record in groups[doc]]
        # verbose=False: the texts are cut into windows below, so a warning about their length would mislead.
        records = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        document = EncodedDocument(doc, groups[doc][0].source, num_bytes, records)
        if document.num_tokens == 0:
            continue
        used += document.num_tokens
        if max_tokens is not None and encoded and used > max_tokens:
            break
        encoded[doc] = document
    if not encoded:
        raise DataError(
            f"{name!r} holds no text to score ({len(groups)} documents, 0 tokens). Give it a non-empty document."
        )
    return [encoded[doc] for doc in groups if doc in encoded]


def cut_windows(
    documents: Iterable[EncodedDocument], context: int, max_seq_length: int, *, each: bool = False
) -> Iterator[Window]:
    """Cut every record into windows that predict each of its tokens once.

    Args:
        documents: Documents with their tokens.
        context: Token that leads the first window of a record.
        max_seq_length: Tokens per window.
        each: Whether `context` leads every window; otherwise the last token of the previous window does.
    """
    for index, document in enumerate(documents):
        for ids in document.records:
            for start in range(0, len(ids), max_seq_length):
                targets = ids[start : start + max_seq_length]
                first = ids[start - 1] if start and not each else context
                yield Window(index, [first, *targets[:-1]], targets)


def batch_windows(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Cut windows, longest first, into batches of at most `batch_tokens` padded tokens (at least one window)."""
    start = 0
    while start < len(windows):
        size = max(1, batch_tokens // len(windows[start].inputs))
        yield list(windows[start : start + size])
        start += size
