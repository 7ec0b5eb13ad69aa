"""The sizes that a budget leads to, and what the run takes, from shapes alone: no weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, ConfigError, SaveError
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.modeling.expert_neurons import inner_widths
from hf_context_prune.modeling.experts import experts_spec
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.native_fit import NativeFit, assess_native_fit
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.widths import (
    check_round_to,
    check_shared_budget,
    check_units_budget,
    plan_widths_beside_vocabulary,
)
from hf_context_prune.pruning.available_units import let_experts_give
from hf_context_prune.pruning.check_budget import without_fixed_sizes
from hf_context_prune.pruning.depth import deepest, name_share_of_layers, rest_of_budget, stand_in
from hf_context_prune.pruning.experts import (
    count_experts,
    count_neurons,
    name_experts,
    rest_of_experts_budget,
    without_experts_shape,
)
from hf_context_prune.pruning.planner import check_reconstruction
from hf_context_prune.pruning.unused_options import warn_of_unused_options
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.gguf import conversion_bytes
from hf_context_prune.storage.loading import LoadedModel, load_meta_model, local_path
from hf_context_prune.storage.staging import resolve_target
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.utils.memory import memory_limit, parse_bytes

from .durations import estimate_seconds
from .images import keep_image_tokens, parameters_beside, take_text_only
from .needs import Needs, estimate_needs


@dataclass(frozen=True)
class DryRun:
    """The sizes that a budget leads to, from shapes alone.

    Attributes:
        base_parameters: Parameters of the base model, tied ones counted once.
        pruned_parameters: Parameters after pruning; what is measured may remove up to one step more.
        asked_ratio: Share of all parameters to remove, if the config has one.
        removed_layers: Layers that are removed as a whole, of which it is measured which; None where their number is,
            too.
        experts: Experts that stay in every layer that has them, and how many there are; None where all stay.
        inside_experts: Neurons of every expert that stay, and how many there are; the same of a shared expert (0 and 0
            where there is none); None where all stay.
        dense: Widths of the base model, one per layer that stays.
        widths: Widths after pruning, one per layer that stays; None for adaptive widths, which are measured.
        dense_tokens: Embedding rows of the base model.
        tokens: Embedding rows after pruning; all of them where their number is measured.
        native_fit: Whether the native architecture holds the widths, and why or why not.
        needs: Memory and disk that the run needs.
        conversion_disk: Bytes that the converted copy of a GGUF file will take in the cache; 0: none is made.
        missing_memory: Why this machine would refuse the run; None if it fits.
        missing_disk: Why a disk would refuse the run; None if all has room, or no output was named.
        seconds: Time of each long step, as [`estimate_seconds`][] estimates it.
    """

    base_parameters: int
    pruned_parameters: int
    asked_ratio: float | None
    removed_layers: int | None
    experts: tuple[int, int] | None
    inside_experts: tuple[tuple[int, int], tuple[int, int]] | None
    dense: tuple[LayerWidths, ...]
    widths: tuple[LayerWidths, ...] | None
    dense_tokens: int
    tokens: int
    native_fit: NativeFit
    needs: Needs
    conversion_disk: int
    missing_memory: str | None
    missing_disk: str | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values."""
        return asdict(self)


