"""The blocks of text that a config calibrates on, and those that the rows of the tokens are refitted to."""

from __future__ import annotations

from typing import Any

import torch

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import ConfigError, DataError


def check_share(what: str, share: float, blocks: int) -> None:
    """Refuse a share of general text that is no calibration block, or all of them.

    Args:
        what: The share's name, for the message.
        share: Of the blocks.
        blocks: How many there are.

    Raises:
        ConfigError: It is.
    """
    if not 0 < round(share * blocks) < blocks:
        raise ConfigError(
            f"{what} is {share:g}: of {blocks} calibration blocks (num_calibration_samples) that is "
            f"{'all of them' if share > 0.5 else 'none'}. Ask for more blocks"
            + (f", or for {1 / blocks:g} to {1 - 1 / blocks:g}." if blocks > 1 else ".")
        )


def check_general_data_ratio(config: PrunerConfig, general: object) -> None:
    """Refuse a share of a text that is not there, and one that [`check_share`][] refuses.

    Raises:
        ConfigError: `general_data_ratio` without general text, or for too few blocks.
    """
    if config.general_data_ratio:
        check_share("general_data_ratio", config.general_data_ratio, config.num_calibration_samples)
    if config.general_data_ratio and general is None:
        raise ConfigError(
            f"general_data_ratio is {config.general_data_ratio:g}, but there is no general text to take samples from. "
            f"Give it: --general-data, EvalOptions(general_data=...)."
        )


def tokenize_calibration_samples(
    text: TextSource,
    tokenizer: Any,  # noqa: ANN401
    config: PrunerConfig,
    general: TextSource | None,
    *,
    count: int | None = None,
) -> torch.Tensor:
    """The calibration blocks of a config, [blocks, length], int64; those of general text are spread among the others.

    Args:
        text: Of the domain.
        tokenizer: The model's.
        config: Says how many blocks, how long, and how many of them are general.
        general: Text of no domain.
        count: Another number of blocks.

    Raises:
        ConfigError: `general_data_ratio` without general text, or for too few blocks.
        DataError: One of the texts has less than a block where the other has one.
    """
    check_general_data_ratio(config, general)

    def blocks(source: TextSource, count: int) -> torch.Tensor:
        length, seed = config.max_seq_length, config.pruning_seed
        return tokenize_samples(source, tokenizer, num_samples=count, max_seq_length=length, seed=seed, fewer=fewer)

    whole = config.num_calibration_samples if count is None else count
    fewer = whole > config.num_calibration_samples
    mixed = min(whole - 1, round(config.general_data_ratio * whole))  # of another count, rounded up it may be all
    if not mixed or general is None:
        return blocks(text, whole)
    parts = blocks(text, whole - mixed), blocks(general, mixed)
    lengths = [part.shape[1] for part in parts]
    if min(lengths) < max(lengths):
        short = text if lengths[0] < lengths[1] else general
        raise DataError(
            f"{short.name} has {min(lengths)} tokens, less than one block of {max(lengths)}, so it can't be mixed with "
            f"the other text. Give more of it, or lower max_seq_length to {min(lengths)}."
        )
    both = torch.cat(parts)
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(config.pruning_seed))]


Batch = dict[str, torch.Tensor]


def batches_of(samples: torch.Tensor, *, batch_tokens: int = 2048) -> list[Batch]:
    """Cut token blocks into batches of about `batch_tokens` tokens.

    Args:
        samples: [blocks, max_seq_length], int64, without padding.
        batch_tokens: Tokens a batch, at least one block.
    """
    size = max(1, batch_tokens // samples.shape[1])
    return [{"input_ids": chunk} for chunk in samples.split(size)]


def prepare_batch(batch: Batch, index: int, embedding_rows: int) -> tuple[Batch, torch.Tensor | None]:
    """A batch as the model takes it, and its mask of unpadded positions, [batch * length], or None without padding.

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
    # Left padding: GPT-2 counts its positions from the left edge, padding and all, unless it is told them.
    return inputs | {"position_ids": (mask.long().cumsum(dim=1) - 1).clamp_min(0)}, flat
