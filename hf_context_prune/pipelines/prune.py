"""`prune`: text and a model -> a smaller model with plan and report. The stages are functions of their own."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig, ThresholdConfig
from hf_context_prune.data.documents import TextData
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.reports.report import EvalReport, SizeFacts
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.available_units import choose_units
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import (
    check_general_data_ratio,
    choose_general_share,
)
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.depth import stand_in
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.pruning.notes import plan_notes
from hf_context_prune.pruning.planner import check_reconstruction
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.unused_options import warn_of_low_thresholds, warn_of_unused_options
from hf_context_prune.storage.gguf import explain_gguf_sizes
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded, load_model
from hf_context_prune.storage.provenance import collect_provenance
from hf_context_prune.storage.resume import open_resume_folder
from hf_context_prune.storage.staging import check_target, resolve_target
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import check_recoverable, check_recovery_time
from hf_context_prune.training.recovery.text import RecoveryText
from hf_context_prune.utils.distributed import fail_together, is_main_process, on_main_process, warn_if_alone
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.memory import memory_limit, parse_bytes, reserve_memory
from hf_context_prune.utils.stages import Stages
from hf_context_prune.utils.tensor_facts import remember_weights

from .comparison import Comparison
from .durations import describe_seconds, estimate_seconds
from .example import write_example
from .images import images_note, keep_image_tokens, parameters_beside, saved_class, take_text_only
from .kept_model import load_or_prune
from .needs import estimate_needs
from .pruning_texts import AnyConfig, PruningTexts, read_texts
from .recover import train_back
from .result import PruneResult
from .validation_text import choose_token_probe, describe_size_search

_LOGGER = logging.getLogger(__name__)
_READING, _BASE, _PRUNING, _TRAINING, _RESULT = (
    "Reading the text",
    "Measuring the base model",
    "Pruning",
    "Training back",
    "Measuring the result",
)


@fail_together()
def prune(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: TextData,
    config: AnyConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_data: TextData | None = None,
    eval_options: EvalOptions | None = None,
    recovery: RecoveryConfig | None = None,
    text_only: bool = False,
    max_memory: int | str | None = None,
) -> PruneResult:
    """Prune a causal LM for the domain of a text, and measure on held-out text what it cost.

    Of a model of images and text, the text part is pruned, and saved in its model, whose other weights are unchanged.

    Under ``accelerate launch`` every process has to call it, with the same arguments. The processes share the
    calibration, and all return the same plan.

    Args:
        model: A `PreTrainedModel` (left as it is), or what [`load_model`][] reads.
        data: Text of the domain: what [`load_documents`][] reads.
        config: What to remove and how; by default 20 % of all parameters. A [`ThresholdConfig`][] runs the paper's
            protocol.
        tokenizer: The model's tokenizer; by default it is loaded from where the model came from.
        eval_data: Test text, never used to calibrate. None holds out a tenth of `data`, by document.
        eval_options: How much is measured.
        recovery: Train the pruned model back on the text that it was calibrated on, as [`recover`][] does, with the
            same share of general text. None leaves it as it is. Only in one process.
        text_only: Of a model of images and text, save the pruned text part alone, as a causal LM of its family.
        max_memory: Most memory that the process may hold beside the files that it reads, such as "8GiB"; what does not
            fit lies in files. None: what it holds now, and three quarters of what is free. It changes no result.

    Returns:
        The smaller model with plan and report. The same inputs and seed give the same plan.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`; nothing was changed or written.

    Example:
        ```python
        from hf_context_prune import PrunerConfig, prune

        result = prune("demo", ["First contract ...", "Second contract ..."], PrunerConfig(pruning_ratio=0.2))
        result.save_pretrained("mini-gpt")
        ```
    """
    return run_pruning(
        model,
        data,
        config,
        tokenizer=tokenizer,
        eval_data=eval_data,
        eval_options=eval_options,
        recovery=recovery,
        text_only=text_only,
        max_memory=max_memory,
    )


@fail_together()
@reserves("output")
def prune_to_folder(
    model: str | Path,
    data: TextData,
    output: str | Path,
    config: AnyConfig | None = None,
    *,
    eval_data: TextData | None = None,
    eval_options: EvalOptions | None = None,
    recovery: RecoveryConfig | None = None,
    text_only: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_memory: int | str | None = None,
) -> PruneResult:
    """Prune as [`prune`][] does, and write a model folder. The same call, after a kill, resumes to the same bits.

    A recovery goes on from the last time that its validation text was measured: to the same bits, too, unless it has a
    time limit; then the used time counts on, and its end depends on the clock, as without a kill. Until the folder is
    written, the cache keeps the pruned model and the state of its training, in at most 36 bytes per parameter.

    Args:
        model: A model folder, .gguf file or Hub id.
        data: Text of the domain.
        output: Folder to write: absent, empty, or an older folder of this package, which is replaced.
        config: As for [`prune`][].
        eval_data: As for [`prune`][].
        eval_options: As for [`prune`][]; `memory` measures base and pruned model in fresh processes.
        recovery: As for [`prune`][]. The folder then holds the recovered model, and card and report show all three.
        text_only: As for [`prune`][].
        revision: Branch, tag or commit of the Hub model.
        dtype: Floating-point type to load the weights in.
        device: As for [`load_model`][].
        max_memory: As for [`prune`][].

    Returns:
        The model with plan and report, as it was saved.

    Raises:
        SaveError: Another run is at work for this output.
        ContextPruneError: See `hf_context_prune.errors`; an older folder is as it was.

    Example:
        ```python
        from hf_context_prune import PrunerConfig, prune_to_folder

        result = prune_to_folder("demo", "contracts.jsonl", "mini-gpt", PrunerConfig(pruning_ratio=0.2))
        print(result.summary())
        ```
    """
    config, options, target = config or PrunerConfig(), eval_options or EvalOptions(), resolve_target(output)
    check_general_data_ratio(config, options.general_data)
    _check_recovery(recovery)
    limit = parse_bytes(max_memory)
    check_target(target)
    with memory_limit(limit):
        loaded = load_model(model, dtype=dtype, revision=revision, device=device)
    # Without `recovery`: what is pruned stays of use where the same command is given another time for it.
    identity = ("prune", target, model, revision, data, eval_data, config)
    with open_resume_folder(*identity) as resume_dir:
        result = run_pruning(
            loaded,
            data,
            config,
            eval_data=eval_data,
            eval_options=options,
            recovery=recovery,
            text_only=text_only,
            resume_dir=resume_dir,
            max_memory=limit,
            output=target,
        )
        on_main_process(lambda: result.save_pretrained(target, measure_memory=options.memory))
    return result.as_saved(target)


def run_pruning(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: TextData,
    config: AnyConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_data: TextData | None = None,
    eval_options: EvalOptions | None = None,
    recovery: RecoveryConfig | None = None,
    text_only: bool = False,
    resume_dir: Path | None = None,
    max_memory: int | str | None = None,
    output: Path | None = None,
) -> PruneResult:
    """Run all stages of [`prune`][]; with a `resume_dir`, finished work is kept there for the same run to resume.

    With an `output`, a run whose result has no room there is refused before it begins.
    """
    warn_if_alone()
    options = eval_options or EvalOptions()
    asked, config = config, _check_config(config, options)
    _check_recovery(recovery)
    limit = parse_bytes(max_memory)
    base = ensure_loaded(model, tokenizer)
    base = take_text_only(base) if text_only else base
    with memory_limit(limit), remember_weights(base.model):
        config, tokens_stay = _check_before_the_long_work(base, config, options)
        saved = _expected_parameters(base.model, config) + parameters_beside(base)
        needs = estimate_needs(base.model, config, saved, recovery)
        needs.check_memory()
        if output is not None and is_main_process():
            needs.check_disk(output, resume_dir)
        _LOGGER.info("%s", needs)
        _LOGGER.info("%s", describe_seconds(estimate_seconds(base.model, config, options, recovery)))
        with reserve_memory(needs.step_memory):
            return _run_stages(base, data, config, asked, tokens_stay, options, eval_data, recovery, resume_dir)


def _run_stages(
    base: LoadedModel,
    data: TextData,
    config: AnyConfig,
    asked: AnyConfig | None,
    tokens_stay: str | None,
    options: EvalOptions,
    eval_data: TextData | None,
    recovery: RecoveryConfig | None,
    resume_dir: Path | None,
) -> PruneResult:
    if recovery is not None:
        check_recoverable(base.model, recovery)
    warn_of_unused_options(config)
    training = () if recovery is None else (_TRAINING,)
    stages = Stages(_LOGGER, _READING, _BASE, _PRUNING, *training, _RESULT)
    stages.begin(_READING)
    config, texts, only_measured = read_texts(
        base,
        data,
        eval_data,
        config,
        options,
        by_default=asked is None or asked.general_data_ratio is None,
        recovers=recovery is not None,
    )
    if recovery is not None:
        shared, balances = texts.calibration.general_share, config.balance_sources
        text = RecoveryText.of(texts.split.calibration, base.tokenizer, recovery, *shared, balance_sources=balances)
        check_recovery_time(base.model, base.tokenizer, text, recovery)
    stages.begin(_BASE)
    comparison = Comparison.begin(
        base, texts.split, texts.general, options, max_seq_length=config.max_seq_length, seed=config.pruning_seed
    )
    stages.begin(_PRUNING)
    pruned = load_or_prune(
        None if recovery is None else resume_dir,
        base,
        (config.to_dict(), texts.identity()),
        lambda: _prune(base, texts, config, tokens_stay, resume_dir),
    )
    if isinstance(config, ThresholdConfig):
        warn_of_low_thresholds(config, pruned.plan, base.model.num_parameters() - pruned.model.num_parameters())
    gc.collect()
    notes = (*plan_notes(pruned.plan, texts.calibration), *only_measured, *explain_gguf_sizes(base), *images_note(base))
    recovered = None
    if recovery is not None:
        stages.begin(_TRAINING)
        shared = texts.calibration.general_share
        recovered, note = train_back(pruned, texts.split, recovery, *shared, resume_dir=resume_dir)
        notes = (*notes, note)
    stages.begin(_RESULT)
    fit = assess_native_fit(pruned.model.config, ModelView.of(base.model).spec, pruned.plan.kept_widths)
    report = _report(
        comparison,
        base,
        pruned,
        recovered,
        config,
        texts,
        (*notes, f"Saved as {saved_class(base, pruned.model)}: {fit.reason}."),
    )
    report = replace(report, example=write_example(*(recovered or pruned)) if options.example else None)
    stages.end()
    known = base if base.folder is not None else None
    return PruneResult(*(recovered or pruned), report, fit, known, None if base.wrapper is None else base)


def _prune(
    base: LoadedModel, texts: PruningTexts, config: AnyConfig, tokens_stay: str | None, resume_dir: Path | None
) -> PrunedModel:
    probe = None
    if isinstance(config, PrunerConfig):
        config, probe, single = choose_token_probe(base, texts.calibration, config)
        tokens_stay = tokens_stay or single
    return prune_model(
        base.model,
        base.tokenizer,
        texts.calibration,
        config,
        validation_loss=None if texts.validation is None else texts.validation.bits_per_byte,
        token_probe=probe,
        provenance={
            **collect_provenance(base),
            **texts.provenance(),
            **({"all_tokens_stay": tokens_stay} if tokens_stay else {}),
        },
        resume_dir=resume_dir,
    )


def _check_config(config: AnyConfig | None, options: EvalOptions) -> AnyConfig:
    """Refuse other types, and fill in the share of general text that a config leaves open."""
    if config is not None and not isinstance(config, CalibrationConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass PrunerConfig(...), ThresholdConfig(...) or "
            f"PrunerConfig.from_dict(...)."
        )
    config = config or PrunerConfig()
    if isinstance(config, PrunerConfig):
        return replace(config, general_data_ratio=choose_general_share(config, options.general_data))
    return config


def _check_recovery(recovery: object) -> None:
    if recovery is not None and not isinstance(recovery, RecoveryConfig):
        raise ConfigError(f"recovery is a {type(recovery).__name__}; pass RecoveryConfig(...), or None.")


def _check_before_the_long_work(
    base: LoadedModel, config: AnyConfig, options: EvalOptions
) -> tuple[AnyConfig, str | None]:
    """Check model and budget; returns the config with the units that the model allows, and why not all of them."""
    ModelView.of(base.model)
    check_weights_finite(base.model)
    if isinstance(config, PrunerConfig):
        check_reconstruction(base.model, config)
    config, tokens_stay = keep_image_tokens(base, config)
    if isinstance(config, PrunerConfig):
        config, of_tokenizer = choose_units(base.model, base.tokenizer, config)
        tokens_stay = tokens_stay or of_tokenizer
    check_budget(base.model, base.tokenizer, config)
    check_general_data_ratio(config, options.general_data)
    return config, tokens_stay


def _expected_parameters(model: PreTrainedModel, config: AnyConfig) -> int:
    """Return the parameters after pruning, where shapes alone say so; else those of the base."""
    total = model.num_parameters()
    if not isinstance(config, PrunerConfig):
        return total
    depth = stand_in(model, config)
    layers = 0 if depth is None else depth.count_parameters(model)
    return total - max(ParameterBudget.of(config, total).remove_params or 0, layers)


def _report(
    comparison: Comparison,
    base: LoadedModel,
    pruned: PrunedModel,
    recovered: PrunedModel | None,
    config: AnyConfig,
    texts: PruningTexts,
    notes: tuple[str, ...],
) -> EvalReport:
    total = base.model.num_parameters()
    search = None if texts.validation is None else describe_size_search(texts.validation, pruned.plan)
    asked = ParameterBudget.of(config, total).asked_ratio if isinstance(config, PrunerConfig) else None
    return comparison.report(
        SizeFacts.measured(total, pruned.model.num_parameters(), asked_ratio=asked),
        pruned=pruned[:2],
        recovered=None if recovered is None else recovered[:2],
        notes=(*((search.text,) if search else ()), *notes),
        search=search,
        predicted_excess=pruned.plan.provenance.get("predicted_loss_increase"),
    )
