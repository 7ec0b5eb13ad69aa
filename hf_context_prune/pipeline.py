"""`prune()`: wires the stages. Every stage is also a function of its own, and every noun between them a value."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from .allocation import Budget, adaptive_widths, removed_params, select_units, uniform_widths
from .architectures import (
    TARGETS,
    ArchSpec,
    Geometry,
    LayerWidths,
    Target,
    blocks,
    check_supported,
    output_projection,
    read_geometry,
    spec_of,
    unit_costs,
)
from .calibration import batches_of, calibrate, weights_of
from .config import PrunerConfig
from .criteria import get_criterion
from .data import TextSource, hold_out_documents, load_documents, token_blocks
from .errors import BudgetError, ConfigError, DataError
from .evaluation import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossFacts,
    MemoryFacts,
    SizeFacts,
    SpeedFacts,
    compare_losses,
    count_parameters,
    document_losses,
    measure_peak_memory,
    measure_speed,
    summarize_losses,
    weight_bytes,
)
from .loading import LoadedModel, load_model, load_outline
from .plan import LayerPlan, PruningPlan, fingerprint
from .reconstruction import NEEDS_GRAM, get_reconstruction
from .saving import REPORT_NAME, estimate_bytes, staged_folder, write_model_folder
from .sensitivity import measure_sensitivity
from .sequential import prune_sequentially
from .staging import resolve_target
from .stats import CalibrationStats, Key, Repair
from .surgery import StockFit, apply_plan, stock_fit

_LOGGER = logging.getLogger(__name__)

SENSITIVITY_BLOCKS = 8
"""Blocks of calibration text on which adaptive allocation measures the loss."""


@dataclass(frozen=True)
class EvalOptions:
    """How much is measured; the figures always come from text that was not used to calibrate.

    Attributes:
        max_tokens: Held-out tokens at most, whole documents; None takes all.
        speed: Measure prefill and decode speed of base and pruned, interleaved.
        memory: Measure peak memory in fresh processes when the result is saved.
    """

    max_tokens: int | None = 20_000
    speed: bool = True
    memory: bool = True


@dataclass
class PruneResult:
    """A pruned model with what was done and what it cost.

    Attributes:
        model: The smaller model, in evaluation mode.
        tokenizer: The base's tokenizer, unchanged.
        plan: What was kept, with provenance.
        report: Base against pruned on held-out text.
        stock: Whether the stock architecture holds it, and why or why not.
        base: Where the dense model came from, if `prune` loaded it.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: PruningPlan
    report: EvalReport
    stock: StockFit
    base: LoadedModel | None = None

    def save_pretrained(self, directory: str | Path, *, measure_memory: bool = False) -> Path:
        """Write model, tokenizer, plan and report to a folder, whole or not at all.

        Args:
            directory: Absent, empty, or an older folder of ours, which is replaced.
            measure_memory: Also load base and pruned in fresh processes, for the report's peak memory.

        Returns:
            The absolute path.

        Raises:
            SaveError: Nothing was put in place; an older folder is as it was.
        """
        target = resolve_target(directory)
        with staged_folder(target, required_bytes=estimate_bytes(self.model)) as staging:
            write_model_folder(staging, self.model, tokenizer=self.tokenizer, plan=self.plan)
            self.report = self._with_footprint(staging, measure_memory=measure_memory)
            self.report.save(staging / REPORT_NAME)
        return target

    def _with_footprint(self, folder: Path, *, measure_memory: bool) -> EvalReport:
        base_folder = self.base.folder if self.base else None
        size = replace(
            self.report.size,
            base_weight_bytes=weight_bytes(base_folder) if base_folder else None,
            pruned_weight_bytes=weight_bytes(folder),
        )
        memory = self.report.memory
        if measure_memory:
            memory = MemoryFacts(
                base=measure_peak_memory(base_folder) if base_folder else None, pruned=measure_peak_memory(folder)
            )
        return replace(self.report, size=size, memory=memory)


def needed_statistics(config: PrunerConfig) -> frozenset[str]:
    """Which optional statistics a config's criterion and reconstruction read."""
    needs = set(get_criterion(config.criterion).needs)
    if config.reconstruction in NEEDS_GRAM or config.reconstruction == "sequential":
        needs.add("gram")
    return frozenset(needs)


