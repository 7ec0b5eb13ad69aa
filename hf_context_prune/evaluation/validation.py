"""`ValidationText`: documents that choose (a size, weights, an end) and are never reported."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource

from .losses import mean_bits_per_byte
from .perplexity import choose_documents, document_losses


@dataclass(frozen=True)
class ValidationText:
    """Documents that are neither calibrated or trained on nor reported.

    Attributes:
        text: The documents; empty if other text repeats all of them.
        docs: Names of the documents that are scored.
        max_seq_length: Tokens per window.
        num_dropped: Documents that were dropped because other text has them too.
    """

    text: TextSource
    docs: tuple[str, ...]
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
    ) -> ValidationText:
        """Keep the documents that other text does not repeat, and choose those that are scored.

        Args:
            given: Documents that were withheld.
            others: Text that is calibrated or trained on.
            tokenizer: Counts the tokens.
            max_tokens: Upper limit of the tokens that are scored, in whole documents.
            max_seq_length: Tokens per window.
        """
        text = given
        for other in others:
            text, _ = drop_overlapping(text, other)
        docs = choose_documents(text, tokenizer, max_tokens=max_tokens) if len(text) else ()
        return cls(text, tuple(docs), max_seq_length, len(given) - len(text))

    def bits_per_byte(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the loss of a model on the documents; comparable between tokenizers."""
        losses = document_losses(model, tokenizer, self.text, max_seq_length=self.max_seq_length, docs=self.docs)
        return mean_bits_per_byte(losses)
