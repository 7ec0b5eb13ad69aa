"""`prune()`: wires the stages. Every stage is also a function of its own, and every noun between them a value."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import apart_from_general, split_text
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.general_text import build_loss_facts, measure_general_losses, read_general
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import DatasetFacts, Environment, EvalReport, SizeFacts, SpeedFacts
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import check_general_data_ratio
from hf_context_prune.pruning.planner import check_reconstruction
from hf_context_prune.pruning.prune_model import check_budget, prune_model
from hf_context_prune.pruning.thresholds.prune import zeros_note
from hf_context_prune.pruning.vocabulary.notes import refit_note, vocabulary_note
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded
from hf_context_prune.storage.provenance import collect_provenance
from hf_context_prune.utils.distributed import fail_together, on_main_process, warn_if_alone

from .result import PruneResult
from .validation_text import ValidationText


def plan_notes(
    plan: PruningPlan, text: TextSource, config: PrunerConfig, general: TextSource | None = None
) -> tuple[str, ...]:
    """Sentences on how a plan came about, for a report.

    Args:
        plan: Made by the config.
        text: What was calibrated on.
        config: All choices.
        general: Text of no domain that was mixed in, if any.
    """
    calibrated: tuple[str, ...] = ()
    if config.prunes_units:
        mixed = f", a share of {config.general_data_ratio:g} of {general.name}" if general is not None else ""
        calibrated = (f"Calibrated on {plan.provenance['num_calibration_tokens']:,} tokens of {text.name}{mixed}.",)
    return (*vocabulary_note(plan, text), *refit_note(plan), *zeros_note(plan), *calibrated)


@fail_together()
def prune(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    config: PrunerConfig | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    eval_data: Any = None,  # noqa: ANN401
    evaluation: EvalOptions | None = None,
    will_save: bool = False,
    resume_dir: Path | None = None,
) -> PruneResult:
    """Prune a causal LM for the domain of a text, and measure on held-out text what it cost.

    Under ``accelerate launch`` every process has to call it, with the same arguments. They share the calibration, and
    all return the same plan.

    Args:
        model: A `PreTrainedModel` (left as it is), or what [`load_model`][] reads.
        data: Text of the domain: what [`load_documents`][] reads.
        config: What to remove and how; by default 20 % of all parameters.
        tokenizer: The model's tokenizer; by default loaded from where the model came from.
        eval_data: Text for the figures, never used to calibrate. None holds out a tenth of `data`, by document.
        evaluation: How much is measured.
        will_save: Refuse up front what can't be saved.
        resume_dir: Where the sequential walk keeps its finished blocks; the same call, after a kill, goes on from there
            to the same bits. The caller removes it. None keeps nothing.

    Returns:
        The smaller model with plan and report. Same inputs and seed give the same plan.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`; nothing was changed or written.
    """
    if config is not None and not isinstance(config, PrunerConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass PrunerConfig(...) or PrunerConfig.from_dict(...)."
        )
    warn_if_alone()
    config = config or PrunerConfig()
    options = evaluation or EvalOptions()
    base = ensure_loaded(model, tokenizer)
    spec = check_supported(base.model)
    check_weights_finite(base.model)
    check_reconstruction(base.model, config, will_save=will_save)  # before the long work
    check_budget(base.model, base.tokenizer, config)
    check_general_data_ratio(config, options.general_data)
    text, held_out, how = split_text(data, eval_data, config, base.tokenizer)
    general = read_general(
        options.general_data,
        apart_from=text,
        tokenizer=base.tokenizer,
        seed=config.pruning_seed,
        hold_out=config.general_data_ratio > 0,
    )
    mixed_in = None if general is None else general.calibration
    if mixed_in is not None:
        held_out, how = apart_from_general(held_out, how, mixed_in)
    search = None
    if config.max_loss_increase is not None:
        text, search = ValidationText.withheld_from(text, base.tokenizer, config, general=mixed_in)
    length = config.max_seq_length
    base_losses = document_losses(
        base.model, base.tokenizer, held_out, max_seq_length=length, max_tokens=options.max_tokens
    )
    provenance = {
        **collect_provenance(base),
        "data": text.identity,
    }
    if search is not None:
        provenance["search_data"] = {"name": search.text.name, "fingerprint": search.text.fingerprint}
    if general is not None and mixed_in is not None:
        provenance["general_data"] = general.whole
    smaller, tokenizer, plan = prune_model(
        base.model,
        base.tokenizer,
        text,
        config,
        general=mixed_in,
        search=search,
        provenance=provenance,
        resume_dir=resume_dir,
    )
    gc.collect()
    # The same documents, whatever number of tokens they are for another tokenizer.
    pruned_losses = document_losses(
        smaller, tokenizer, held_out, max_seq_length=length, docs=[loss.doc for loss in base_losses]
    )
    general_facts = measure_general_losses(
        general,
        (base.model, base.tokenizer),
        pruned=(smaller, tokenizer),
        max_seq_length=length,
        max_tokens=options.max_tokens,
        seed=config.pruning_seed,
    )
    speed = None
    if options.speed:  # in one process: several would slow each other down
        speed = on_main_process(lambda: measure_speed({"base": base.model, "pruned": smaller}))
    budget = ParameterBudget.of(config, base.model.num_parameters())
    found = None if search is None else search.budget(plan)
    fit = assess_native_fit(smaller.config, spec, plan.widths)
    report = EvalReport(
        base_model=base.name,
        dataset=DatasetFacts(held_out.name, held_out.revision, held_out.fingerprint, how),
        size=SizeFacts.measured(base.model.num_parameters(), smaller.num_parameters(), asked_ratio=budget.asked_ratio),
        loss=replace(
            build_loss_facts(base_losses, {"pruned": pruned_losses}, seed=config.pruning_seed),
            predicted_excess=plan.provenance.get("predicted_loss_increase"),
        ),
        environment=Environment.current(str(smaller.dtype).removeprefix("torch.")),
        speed=SpeedFacts(speed["base"], speed["pruned"]) if speed else None,
        budget=found,
        general=general_facts,
        notes=(
            *((found.text,) if found else ()),
            *plan_notes(plan, text, config, mixed_in),
            f"Saved as {type(smaller).__name__}: {fit.reason}.",
        ),
    )
    from_disk = base if base.folder is not None else None
    return PruneResult(smaller, tokenizer, plan, report, fit, from_disk)