def needed_targets(config: PrunerConfig) -> tuple[Target, ...]:
    """Which units a config may remove."""
    total = config.pruning_ratio is not None or config.target_params is not None
    if config.allocation == "adaptive" and total and config.mlp_ratio is None and config.attention_ratio is None:
        return TARGETS
    wanted: dict[Target, bool] = {
        "mlp": bool(config.mlp_ratio) or (total and config.mlp_ratio is None),
        "attention": bool(config.attention_ratio) or (total and config.mlp_ratio is not None),
    }
    return tuple(target for target in TARGETS if wanted[target])


def score_units(
    model: PreTrainedModel, stats: CalibrationStats, criterion: str, *, seed: int = 0
) -> dict[Key, torch.Tensor]:
    """Importance of every unit that the statistics cover.

    Args:
        model: The dense model.
        stats: From [`calibrate`][], with what the criterion needs.
        criterion: A name of `CRITERIA`.
        seed: For the `random` criterion.

    Returns:
        [units] float64 on the CPU, by (layer, target); higher is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    function = get_criterion(criterion).function
    return {
        (layer, target): function(weights_of(model, layer, target).cpu(), statistics, generator)  # type: ignore[arg-type]
        for (layer, target), statistics in stats.targets.items()
    }


def repair_with(stats: CalibrationStats, config: PrunerConfig) -> Repair:
    """The reconstruction of a config, as `apply_plan` calls it."""
    # Where widths are measured for a walk to come, its one-shot kin stands in.
    function = get_reconstruction("least_squares" if config.reconstruction == "sequential" else config.reconstruction)

    def repair(
        layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        new_weight, new_bias = function(
            weight.cpu(), None if bias is None else bias.cpu(), kept, stats.targets[layer, target], config.ridge
        )
        return new_weight.to(weight.device), None if new_bias is None else new_bias.to(weight.device)

    return repair


def plan_widths(model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
    """Uniform widths for a budget, from shapes alone (the weights may be on the meta device).

    Raises:
        BudgetError: It can't be reached, or `stock` rules every choice out.
    """
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    budget = Budget.of(config, count_parameters(model))
    costs = unit_costs(model, spec, geometry)
    stock_groups: list[int] = []
    if config.stock:
        stock_groups = _stock_groups(model, spec, geometry)
    widths = uniform_widths(geometry, costs, budget, config, stock_groups=stock_groups)
    if config.stock and not (fit := stock_fit(model.config, spec, widths)).fits:
        raise BudgetError(f"No such widths stay stock: {fit.reason}. Leave out --stock, or ask for another ratio.")
    return widths


def _stock_groups(model: PreTrainedModel, spec: ArchSpec, geometry: Geometry) -> list[int]:
    """KV groups a layer that the stock architecture accepts, all layers alike."""
    first = geometry.layers[0]
    return [
        groups
        for groups in range(1, first.kv_groups + 1)
        if stock_fit(model.config, spec, [LayerWidths(first.neurons, groups)] * len(geometry.layers)).fits
    ]


def _adaptive(
    model: PreTrainedModel,
    importance: Mapping[Key, torch.Tensor],
    stats: CalibrationStats,
    config: PrunerConfig,
    samples: torch.Tensor,
) -> tuple[LayerWidths, ...]:
    spec = spec_of(model.config)
    geometry, targets = read_geometry(model.config, spec), needed_targets(config)
    costs = unit_costs(model, spec, geometry)
    budget = Budget.of(config, count_parameters(model))
    curves = measure_sensitivity(
        model, importance, repair_with(stats, config), samples[:SENSITIVITY_BLOCKS], targets=targets
    )
    if budget.remove_params is not None and config.mlp_ratio is None and config.attention_ratio is None:
        return adaptive_widths(curves, geometry, costs, budget.remove_params, round_to=config.round_to)
    # Each unit has a budget of its own: what the same options would remove with uniform widths.
    uniform = uniform_widths(geometry, costs, budget, config)
    widths = geometry.layers
    for target in targets:
        own = {key: curve for key, curve in curves.items() if key[1] == target}
        share = [
            LayerWidths(u.neurons, d.kv_groups) if target == "mlp" else LayerWidths(d.neurons, u.kv_groups)
            for u, d in zip(uniform, geometry.layers, strict=True)
        ]
        remove = removed_params(geometry.layers, share, costs)
        part = adaptive_widths(own, geometry, costs, remove, round_to=config.round_to)
        widths = tuple(
            LayerWidths(p.neurons, w.kv_groups) if target == "mlp" else LayerWidths(w.neurons, p.kv_groups)
            for p, w in zip(part, widths, strict=True)
        )
    return widths


def make_plan(
    model: PreTrainedModel,
    stats: CalibrationStats,
    config: PrunerConfig,
    *,
    samples: torch.Tensor | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Score, allocate and select: statistics -> plan.

    Args:
        model: The dense model.
        stats: With what [`needed_statistics`][] names, for [`needed_targets`][].
        config: Budget, criterion, allocation.
        samples: Token blocks for adaptive allocation, [blocks, length], int64.
        provenance: Goes into the plan, beside the config and versions.

    Raises:
        BudgetError: The budget can't be reached.
        ConfigError: Adaptive allocation without samples.
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    if config.allocation == "adaptive":
        if samples is None:
            raise ConfigError("allocation='adaptive' measures losses; pass samples=token_blocks(...).")
        importance = score_units(model, stats, config.criterion, seed=config.pruning_seed)
        widths = _adaptive(model, importance, stats, config, samples)
    else:
        widths = plan_widths(model, config)
        importance = score_units(model, stats, config.criterion, seed=config.pruning_seed)
    layers = select_units(importance, geometry, widths)
    return _plan_of(model, layers, config, stats.num_samples, stats.num_tokens, provenance)


def plan_and_repair(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: PrunerConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[PruningPlan, Repair]:
    """Token blocks -> the plan, and the repair that goes with it: what [`apply_plan`][] takes.

    Args:
        model: The dense model.
        samples: [blocks, length], int64.
        config: All choices.
        provenance: Goes into the plan, beside the config and versions.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    batches, targets = batches_of(samples), needed_targets(config)
    if config.reconstruction != "sequential" or config.allocation == "adaptive":
        stats = calibrate(model, batches, targets=targets, statistics=needed_statistics(config))
        plan = make_plan(model, stats, config, samples=samples, provenance=provenance)
        if config.reconstruction != "sequential":
            return plan, repair_with(stats, config)
        widths = plan.widths  # measured with one-shot repairs; the walk chooses the units anew
        del stats
    else:
        widths = plan_widths(model, config)
    walk = prune_sequentially(
        model, batches, widths, get_criterion(config.criterion), ridge=config.ridge, seed=config.pruning_seed
    )
    return _plan_of(model, walk.layers, config, walk.num_samples, walk.num_tokens, provenance), walk.repair


