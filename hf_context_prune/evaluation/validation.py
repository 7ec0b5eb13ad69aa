"""`ValidationText`: documents that choose (a size, weights, an end) and are never reported."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource

from .losses import mean_bits_per_byte
from .passages import SHORT_CHARS, Passages
from .perplexity import document_losses


@dataclass(frozen=True)
class ValidationText:
    """Documents that are neither calibrated or trained on nor reported.

    Attributes:
        text: Passages of the documents; empty if other text repeats all of them.
        max_seq_length: Tokens per window.
        num_dropped: Documents that were dropped because other text has them too.
    """

    text: TextSource
    max_seq_length: int
    num_dropped: int

    @classmethod
    def apart_from(
        cls,
        given: TextSource,
        *others: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        max_seq_length: int,
        balance_sources: bool = False,
    ) -> ValidationText:
        """Keep the documents that other text does not repeat, and cut the passages that are scored.

        Args:
            given: Documents that were withheld.
            others: Text that is calibrated or trained on.
            tokenizer: Counts the tokens.
            max_tokens: Largest number of tokens that are scored, in passages of many documents.
            max_seq_length: Tokens per window.
            balance_sources: As for [`Passages`][].
        """
        text = given
        for other in others:
            text, _ = drop_overlapping(text, other)
        num_dropped = len(given) - len(text)
        if len(text):
            text = Passages.of(
                text, tokenizer, max_tokens=max_tokens, passage_chars=SHORT_CHARS, balance_sources=balance_sources
            ).text
        return cls(text, max_seq_length, num_dropped)

    def bits_per_byte(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the loss of a model on the documents; comparable between tokenizers."""
        losses = document_losses(model, tokenizer, self.text, max_seq_length=self.max_seq_length)
        return mean_bits_per_byte(losses)
