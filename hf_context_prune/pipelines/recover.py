"""A pruned folder -> the recovered model: load it with its plan and its base, train, and measure all three."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_context_prune.data.balance import group_by_source
from hf_context_prune.data.documents import TextData, TextSource, load_documents
from hf_context_prune.data.splits import TextSplit, hold_out_documents
from hf_context_prune.errors import ConfigError, DownloadError, LoadError
from hf_context_prune.evaluation.general_text import GeneralText, read_general
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.reports.report import EvalReport, SizeFacts
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.widths import count_base_parameters
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.pruning.notes import experts_note, layers_note
from hf_context_prune.storage.gguf import explain_gguf_sizes
from hf_context_prune.storage.known_models import DEMO_MODEL, name_of_base
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.resume import open_resume_folder
from hf_context_prune.storage.staging import check_target, resolve_target
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.monitor import History
from hf_context_prune.training.recovery.recover import check_single_device, recover
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME
from hf_context_prune.utils.hub_ids import is_hub_id
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.stages import Stages, format_seconds

from .comparison import Comparison
from .durations import estimate_measuring
from .example import write_example
from .images import images_note
from .result import PruneResult

_LOGGER = logging.getLogger(__name__)
_READING, _BASE, _TRAINING, _RESULT = (
    "Reading the text",
    "Measuring the base model",
    "Training",
    "Measuring the result",
)


def recover_folder(
    folder: str | Path,
    data: TextData,
    config: RecoveryConfig | None = None,
    *,
    base: str | Path | None = None,
    eval_data: TextData | None = None,
    text_column: str | None = None,
    eval_options: EvalOptions | None = None,
    device: str | None = None,
    resume_dir: Path | None = None,
) -> PruneResult:
    """Recover a folder that this package wrote, and measure base, pruned and recovered model on test text.

    Where the pruning calibrated on general text, and the same is given again, the same share of it is trained on.

    Args:
        folder: The pruned model, with its plan.
        data: Text of the domain. The same documents are held out of it as `prune` holds out of the same text.
        config: All choices.
        base: The base model that was pruned, which the results are compared with; None takes the base that the plan
            names, if it is on the Hub. Another model is not compared with, and the report says so.
        eval_data: Test text; None holds out a tenth of `data`, by document.
        text_column: Column with the text.
        eval_options: How much is measured.
        device: As for [`load_model`][].
        resume_dir: As for [`recover`][].

    Raises:
        ContextPruneError: See `hf_context_prune.errors`; the folder is only read.
    """
    config, options, folder = config or RecoveryConfig(), eval_options or EvalOptions(), Path(folder)
    verify_folder(folder)
    plan, pruned = PruningPlan.load(folder / PLAN_NAME), load_model(folder, device=device)
    check_single_device(pruned.model)
    given = _load_base(plan, base, device)
    parent = given if given is not None and fingerprint(given.model) == plan.model_fingerprint else None
    if given is not None and parent is None:
        _LOGGER.warning("The model %s (--base) is not the model that was pruned, and is not compared with.", given.name)
    measuring = format_seconds(estimate_measuring(pruned.model, options, 2 if parent is None else 3))
    limit = "" if config.max_minutes is None else f"The training takes {config.max_minutes:g} min at most. "
    _LOGGER.info("%sMeasuring the models takes about %s on this machine when it is idle.", limit, measuring)
    stages = Stages(_LOGGER, _READING, *(() if parent is None else (_BASE,)), _TRAINING, _RESULT)
    stages.begin(_READING)
    split, general = _read_texts(plan, pruned, data, eval_data, text_column, config, options)
    earlier = EvalReport.load(folder / REPORT_NAME) if (folder / REPORT_NAME).is_file() else None
    how: dict[str, Any] = {
        "earlier": earlier,
        "max_seq_length": _window_of(plan, earlier) or config.max_seq_length,
        "seed": config.recovery_seed,
    }
    if parent is None:
        name = str(plan.provenance.get("base_model") or "the base model")
        comparison = Comparison.begin_without_base(name, pruned.tokenizer, split, general, options, **how)
    else:
        stages.begin(_BASE)
        comparison = Comparison.begin(parent, split, general, options, **how)
    stages.begin(_TRAINING)
    before = PrunedModel(pruned.model, pruned.tokenizer, plan)
    made_with = plan.provenance.get("config") or {}
    after, note = train_back(
        before,
        split,
        config,
        general=None if general is None else general.calibration,
        general_data_ratio=made_with.get("general_data_ratio") or 0.0,
        resume_dir=resume_dir,
    )
    stages.begin(_RESULT)
    report = comparison.report(
        SizeFacts.measured(
            count_base_parameters(pruned.model, plan),
            after.model.num_parameters(),
            asked_ratio=made_with.get("pruning_ratio"),
            base_weight_bytes=None if earlier is None else earlier.size.base_weight_bytes,
        ),
        pruned=before[:2],
        recovered=after[:2],
        trained_again=bool(plan.provenance.get("recoveries")),
        notes=(
            note,
            *layers_note(plan),
            *experts_note(plan),
            *(() if parent is None else explain_gguf_sizes(parent)),
            *images_note(pruned),
        ),
    )
    if parent is None:
        report = replace(report, notes=(*report.notes, _note_without_parent(given, known=report.loss.base is not None)))
    report = replace(report, example=write_example(*after) if options.example else None)
    stages.end()
    fit = assess_native_fit(after.model.config, ModelView.of(after.model).spec, plan.kept_widths)
    return PruneResult(*after, report, fit, parent, None if pruned.wrapper is None else pruned)


def train_back(
    pruned: PrunedModel,
    split: TextSplit,
    config: RecoveryConfig,
    general: TextSource | None = None,
    general_data_ratio: float = 0.0,
    *,
    resume_dir: Path | None = None,
) -> tuple[PrunedModel, str]:
    """Recover a pruned model; where general text was calibrated on, the same share of it is trained on.

    Where the pruning balanced the sources of its text, so does the training.

    Args:
        pruned: The pruned model; left as it is.
        split: Text of the domain, of which [`recover`][] holds validation documents out, and the test text.
        config: All choices.
        general: The general text that was calibrated on; None where none was.
        general_data_ratio: Share of the calibration samples that came from it.
        resume_dir: As for [`recover`][].

    Returns:
        The recovered model, with the run in the plan's provenance, and a sentence on the training for the report.

    Raises:
        ContextPruneError: See [`recover`][].
    """
    text = split.calibration
    share, balances = 0.0 if general is None else general_data_ratio, _balances_sources(pruned.plan, text)
    outcome = recover(
        pruned.model,
        text,
        config,
        tokenizer=pruned.tokenizer,
        general_data=general,
        general_data_ratio=share,
        balance_sources=balances,
        resume_dir=resume_dir,
    )
    run: dict[str, Any] = {"config": config.to_dict(), "history": outcome.history.to_dict()}
    if split.test_name is not None:
        run["test_data"] = split.test_name
    provenance = pruned.plan.provenance
    earlier = provenance.get("recoveries") or ()
    plan = replace(pruned.plan, provenance={**provenance, "recoveries": [*earlier, run]})
    name = f"{text.name}, as much of every source," if balances else text.name
    trained_on = name if general is None else f"{name.rstrip(',')}, a share of {share:g} of {general.name},"
    note = _describe_training(config, outcome.history, trained_on)
    return PrunedModel(outcome.model, pruned.tokenizer, plan), note


def _balances_sources(plan: PruningPlan, text: TextSource) -> bool:
    """Return whether the pruning balanced its sources, and this text has several, too."""
    if not (plan.provenance.get("config") or {}).get("balance_sources"):
        return False
    several = len(group_by_source(text.documents)) > 1
    if not several:
        _LOGGER.warning(
            "The pruning took as much text of every source (balance_sources), but %s has a single one: it is trained "
            "on as it is. Name the source of each record in a column 'source' to balance them.",
            text.name,
        )
    return several


@reserves("output")
def recover_to_folder(
    folder: str | Path,
    data: TextData,
    output: str | Path,
    config: RecoveryConfig | None = None,
    *,
    base: str | Path | None = None,
    eval_data: TextData | None = None,
    text_column: str | None = None,
    eval_options: EvalOptions | None = None,
    device: str | None = None,
) -> PruneResult:
    """Recover a folder as [`recover_folder`][] does, and write a new model folder.

    The same call, after a kill, goes on from the last time that the validation text was measured; see [`recover`][].

    Args:
        folder: As for [`recover_folder`][].
        data: As for [`recover_folder`][].
        output: Folder to write: absent, empty, or an older folder of this package, which is replaced.
        config: As for [`recover_folder`][].
        base: As for [`recover_folder`][].
        eval_data: As for [`recover_folder`][].
        text_column: As for [`recover_folder`][].
        eval_options: As for [`recover_folder`][]; `memory` measures the models in fresh processes.
        device: As for [`recover_folder`][].

    Returns:
        The recovered model with plan and report, as it was saved.

    Raises:
        ConfigError: The output is the folder itself or lies inside it.
        SaveError: Another run is at work for this output.
        ContextPruneError: See `hf_context_prune.errors`; an older folder is as it was.
    """
    given, target, options = Path(folder), resolve_target(output), eval_options or EvalOptions()
    check_target(target)
    if given.resolve() in (target, *target.parents):
        raise ConfigError(f"--output {output} is {folder} or lies inside it, which would be lost. Name another folder.")
    with open_resume_folder("recover", target, given, data, eval_data, text_column) as resume_dir:
        result = recover_folder(
            given,
            data,
            config,
            base=base,
            eval_data=eval_data,
            text_column=text_column,
            eval_options=options,
            device=device,
            resume_dir=resume_dir,
        )
        result.save_pretrained(target, measure_memory=options.memory)
    return result.as_saved(target)


def _read_texts(
    plan: PruningPlan,
    pruned: LoadedModel,
    data: TextData,
    eval_data: TextData | None,
    text_column: str | None,
    config: RecoveryConfig,
    options: EvalOptions,
) -> tuple[TextSplit, GeneralText | None]:
    """Read the text, split as the pruning split it, and the general text, if there is one."""
    made_with, known = plan.provenance.get("config") or {}, plan.provenance.get("data") or {}
    split = TextSplit.of(
        data,
        eval_data,
        tokenizer=pruned.tokenizer,
        text_column=text_column,
        seed=made_with.get("pruning_seed") or 0,
        use="recovery",
        withholds=True,
    )
    if known.get("fingerprint") == split.calibration.fingerprint:
        split = replace(split, how=f"{split.how} The pruning had left them out as well.")
    else:
        split = replace(split, how=f"{split.how} The pruning had other text, which may have held some of them.")
    # `recover` does the same; with too few documents it is better to fail before anything is measured.
    hold_out_documents(split.calibration, seed=config.recovery_seed)
    general = _general(options.general_data, split, pruned.tokenizer, plan, config.recovery_seed)
    if general is not None and general.calibration is not None:
        split = split.without(general.calibration)
    return split, general


def _describe_training(config: RecoveryConfig, history: History, text: str) -> str:
    return (
        f"Recovered ({config.method}) on {history.tokens:,} tokens of {text} in {history.steps:,} steps and "
        f"{history.seconds / 60:.1f} minutes; the weights of step {history.best_step:,} were best on validation "
        f"documents. It ended because {history.ended}."
    )


def _general(data: Any, split: TextSplit, tokenizer: Any, plan: PruningPlan, seed: int) -> GeneralText | None:  # noqa: ANN401
    """Read general text to measure on, without what the pruning calibrated on and the domain's test text."""
    if data is None:
        return None
    text, test = split.calibration, split.test
    source, mixed_in = load_documents(data, tokenizer=tokenizer, seed=seed), plan.provenance.get("general_data")
    if mixed_in is None or source.fingerprint != mixed_in.get("fingerprint"):
        return read_general(source, apart_from=text, test=test, tokenizer=tokenizer, seed=seed)
    first = (plan.provenance.get("config") or {}).get("pruning_seed") or 0
    return read_general(source, apart_from=text, test=test, tokenizer=tokenizer, seed=first, hold_out=True)


