"""The text of a recovery: what is trained on, with a share of general text, and what chooses weights and the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hf_context_prune.data.balance import check_sources, repeat_small_sources
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import join_samples, tokenize_samples
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.utils.options import is_number

from .config import RecoveryConfig

_VALIDATION_TOKENS = 8_000
"""Tokens that are measured during training, in whole documents."""


@dataclass(frozen=True)
class RecoveryText:
    """Text of the domain, split by document, and general text that is mixed into what is trained on.

    Attributes:
        training: Documents of the domain to train on.
        validation: Documents of the domain that choose the weights and the end. Neither `training` nor `general`
            repeats them.
        general: General text to train on beside them; None trains on the domain alone.
        general_data_ratio: Share of the samples that is general text.
        balance_sources: The sources of `training` count equally.
    """

    training: TextSource
    validation: ValidationText
    general: TextSource | None = None
    general_data_ratio: float = 0.0
    balance_sources: bool = False

    @classmethod
    def of(
        cls,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        config: RecoveryConfig,
        general: TextSource | None = None,
        general_data_ratio: float = 0.0,
        *,
        balance_sources: bool = False,
    ) -> RecoveryText:
        """Hold a tenth of the documents out of the domain's text.

        Args:
            source: Text of the domain.
            tokenizer: The model's.
            config: Seed and length of the samples.
            general: General text.
            general_data_ratio: Share of the samples to take from it, in [0, 1).
            balance_sources: Train and choose on as much text of every source of the domain's.

        Raises:
            ConfigError: A share without general text, general text without a share, or a share out of range.
            DataError: There are too few documents, what is trained on repeats all validation documents, or
                `balance_sources` is given for a single source.
        """
        if balance_sources:
            check_sources(source)
        if not (is_number(general_data_ratio) and 0 <= general_data_ratio < 1):
            raise ConfigError(f"general_data_ratio is {general_data_ratio!r}; it must be a share in [0, 1).")
        if (general is None) != (general_data_ratio == 0):
            given = "there is no general text (general_data)" if general is None else f"{general.name} was given"
            raise ConfigError(f"general_data_ratio is {general_data_ratio:g}, but {given}. Give both, or neither.")
        rest, given_documents = hold_out_documents(source, seed=config.recovery_seed)
        validation = ValidationText.apart_from(
            given_documents,
            rest,
            *(() if general is None else (general,)),
            tokenizer=tokenizer,
            max_tokens=_VALIDATION_TOKENS,
            max_seq_length=config.max_seq_length,
            balance_sources=balance_sources,
        )
        if not len(validation.text):
            others = "other documents repeat" if general is None else f"other documents and {general.name} repeat"
            raise DataError(
                f"Recovery chooses weights by validation documents held out of {source.name}, but the {others} all "
                f"{len(given_documents):,} of them. Give text that repeats itself less."
            )
        return cls(rest, validation, general, general_data_ratio, balance_sources)

    def samples(self, tokenizer: PreTrainedTokenizerBase, config: RecoveryConfig) -> torch.Tensor:
        """Return the samples to train on, those of the domain first; the training shuffles them.

        The whole text of the domain is taken, or as much as the steps can use. With `balance_sources`, as many samples
        are taken in equal parts from its sources: documents of small ones up to four times, and of large ones, not all.
        For n samples of it there are
        n r / (1 - r) of general text, rounded, and at least one, where r is `general_data_ratio`. If the general text
        gives more, the seed chooses its documents. If it gives fewer, they are taken again in turn, so that the share
        holds and each of them comes equally often, to within one.

        Returns:
            Token ids, int64 [samples, length].

        Raises:
            DataError: One of the texts has less than a sample where the other has one.
        """
        share = self.general_data_ratio
        wanted = 2**31 if config.max_steps is None else config.max_steps * config.batch_size
        domain = _cut(self.training, tokenizer, config, max(1, wanted - round(share * wanted)))
        if self.balance_sources:
            repeated = repeat_small_sources(self.training)
            domain = _cut(repeated, tokenizer, config, len(domain), balance_sources=True)
        if self.general is None:
            return domain
        count = max(1, round(len(domain) * share / (1 - share)))
        general = _cut(self.general, tokenizer, config, count)
        both = join_samples((self.training, domain), (self.general, general))
        again = torch.arange(count - len(general)) % len(general) + len(domain)
        return torch.cat((both, both[again]))


def _cut(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    config: RecoveryConfig,
    num_samples: int,
    *,
    balance_sources: bool = False,
) -> torch.Tensor:
    return tokenize_samples(
        source,
        tokenizer,
        num_samples=num_samples,
        max_seq_length=config.max_seq_length,
        seed=config.recovery_seed,
        warn_if_short=False,
        balance_sources=balance_sources,
    )