def dry_run(
    model: str | Path,
    config: PrunerConfig,
    *,
    eval_options: EvalOptions | None = None,
    recovery: RecoveryConfig | None = None,
    text_only: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    max_memory: int | str | None = None,
    output: str | Path | None = None,
) -> DryRun:
    """Work out the sizes without reading a weight; products of a layer's size are timed.

    Args:
        model: A model folder, .gguf file or Hub id.
        config: The budget.
        eval_options: How much is measured.
        recovery: The training after it.
        text_only: As for [`prune`][].
        revision: Branch, tag or commit of the Hub model.
        dtype: Floating-point type to load the weights in.
        max_memory: As for [`prune`][].
        output: The folder that would be written, whose disk is looked at.

    Raises:
        ConfigError: The size is found by measuring, or the limit is no size.
        ContextPruneError: The model is unknown, can't have or save the reconstruction, or the budget can't be reached.
    """
    limit = parse_bytes(max_memory)
    if config.max_loss_increase is not None:
        raise ConfigError(
            "--dry-run works from shapes alone, but the size for --max-loss-increase is found by measuring; use "
            "--pruning-ratio with it."
        )
    if config.fixes_tokens and config.vocab_size is None:
        raise ConfigError(
            "--dry-run works from shapes alone, but vocabulary entries are counted on text; give a number for "
            "--vocab-size."
        )
    whole = load_meta_model(model, dtype=dtype, revision=revision, whole=True)
    loaded = LoadedModel.of(whole, None, str(model), None, None)
    loaded = take_text_only(loaded) if text_only else loaded
    config, empty = keep_image_tokens(loaded, config)[0], loaded.model  # type: ignore[assignment]
    check_reconstruction(empty, config)
    config = let_experts_give(empty, config, partial(_check_beside_experts, empty))
    total, rows = empty.num_parameters(), num_rows(empty)
    budget, kept = ParameterBudget.of(config, total), rows
    if config.vocab_size is not None:
        if config.vocab_size > rows:
            raise BudgetError(f"vocab_size is {config.vocab_size:,}, but the model has only {rows:,} embedding rows.")
        size = VocabularySize(config.vocab_size, pad_to_multiple_of=config.pad_to_multiple_of)
        size.check_removes(rows)
        kept = min(size.round_up(config.vocab_size), rows)
    fewer, rest, experts = empty, config, max(widths.experts for widths in ModelView.of_shapes(empty).widths)
    if config.prunes_experts:
        fewer = without_experts_shape(empty, config)
        rest = rest_of_experts_budget(config, empty, fewer)
    depth = stand_in(fewer, rest)
    shorter, rest = (fewer, rest) if depth is None else (depth.shorten(fewer), rest_of_budget(rest, fewer, depth))
    view = ModelView.of_shapes(shorter)
    widths: tuple[LayerWidths, ...] | None = view.widths
    removed = (rows - kept) * token_cost(empty) + total - view.num_parameters
    warn_of_unused_options(config)
    if config.prunes_layers:
        check_round_to(view.widths, config)
    if (most := deepest(shorter, rest)) is not None:
        with name_share_of_layers(shorter, rest, most):
            _check_units(most.shorten(shorter), rest_of_budget(rest, shorter, most), kept)
        removed, widths = max(removed, budget.remove_params or 0), None
    elif rest.searches_tokens:
        _check_units(shorter, rest, kept)
        removed, widths = max(removed, budget.remove_params or 0), None
    elif rest.prunes_layers:
        gone = check_units_budget(shorter, rest, kept)
        removed += gone
        widths = None if rest.allocation == "adaptive" and gone else plan_widths_beside_vocabulary(shorter, rest, kept)
    needs = estimate_needs(empty, config, total - removed + parameters_beside(loaded), recovery)
    place = local_path(model)
    held = 0 if place is None else _converted_bytes(whole, place)
    conversion = 0 if place is None else conversion_bytes(place, whole.dtype)
    with memory_limit(limit):
        missing = replace(needs, step_memory=needs.step_memory + held).missing_memory()
        missing_disk = None if output is None else _missing_disk(needs, resolve_target(output), conversion)
    return DryRun(
        base_parameters=total,
        pruned_parameters=total - removed,
        asked_ratio=budget.asked_ratio,
        removed_layers=None if most is not None else 0 if depth is None else len(depth.order),
        experts=(count_experts(empty, config), experts) if config.removes_experts else None,
        inside_experts=_inside_experts(empty, config),
        dense=tuple(replace(w, experts=w.experts and experts) for w in view.widths),
        widths=widths,
        dense_tokens=rows,
        tokens=kept,
        native_fit=NativeFit(bool(config.native_architecture), f"{_measured(config)} are measured")
        if widths is None
        else assess_native_fit(shorter.config, view.spec, widths),
        needs=needs,
        conversion_disk=conversion,
        missing_memory=missing,
        missing_disk=missing_disk,
        seconds=estimate_seconds(empty, config, eval_options, recovery),
    )


def _converted_bytes(model: PreTrainedModel, folder: Path) -> int:
    """Return the bytes of memory that loading takes: none where the file is mapped, all in another type."""
    if folder.is_file() or model.dtype == (model.config.dtype or torch.float32):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters())


def _missing_disk(needs: Needs, output: Path, conversion: int) -> str | None:
    """Return why the disks of output, cache and temporary files would refuse a run; None if all has room."""
    try:
        replace(needs, resume_disk=needs.resume_disk + conversion).check_disk(output, cache_dir())
    except SaveError as error:
        return str(error)
    return None


def _inside_experts(model: PreTrainedModel, config: PrunerConfig) -> tuple[tuple[int, int], tuple[int, int]] | None:
    if not config.narrows_experts:
        return None
    kept, shared = count_neurons(model, config)
    dense, dense_shared = inner_widths(model.config, experts_spec(ModelView.of_shapes(model).spec))
    return (kept, dense), (shared, dense_shared)


def _check_beside_experts(model: PreTrainedModel, config: PrunerConfig) -> None:
    """Refuse a budget that the other units can't give beside what a config gives a size of its own."""
    (fewer, rest), rows = without_fixed_sizes(model, config), num_rows(model)
    size = VocabularySize(pad_to_multiple_of=config.pad_to_multiple_of)
    _check_units(fewer, rest, rows if config.vocab_size is None else min(rows, size.round_up(config.vocab_size)))


def _check_units(model: PreTrainedModel, config: PrunerConfig, tokens: int) -> None:
    """Refuse a budget that tokens, neurons and KV groups can't give, from shapes alone."""
    with name_experts(model):
        if config.searches_tokens:
            check_shared_budget(model, config, fewest_tokens=1)  # how many must stay, the tokenizer knows
        elif config.prunes_layers:
            check_units_budget(model, config, tokens)


def _measured(config: PrunerConfig) -> str:
    units = {"tokens": config.searches_tokens, "layers": config.searches_layers, "widths": config.prunes_layers}
    *others, last = [name for name, searched in units.items() if searched]
    return f"{', '.join(others)} and {last}" if others else last
