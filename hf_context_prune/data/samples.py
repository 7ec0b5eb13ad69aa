"""Documents -> samples: rows of tokens for calibration."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import CalibrationWarning, ConfigError, DataError

from .documents import TextDocument, TextSource, stable_hash

_SAMPLES_PER_DOCUMENT = 4  # so that a few long documents don't make up all the calibration text
_SHORTEST_SAMPLE = 8


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that a tokenizer itself puts before a text, if any.

    The tokenizers of Gemma and Llama have one, those of SmolLM2 and GPT-2 don't. A model that was trained with it gives
    other activations without it (the first token of a text becomes the attention sink), so statistics and losses would
    be those of another model.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def tokenize_samples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    max_seq_length: int,
    seed: int = 0,
    warn_if_short: bool = True,
    varied_after: int | None = None,
) -> torch.LongTensor:
    """Cut documents into samples for calibration.

    Documents are taken in an order shuffled by the seed until there are enough tokens, tokenised without special
    tokens, and joined by the end-of-sequence token (or beginning-of-sequence where there is no end). A long document
    gives one contiguous stretch of at most four samples, more only where there would be too little text. Samples begin
    with the token that the tokenizer itself puts before a text ([`leading_token`][]).

    Args:
        source: Documents to read.
        tokenizer: A ``transformers`` tokenizer.
        num_samples: Largest number of samples.
        max_seq_length: Tokens per sample.
        seed: Seed of the order of the documents, and of the stretch that a long one gives.
        warn_if_short: Warn about fewer samples. False where `num_samples` is only an upper limit.
        varied_after: Beyond this many samples, a document gives one sample at most, so that they are of more documents.

    Returns:
        int64 token ids [samples, max_seq_length] without padding, samples <= num_samples. With less text than one
        sample, one shorter sample of at least 8 tokens.

    Warns:
        CalibrationWarning: There are fewer or shorter samples than asked for.

    Raises:
        DataError: There are fewer than 8 tokens of text.
        ConfigError: ``num_samples`` or ``max_seq_length`` is below 1.
    """
    for option, value in (("num_calibration_samples", num_samples), ("max_seq_length", max_seq_length)):
        if value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1")
    # The word in the hash fixes the order of the documents, so it keeps its old name.
    order = sorted(source.documents, key=lambda document: stable_hash("blocks", seed, document.doc))
    lead = leading_token(tokenizer) if max_seq_length > 1 else None
    length = max_seq_length - (lead is not None)
    needed, cap = num_samples * length, _SAMPLES_PER_DOCUMENT * length
    later = cap if varied_after is None or varied_after >= num_samples else length
    while True:
        caps = _Caps(cap, later, (varied_after or 0) * length)
        tokens, was_cut = _gather_tokens(order, tokenizer, needed, caps, seed)
        if len(tokens) >= needed or not was_cut:
            break
        cap, later = (cap, 4 * later) if later < cap else (4 * cap, 4 * cap)
    samples = min(num_samples, len(tokens) // length)
    if samples == 0:
        if len(tokens) < _SHORTEST_SAMPLE:
            raise DataError(
                f"{source.name}: {len(tokens)} tokens of text, but a sample needs at least {_SHORTEST_SAMPLE}; give "
                "more text"
            )
        samples, length = 1, len(tokens)
    if samples * length < needed and warn_if_short:
        warnings.warn(
            f"{source.name}: asked for {num_samples} samples ({num_samples * max_seq_length} tokens), but the text "
            f"gives {samples} of {length + (lead is not None)} tokens: calibrating on those. Give more text, or lower "
            f"num_calibration_samples.",
            CalibrationWarning,
            stacklevel=2,
        )
    own = torch.tensor(tokens[: samples * length], dtype=torch.long).view(samples, length)
    return own if lead is None else torch.nn.functional.pad(own, (1, 0), value=lead)


def join_samples(*parts: tuple[TextSource, torch.Tensor]) -> torch.Tensor:
    """Return the samples of several texts, one text after the other.

    Args:
        *parts: Each text with its samples, int64 [samples, length].

    Raises:
        DataError: A text has less than one sample of the length of the others.
    """
    lengths = [samples.shape[1] for _, samples in parts]
    if min(lengths) < max(lengths):
        short, _ = parts[lengths.index(min(lengths))]
        raise DataError(
            f"{short.name} has {min(lengths)} tokens, less than one sample of {max(lengths)}, so it can't be mixed "
            f"with the other text. Give more of it, or lower max_seq_length to {min(lengths)}."
        )
    return torch.cat([samples for _, samples in parts])


class _Caps(NamedTuple):
    """Most tokens that a document gives: `first` until there are `until` tokens, `later` beyond."""

    first: int
    later: int
    until: int


def _gather_tokens(
    documents: Sequence[TextDocument],
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
    caps: _Caps,
    seed: int,
) -> tuple[list[int], bool]:
    """Join the tokens of documents until there are enough.

    Args:
        documents: In the order to read them.
        tokenizer: A ``transformers`` tokenizer.
        needed: Number of tokens.
        caps: Most tokens of a document.
        seed: Seed of the stretches.

    Returns:
        (token ids, at least ``needed`` where the documents hold that many; whether a document was cut).
    """
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    tokens: list[int] = []
    was_cut = False
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        draws = [random.Random(stable_hash("stretch", seed, document.doc)) for document in batch]
        texts = [_window(document.text, 16 * caps.first, draw) for document, draw in zip(batch, draws, strict=True)]
        # verbose=False: a document longer than the model's context is fine here: it is cut into samples.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, text, draw, ids in zip(batch, texts, draws, encoded, strict=True):
            cap = caps.first if len(tokens) < caps.until else caps.later
            was_cut |= len(ids) > cap or len(text) < len(document.text)
            first = draw.randrange(len(ids) - cap + 1) if len(ids) > cap else 0
            if tokens and ids and separator is not None:
                tokens.append(separator)
            tokens.extend(ids[first : first + cap])
            if len(tokens) >= needed:
                return tokens, was_cut
    return tokens, was_cut


def _window(text: str, num_chars: int, draw: random.Random) -> str:
    """Return a random stretch of a very long text, from the start of a word, so that tokenising it stays cheap."""
    if len(text) <= num_chars:
        return text
    start = draw.randrange(len(text) - num_chars + 1)
    if start:
        space = re.compile(r"\s").search(text, start, start + num_chars // 2)
        start = space.start() if space else start
    return text[start : start + num_chars]
