"""Documents -> samples: rows of tokens for calibration."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import CalibrationWarning, ConfigError, DataError

from .documents import TextSource
from .stretches import LongestStretches, join_stretches

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
    balance_sources: bool = False,
) -> torch.LongTensor:
    """Cut documents into samples for calibration.

    Documents are taken in an order shuffled by the seed until there are enough tokens, tokenised without special
    tokens, and joined by the end-of-sequence token (or beginning-of-sequence where there is no end). A long document
    gives one contiguous stretch: a hundredth of the tokens, but at least 200 tokens (or a sample) and at most four
    samples; more only where there would be too little text. So the samples are of a hundred documents or more where the
    text has them. Samples begin with the token that the tokenizer itself puts before a text ([`leading_token`][]).

    Args:
        source: Documents to read.
        tokenizer: A ``transformers`` tokenizer.
        num_samples: Largest number of samples.
        max_seq_length: Tokens per sample.
        seed: Seed of the order of the documents, and of the stretch that a long one gives.
        warn_if_short: Warn about fewer samples. False where `num_samples` is only an upper limit.
        varied_after: Beyond this many samples, a document gives one sample at most, so that they are of more documents.
        balance_sources: Take the next document from the source that has given the fewest tokens, so that every source
            gives equally many, as far as it has them. By default, documents come as they are shuffled.

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
    lead = leading_token(tokenizer) if max_seq_length > 1 else None
    length = max_seq_length - (lead is not None)
    needed, first = num_samples * length, min(varied_after or num_samples, num_samples)
    longest = LongestStretches.of(first, length, varies=first < num_samples)
    tokens = join_stretches(source, tokenizer, needed, longest, seed=seed, balance_sources=balance_sources)
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
