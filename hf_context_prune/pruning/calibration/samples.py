"""The blocks of text that a config calibrates on, and those that the rows of the tokens are refitted to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource, token_blocks
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.pruning.vocabulary.refit import blocks_to_read, refit_rows
from hf_context_prune.utils.distributed import on_main_process


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


def check_general_mix(config: PrunerConfig, general: object) -> None:
    """Refuse a share of a text that is not there, and one that [`check_share`][] refuses.

    Raises:
        ConfigError: `general_mix` without general text, or for too few blocks.
    """
    if config.general_mix:
        check_share("general_mix", config.general_mix, config.num_calibration_samples)
    if config.general_mix and general is None:
        raise ConfigError(
            f"general_mix is {config.general_mix:g}, but there is no general text to take blocks from. Give it: "
            f"--general-data, EvalOptions(general_data=...)."
        )


def calibration_blocks(
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
        ConfigError: `general_mix` without general text, or for too few blocks.
        DataError: One of the texts has less than a block where the other has one.
    """
    check_general_mix(config, general)

    def blocks(source: TextSource, count: int) -> torch.Tensor:
        length, seed = config.max_seq_length, config.pruning_seed
        return token_blocks(source, tokenizer, num_samples=count, max_seq_length=length, seed=seed, fewer=fewer)

    whole = config.num_calibration_samples if count is None else count
    fewer = whole > config.num_calibration_samples
    mixed = min(whole - 1, round(config.general_mix * whole))  # of another count, rounded up it may be all
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


def rows_text(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    general: TextSource | None,
) -> torch.Tensor:
    """Blocks for the refit of a model's rows, [blocks, length], int64: as many as pay, mixed as a config says."""
    count = blocks_to_read(model, config.num_calibration_samples, config.max_seq_length)
    return calibration_blocks(text, tokenizer, config, general, count=count)


def refit_rows_in_all(model: PreTrainedModel, samples: torch.Tensor) -> dict[str, float] | None:
    """[`refit_rows`][] in place, the same in all processes."""
    head = model.get_output_embeddings()

    def refitted() -> tuple[dict[str, float] | None, torch.Tensor | None]:
        found = refit_rows(model, samples)
        return found, None if found is None else head.weight.detach().cpu()

    found, rows = on_main_process(refitted)
    if rows is not None:
        with torch.no_grad():
            head.weight.copy_(rows)
    return found