def _window_of(plan: PruningPlan, earlier: EvalReport | None) -> int | None:
    """Return the tokens per window of the folder's figures, so that those of the recovered model compare with them."""
    if earlier is not None and earlier.dataset.max_seq_length is not None:
        return earlier.dataset.max_seq_length
    found = (plan.provenance.get("config") or {}).get("max_seq_length")
    return found if isinstance(found, int) else None


def _note_without_parent(given: LoadedModel | None, *, known: bool) -> str:
    why = "No base model was given (--base)"
    if given is not None:
        why = f"The model {given.name} (--base) is not the model that was pruned"
    losses = "its losses are those that the folder's report states" if known else "its losses were not measured"
    return f"{why}: {losses}, and speed was not compared."


def _load_base(plan: PruningPlan, base: str | Path | None, device: str | None) -> LoadedModel | None:
    """Load the given base, or the base that the plan names; None if it names none on the Hub.

    Raises:
        LoadError: The given base, or a base that the plan names with its revision, can't be loaded.
    """
    if base is not None:
        return load_model(base, device=device)
    name, revision = name_of_base(plan.provenance), plan.provenance.get("base_revision")
    if name == DEMO_MODEL:
        try:
            return load_model(DEMO_MODEL, device=device)
        except DownloadError as error:
            _LOGGER.warning("The base is not measured: %s", error)
            return None
    # A callback knows no revision; the weights tell whether it is the parent. A path of this machine is not taken.
    if is_hub_id(name, with_owner=not revision):
        try:
            return load_model(name, revision=revision, device=device)
        except LoadError:
            if revision:
                raise
    return None
