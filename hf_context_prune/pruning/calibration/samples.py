"""The samples that a run calibrates on, and the batches that they are cut into."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.data.balance import check_sources
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import join_samples, tokenize_samples
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.utils.text_options import DEFAULT_GENERAL_DATA_RATIO

Batch = dict[str, torch.Tensor]
"""What a model's forward takes: ``input_ids`` and, where there is padding, ``attention_mask``."""

VALIDATION_EVERY = 12
"""Of the text of a reconstruction, one part in so many (batch or sample) is never fitted: it chooses."""


def check_share(what: str, share: float, num_samples: int) -> None:
    """Refuse a share of general text that rounds to no calibration sample, or to all of them.

    Args:
        what: The share's name, for the message.
        share: Share of the samples.
        num_samples: How many samples there are.

    Raises:
        ConfigError: The share rounds to none or all of the samples.
    """
    if not 0 < round(share * num_samples) < num_samples:
        raise ConfigError(
            f"{what} is {share:g}: of {num_samples} calibration samples (num_calibration_samples) that is "
            f"{'all of them' if share > 0.5 else 'none'}. Ask for more samples"
            + (f", or for {1 / num_samples:g} to {1 - 1 / num_samples:g}." if num_samples > 1 else ".")
        )


def choose_general_share(config: PrunerConfig, general: object) -> float | None:
    """Return the share of general text that a config asks for, or the default where there is enough of both."""
    default = DEFAULT_GENERAL_DATA_RATIO
    if config.general_data_ratio is not None or general is None:
        return config.general_data_ratio
    return default if 0 < round(default * config.num_calibration_samples) < config.num_calibration_samples else None


def check_general_data_ratio(config: CalibrationConfig, general: object) -> None:
    """Refuse a share of general text where there is none, and a share that [`check_share`][] refuses.

    Raises:
        ConfigError: `general_data_ratio` without general text, or for too few samples.
    """
    if config.general_data_ratio:
        check_share("general_data_ratio", config.general_data_ratio, config.num_calibration_samples)
    if config.general_data_ratio and general is None:
        raise ConfigError(
            f"general_data_ratio is {config.general_data_ratio:g}, but there is no general text to take samples from. "
            f"Give it: --general-data, EvalOptions(general_data=...)."
        )


class CalibrationSet:
    """The text that a run calibrates on. Each tokenizer reads it once, however often samples are asked for.

    Args:
        domain: Text of the domain.
        config: Says how many samples, how long they are, and which share of them is general text.
        general: General text, for `general_data_ratio`.

    Raises:
        ConfigError: See [`check_general_data_ratio`][].
        DataError: `balance_sources` is given, and the domain's text has a single source.
    """

    def __init__(self, domain: TextSource, config: CalibrationConfig, general: TextSource | None = None) -> None:
        check_general_data_ratio(config, general)
        if config.balance_sources:
            check_sources(domain)
        self.domain, self.config, self.general = domain, config, general
        # The tokenizer is kept beside its samples, so that no other one can get its id.
        self._known: dict[tuple[int, int], tuple[PreTrainedTokenizerBase, torch.Tensor]] = {}

    @property
    def general_share(self) -> tuple[TextSource | None, float]:
        """The general text and its share of the samples; None and 0 where nothing is taken from it."""
        share = 0.0 if self.general is None else self.config.general_data_ratio or 0.0
        return (self.general, share) if share else (None, 0.0)

    def samples(self, tokenizer: PreTrainedTokenizerBase, num_samples: int | None = None) -> torch.Tensor:
        """Return the calibration samples, with those of general text spread among the others.

        Args:
            tokenizer: The tokenizer of the model that reads them.
            num_samples: Upper limit in place of `num_calibration_samples`; shorter text then gives no warning.

        Returns:
            [samples, length], int64.

        Raises:
            DataError: One of the texts has less than a sample where the other has one.
        """
        wanted = self.config.num_calibration_samples if num_samples is None else num_samples
        key = (id(tokenizer), wanted)
        if key not in self._known:
            self._known[key] = (tokenizer, self._tokenize(tokenizer, wanted))
        return self._known[key][1]

    def _tokenize(self, tokenizer: PreTrainedTokenizerBase, wanted: int) -> torch.Tensor:
        config = self.config
        share, own = config.general_data_ratio or 0.0, config.num_calibration_samples

        def cut(source: TextSource, count: int, first: int, *, balance_sources: bool = False) -> torch.Tensor:
            return tokenize_samples(
                source,
                tokenizer,
                num_samples=count,
                max_seq_length=config.max_seq_length,
                seed=config.pruning_seed,
                warn_if_short=wanted <= own,
                varied_after=first,
                balance_sources=balance_sources,
            )

        def count_mixed(samples: int) -> int:
            return min(samples - 1, round(share * samples))  # rounded up, it may be all of them

        mixed = count_mixed(wanted)
        if not mixed or self.general is None:
            return cut(self.domain, wanted, own, balance_sources=config.balance_sources)
        first = count_mixed(own)
        domain = cut(self.domain, wanted - mixed, own - first, balance_sources=config.balance_sources)
        parts = domain, cut(self.general, mixed, first)
        both = join_samples((self.domain, parts[0]), (self.general, parts[1]))
        # Evenly spread, in an order that more samples only continue.
        places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
        return both[places.argsort(stable=True)]


def batches_of(samples: torch.Tensor, *, batch_tokens: int = 2048) -> list[Batch]:
    """Cut samples into batches of about `batch_tokens` tokens.

    Args:
        samples: [samples, max_seq_length], int64, without padding.
        batch_tokens: Tokens per batch; a batch has at least one sample.

    Returns:
        The batches in order; the last one may have fewer samples.
    """
    size = max(1, batch_tokens // samples.shape[1])
    return [{"input_ids": chunk} for chunk in samples.split(size)]


def prepare_batch(batch: Batch, index: int, embedding_rows: int) -> tuple[Batch, torch.Tensor | None]:
    """Return a batch as the model takes it, and its mask of unpadded positions.

    Args:
        batch: ``input_ids`` [batch, length] and, where there is padding, ``attention_mask``.
        index: Number of the batch, for messages.
        embedding_rows: Rows of the model's embedding.

    Returns:
        (inputs, mask [batch * length] or None without padding).

    Raises:
        DataError: A token id beyond the embedding.
    """
    ids = batch["input_ids"]
    highest = int(ids.max()) if ids.numel() else -1
    if highest >= embedding_rows or (ids.numel() and int(ids.min()) < 0):
        raise DataError(
            f"Batch {index} holds the token id {highest if highest >= embedding_rows else int(ids.min())}, but the "
            f"model's embedding has {embedding_rows} rows (ids 0 to {embedding_rows - 1}). Use the tokenizer that "
            f"belongs to this model."
        )
    mask = batch.get("attention_mask")
    if mask is None:
        return {"input_ids": ids}, None
    flat = mask.reshape(-1).bool()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if bool(flat.all()):
        return inputs, None
    # Left padding: without position_ids, GPT-2 counts its positions from the left edge, padding included.
    return inputs | {"position_ids": (mask.long().cumsum(dim=1) - 1).clamp_min(0)}, flat