def _plan_of(
    model: PreTrainedModel,
    layers: tuple[LayerPlan, ...],
    config: PrunerConfig,
    num_samples: int,
    num_tokens: int,
    provenance: Mapping[str, Any] | None,
) -> PruningPlan:
    spec = spec_of(model.config)
    return PruningPlan(
        model_type=spec.model_type,
        dense=read_geometry(model.config, spec).layers,
        layers=layers,
        model_fingerprint=fingerprint(model),
        provenance={
            **(provenance or {}),
            "config": config.to_dict(),
            "num_calibration_samples": num_samples,
            "num_calibration_tokens": num_tokens,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        },
    )


def _check_saves(model: PreTrainedModel, spec: ArchSpec, config: PrunerConfig) -> None:
    """Refuse, before the long work, a result that could not be saved."""
    if config.reconstruction != "bias":
        return
    for target in needed_targets(config):
        if output_projection(blocks(model, spec)[0], spec, target).bias is None:
            raise ConfigError(
                f"reconstruction='bias' adds biases that a {spec.model_type} model has no field for, so the result "
                f"can't be saved. Use reconstruction='least_squares' (better at the same size) or 'none'; 'bias' is "
                f"for measuring in memory, through Python's prune()."
            )


def prune(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    config: PrunerConfig | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    eval_data: Any = None,  # noqa: ANN401
    evaluation: EvalOptions | None = None,
    will_save: bool = False,
) -> PruneResult:
    """Prune a causal LM for the domain of a text, and measure on held-out text what it cost.

    Args:
        model: A `PreTrainedModel` (left as it is), or what [`load_model`][] reads.
        data: Text of the domain: what [`load_documents`][] reads.
        config: What to remove and how; by default 20 % of all parameters.
        tokenizer: The model's tokenizer; by default loaded from where the model came from.
        eval_data: Text for the figures, never used to calibrate. None holds out a tenth of `data`, by document.
        evaluation: How much is measured.
        will_save: Refuse up front what can't be saved.

    Returns:
        The smaller model with plan and report. Same inputs and seed give the same plan.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`; nothing was changed or written.
    """
    config = config or PrunerConfig()
    options = evaluation or EvalOptions()
    base = _as_loaded(model, tokenizer)
    spec = check_supported(base.model)
    if config.allocation == "uniform":
        plan_widths(base.model, config)  # an unreachable budget is refused before the long work
    if will_save:
        _check_saves(base.model, spec, config)
    text, held_out, how = _split(data, eval_data, config, base.tokenizer)
    samples = token_blocks(
        text,
        base.tokenizer,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
    )
    losses = {"max_seq_length": config.max_seq_length, "max_tokens": options.max_tokens}
    base_losses = document_losses(base.model, base.tokenizer, held_out, **losses)  # type: ignore[arg-type]
    provenance = {
        "base_model": base.name,
        "base_revision": base.revision,
        "data": {"name": text.name, "revision": text.revision, "fingerprint": text.fingerprint},
    }
    plan, repair = plan_and_repair(base.model, samples, config, provenance=provenance)
    smaller = apply_plan(base.model, plan, repair=repair).eval()
    del repair  # and the statistics with it
    gc.collect()
    pruned_losses = document_losses(smaller, base.tokenizer, held_out, **losses)  # type: ignore[arg-type]
    speed = measure_speed({"base": base.model, "pruned": smaller}) if options.speed else None
    budget = Budget.of(config, count_parameters(base.model))
    stock = stock_fit(base.model.config, spec, plan.widths)
    report = EvalReport(
        base_model=base.name,
        dataset=DatasetFacts(held_out.name, held_out.revision, held_out.fingerprint, how),
        size=SizeFacts.measured(
            count_parameters(base.model), count_parameters(smaller), asked_ratio=budget.asked_ratio
        ),
        loss=LossFacts(
            base=summarize_losses(base_losses, seed=config.pruning_seed),
            pruned=summarize_losses(pruned_losses, seed=config.pruning_seed),
            comparison=compare_losses(base_losses, pruned_losses, seed=config.pruning_seed),
        ),
        environment=Environment.current(str(smaller.dtype).removeprefix("torch.")),
        speed=SpeedFacts(speed["base"], speed["pruned"]) if speed else None,
        notes=(
            f"Calibrated on {plan.provenance['num_calibration_tokens']:,} tokens of {text.name}.",
            f"Saved as {type(smaller).__name__}: {stock.reason}.",
        ),
    )
    from_disk = base if base.folder is not None else None
    return PruneResult(smaller, base.tokenizer, plan, report, stock, from_disk)


