"""`prune`: text and a model -> a smaller model with plan and report. The stages are functions of their own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig, ThresholdConfig
from hf_context_prune.data.documents import TextData
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.general_text import GeneralText, build_loss_facts, measure_general_losses, read_general
from hf_context_prune.evaluation.losses import DocumentLoss
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import DatasetFacts, Environment, EvalReport, SizeFacts, SpeedFacts
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.modeling.native_fit import NativeFit, assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import CalibrationSet, check_general_data_ratio
from hf_context_prune.pruning.planner import check_reconstruction
from hf_context_prune.pruning.prune_model import PrunedModel, check_budget, prune_model
from hf_context_prune.pruning.thresholds.prune import zeros_note
from hf_context_prune.pruning.unused_options import warn_of_low_thresholds, warn_of_unused_options
from hf_context_prune.pruning.vocabulary.notes import refit_note, vocabulary_note
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded, load_model
from hf_context_prune.storage.provenance import collect_provenance
from hf_context_prune.storage.resume import open_resume_folder
from hf_context_prune.storage.staging import check_target, resolve_target
from hf_context_prune.utils.distributed import fail_together, on_main_process, warn_if_alone
from hf_context_prune.utils.locks import reserves

from .result import PruneResult
from .validation_text import describe_size_search, withhold_size_text, withhold_vocabulary_probe

AnyConfig = PrunerConfig | ThresholdConfig


@fail_together()
def prune(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: TextData,
    config: AnyConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_data: TextData | None = None,
    eval_options: EvalOptions | None = None,
) -> PruneResult:
    """Prune a causal LM for the domain of a text, and measure on held-out text what it cost.

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

    Returns:
        The smaller model with plan and report. The same inputs and seed give the same plan.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`; nothing was changed or written.
    """
    return run_pruning(model, data, config, tokenizer=tokenizer, eval_data=eval_data, eval_options=eval_options)


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
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> PruneResult:
    """Prune as [`prune`][] does, and write a model folder. The same call, after a kill, resumes to the same bits.

    Args:
        model: A model folder, .gguf file or Hub id.
        data: Text of the domain.
        output: Folder to write: absent, empty, or an older folder of this package, which is replaced.
        config: As for [`prune`][].
        eval_data: As for [`prune`][].
        eval_options: As for [`prune`][]; `memory` measures base and pruned model in fresh processes.
        revision: Branch, tag or commit of the Hub model.
        dtype: Floating-point type to load the weights in.
        device: As for [`load_model`][].

    Raises:
        SaveError: Another run is at work for this output.
        ContextPruneError: See `hf_context_prune.errors`; an older folder is as it was.
    """
    config, options, target = config or PrunerConfig(), eval_options or EvalOptions(), resolve_target(output)
    check_general_data_ratio(config, options.general_data)
    check_target(target)
    loaded = load_model(model, dtype=dtype, revision=revision, device=device)
    identity = ("prune", target, model, revision, data, eval_data, config)
    with open_resume_folder(*identity) as resume_dir:
        result = run_pruning(loaded, data, config, eval_data=eval_data, eval_options=options, resume_dir=resume_dir)
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
    resume_dir: Path | None = None,
) -> PruneResult:
    """Run all stages of [`prune`][]; with a `resume_dir`, finished layers are kept there for the same run to resume."""
    warn_if_alone()
    config, options = _check_config(config), eval_options or EvalOptions()
    base = ensure_loaded(model, tokenizer)
    _check_before_the_long_work(base, config, options)
    warn_of_unused_options(config)
    texts = _Texts.read(base, data, eval_data, config, options)
    base_losses = texts.measure(base.model, base.tokenizer, max_tokens=options.max_tokens)
    probe = None
    if isinstance(config, PrunerConfig) and config.vocab_size == "auto":
        probe = withhold_vocabulary_probe(base.model, base.tokenizer, texts.calibration.domain, config)
    pruned = prune_model(
        base.model,
        base.tokenizer,
        texts.calibration,
        config,
        validation_loss=None if texts.validation is None else texts.validation.bits_per_byte,
        vocabulary_probe=probe,
        provenance={**collect_provenance(base), **texts.provenance()},
        resume_dir=resume_dir,
    )
    if isinstance(config, ThresholdConfig):
        warn_of_low_thresholds(config, pruned.plan, base.model.num_parameters() - pruned.model.num_parameters())
    gc.collect()
    fit = assess_native_fit(pruned.model.config, ModelView.of(base.model).spec, pruned.plan.widths)
    report = _measure(base, pruned, config, options, texts, base_losses, fit)
    return PruneResult(*pruned, report, fit, base if base.folder is not None else None)


def _check_config(config: AnyConfig | None) -> AnyConfig:
    if config is not None and not isinstance(config, CalibrationConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass PrunerConfig(...), ThresholdConfig(...) or "
            f"PrunerConfig.from_dict(...)."
        )
    return config or PrunerConfig()


def _check_before_the_long_work(base: LoadedModel, config: AnyConfig, options: EvalOptions) -> None:
    ModelView.of(base.model)
    check_weights_finite(base.model)
    if isinstance(config, PrunerConfig):
        check_reconstruction(base.model, config)
    check_budget(base.model, base.tokenizer, config)
    check_general_data_ratio(config, options.general_data)


@dataclass(frozen=True)
class _Texts:
    """Everything that a run reads, kept apart by document.

    Attributes:
        split: Calibration and test text of the domain.
        calibration: What is calibrated on.
        validation: Text that the size is searched on, for `max_loss_increase`.
        general: Text of no domain, if it was given.
    """

    split: TextSplit
    calibration: CalibrationSet
    validation: ValidationText | None
    general: GeneralText | None

    @classmethod
    def read(
        cls, base: LoadedModel, data: TextData, eval_data: TextData | None, config: AnyConfig, options: EvalOptions
    ) -> _Texts:
        tokenizer, seed = base.tokenizer, config.pruning_seed
        split = TextSplit.of(data, eval_data, tokenizer=tokenizer, text_column=config.text_column, seed=seed)
        general = read_general(
            options.general_data,
            apart_from=split.calibration,
            test=split.test,
            tokenizer=tokenizer,
            seed=seed,
            hold_out=config.general_data_ratio > 0,
        )
        mixed_in = None if general is None else general.calibration
        if mixed_in is not None:
            split = split.without(mixed_in)
        text, validation = split.calibration, None
        if isinstance(config, PrunerConfig) and config.max_loss_increase is not None:
            text, validation = withhold_size_text(text, tokenizer, config, general=mixed_in)
        return cls(split, CalibrationSet(text, config, mixed_in), validation, general)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int | None = None,
        docs: Sequence[str] | None = None,
    ) -> list[DocumentLoss]:
        """Return the losses of a model on the test text."""
        length = self.calibration.config.max_seq_length
        return document_losses(
            model, tokenizer, self.split.test, max_seq_length=length, max_tokens=max_tokens, docs=docs
        )

    def provenance(self) -> dict[str, Any]:
        """Return the names and fingerprints of the texts that decided the plan."""
        facts: dict[str, Any] = {"data": self.calibration.domain.identity}
        if self.validation is not None:
            text = self.validation.text
            facts["search_data"] = {"name": text.name, "fingerprint": text.fingerprint}
        if self.general is not None and self.general.calibration is not None:
            facts["general_data"] = self.general.whole
        return facts


def _measure(
    base: LoadedModel,
    pruned: PrunedModel,
    config: AnyConfig,
    options: EvalOptions,
    texts: _Texts,
    base_losses: Sequence[DocumentLoss],
    fit: NativeFit,
) -> EvalReport:
    """Measure the pruned model beside the base, and put everything into a report."""
    # The same documents, whatever number of tokens they are for another tokenizer.
    losses = texts.measure(pruned.model, pruned.tokenizer, docs=[loss.doc for loss in base_losses])
    general = measure_general_losses(
        texts.general,
        (base.model, base.tokenizer),
        pruned=(pruned.model, pruned.tokenizer),
        max_seq_length=config.max_seq_length,
        max_tokens=options.max_tokens,
        seed=config.pruning_seed,
    )
    speed = None
    if options.benchmark:  # in one process: several would slow each other down
        speed = on_main_process(lambda: measure_speed({"base": base.model, "pruned": pruned.model}))
    total, test = base.model.num_parameters(), texts.split.test
    search = None if texts.validation is None else describe_size_search(texts.validation, pruned.plan)
    asked = ParameterBudget.of(config, total).asked_ratio if isinstance(config, PrunerConfig) else None
    return EvalReport(
        base_model=base.name,
        dataset=DatasetFacts(test.name, test.revision, test.fingerprint, texts.split.how),
        size=SizeFacts.measured(total, pruned.model.num_parameters(), asked_ratio=asked),
        loss=replace(
            build_loss_facts(base_losses, {"pruned": losses}, seed=config.pruning_seed),
            predicted_excess=pruned.plan.provenance.get("predicted_loss_increase"),
        ),
        environment=Environment.current(dtype_name(pruned.model)),
        speed=SpeedFacts(speed["base"], speed["pruned"]) if speed else None,
        budget=search,
        general=general,
        notes=(
            *((search.text,) if search else ()),
            *plan_notes(pruned.plan, texts.calibration),
            f"Saved as {type(pruned.model).__name__}: {fit.reason}.",
        ),
    )


def plan_notes(plan: PruningPlan, calibration: CalibrationSet) -> tuple[str, ...]:
    """Return sentences for a report on how a plan came about."""
    config, text, general = calibration.config, calibration.domain, calibration.general
    calibrated: tuple[str, ...] = ()
    if isinstance(config, PrunerConfig | ThresholdConfig) and config.prunes_units:
        mixed = "" if general is None else f", a share of {config.general_data_ratio:g} of {general.name}"
        calibrated = (f"Calibrated on {plan.provenance['num_calibration_tokens']:,} tokens of {text.name}{mixed}.",)
    return (*vocabulary_note(plan, text), *refit_note(plan), *zeros_note(plan), *calibrated)