@dataclass(frozen=True)
class Outline:
    """What a budget comes to, from shapes alone.

    Attributes:
        base_parameters: Parameters of the model as it is, tied ones once.
        pruned_parameters: Parameters after pruning.
        asked_ratio: Share of all parameters that was asked for, if one was.
        dense: Widths as they are, one a layer.
        widths: Widths after pruning, one a layer.
        stock: Whether the stock architecture holds them, and why or why not.
    """

    base_parameters: int
    pruned_parameters: int
    asked_ratio: float | None
    dense: tuple[LayerWidths, ...]
    widths: tuple[LayerWidths, ...]
    stock: StockFit

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def dry_run(model: str | Path, config: PrunerConfig, *, revision: str | None = None) -> Outline:
    """Work out the sizes of uniform widths without reading a weight.

    Args:
        model: A model folder, .gguf file or Hub id.
        config: The budget.
        revision: Branch, tag or commit of the Hub model.

    Raises:
        ContextPruneError: The model is unknown or the budget can't be reached.
    """
    empty = load_outline(model, revision=revision)
    spec = spec_of(empty.config)
    geometry = read_geometry(empty.config, spec)
    widths = plan_widths(empty, config)
    total = count_parameters(empty)
    removed = removed_params(geometry.layers, widths, unit_costs(empty, spec, geometry))
    return Outline(
        base_parameters=total,
        pruned_parameters=total - removed,
        asked_ratio=Budget.of(config, total).asked_ratio,
        dense=geometry.layers,
        widths=widths,
        stock=stock_fit(empty.config, spec, widths),
    )


def _as_loaded(model: PreTrainedModel | LoadedModel | str | Path, tokenizer: Any) -> LoadedModel:  # noqa: ANN401
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load_model(model)
    check_supported(model)
    name = model.config.name_or_path
    if tokenizer is None:
        if not name:
            raise ConfigError("The model does not say where it came from; pass its tokenizer: prune(..., tokenizer=).")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be loaded from {name!r}, where the model came from ({error}). Pass it: "
                f"prune(..., tokenizer=)."
            ) from error
    return LoadedModel(model, tokenizer, Path(name).name if Path(name).is_dir() else name or "in-memory", None, None)


def _split(data: Any, eval_data: Any, config: PrunerConfig, tokenizer: Any) -> tuple[TextSource, TextSource, str]:  # noqa: ANN401
    """Calibration text, evaluation text, and a sentence on how they were kept apart."""
    options = {"text_column": config.text_column, "tokenizer": tokenizer, "seed": config.pruning_seed}
    text = load_documents(data, **options)
    if eval_data is None:
        rest, held_out = hold_out_documents(text, seed=config.pruning_seed)
        count = f"{len(held_out):,} of {len(text):,} documents"
        return rest, held_out, f"{count} of {text.name} were held out before calibration, by document."
    given = load_documents(eval_data, **options)
    seen = {document.text for document in text.documents}
    new = [document for document in given.documents if document.text not in seen]
    if not new:
        raise DataError(
            f"Every document of the evaluation text {given.name} is also in the calibration text {text.name}; figures "
            f"on it would say nothing. Give other text, or leave --eval-data out to hold out documents of {text.name}."
        )
    how = f"Text of its own ({given.name}), beside the calibration text {text.name}."
    if len(new) == len(given):
        return text, given, how
    how += (
        f" {len(given) - len(new):,} of its {len(given):,} documents were dropped: the calibration text has them too."
    )
    return text, TextSource.from_documents(new, name=given.name, revision=given.revision), how


def evaluate(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    *,
    tokenizer: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    options: EvalOptions | None = None,
) -> EvalReport:
    """Measure one model on text: bits per byte and perplexity, size and speed.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        data: What [`load_documents`][] reads; whether the model saw it before, only the caller knows.
        tokenizer: As for [`prune`][].
        text_column: Column with the text.
        max_seq_length: Tokens a window.
        seed: Of the bootstrap and of the choice of documents.
        options: How much is measured.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    options = options or EvalOptions()
    base = _as_loaded(model, tokenizer)
    text = load_documents(data, text_column=text_column, tokenizer=base.tokenizer, seed=seed)
    losses = document_losses(
        base.model, base.tokenizer, text, max_seq_length=max_seq_length, max_tokens=options.max_tokens
    )
    speed = measure_speed({"base": base.model}) if options.speed else None
    on_disk = base.folder is not None
    return EvalReport(
        base_model=base.name,
        dataset=DatasetFacts(text.name, text.revision, text.fingerprint, "The text that was given, as it is."),
        size=SizeFacts.measured(
            count_parameters(base.model), base_weight_bytes=weight_bytes(base.folder) if base.folder else None
        ),
        loss=LossFacts(base=summarize_losses(losses, seed=seed)),
        environment=Environment.current(str(base.model.dtype).removeprefix("torch.")),
        speed=SpeedFacts(speed["base"]) if speed else None,
        memory=MemoryFacts(base=measure_peak_memory(base.folder)) if on_disk and options.memory else None,  # type: ignore[arg-type]
    )
