"""A pruned folder -> the same, recovered: loads it with its plan and its parent, and measures all three."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.data.splits import apart_from_general, hold_out_documents, split_text
from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.general_text import GeneralText, build_loss_facts, measure_general_losses, read_general
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import DatasetFacts, Environment, EvalReport, SizeFacts, SpeedFacts
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.pruning.allocation.widths import dense_parameters
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import check_output_folder, has_all_tokens, recover
from hf_context_prune.utils.file_names import PLAN_NAME

from .result import PruneResult


def recover_folder(
    folder: str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    config: RecoveryConfig | None = None,
    *,
    teacher: str | Path | None = None,
    eval_data: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    evaluation: EvalOptions | None = None,
    device: str | None = None,
) -> PruneResult:
    """Recover a folder that this package wrote, and measure parent, pruned and recovered on held-out text.

    Args:
        folder: The pruned model, with its plan.
        data: Text of the domain. The documents that are held out of it for the figures are those that `prune` holds out
            of the same text.
        config: All choices.
        teacher: The dense parent, which the figures are compared with; None: the plan's base, where that is on the
            Hub. Another model over the same tokens teaches as well, but is not compared with.
        eval_data: Text for the figures; None holds out a tenth of `data`, by document.
        text_column: Column with the text.
        evaluation: How much is measured.
        device: As for [`load_model`][].

    Raises:
        ConfigError: The parent is needed and can't be found.
        ContextPruneError: See `hf_context_prune.errors`; the folder is only read.
    """
    config, options, folder = config or RecoveryConfig(), evaluation or EvalOptions(), Path(folder)
    verify_folder(folder)
    plan, pruned = PruningPlan.load(folder / PLAN_NAME), load_model(folder, device=device)
    check_output_folder(pruned.model)
    guide = _teacher(plan, config, teacher, device)
    parent = guide if guide is not None and fingerprint(guide.model) == plan.model_fingerprint else None
    if guide is not None and parent is None and config.distillation > 0:
        _check_tokens(guide, pruned, plan)
    made_with = plan.provenance.get("config") or {}
    split = PrunerConfig(text_column=text_column, pruning_seed=made_with.get("pruning_seed", 0))
    text, held_out, how = split_text(data, eval_data, split, pruned.tokenizer, use="recovery", withholds=True)
    if (plan.provenance.get("data") or {}).get("fingerprint") == text.fingerprint:
        how += " The pruning had left them out as well."
    else:
        how += " The pruning had other text, which may have held some of them."
    seed = config.recovery_seed
    hold_out_documents(text, seed=seed)  # as recover will: too few documents are told before anything is measured
    general = _general(options.general_data, text, pruned.tokenizer, plan, seed)
    if general is not None and general.calibration is not None:
        held_out, how = apart_from_general(held_out, how, general.calibration)
    first = parent or pruned
    how_long: dict[str, Any] = {"max_seq_length": config.max_seq_length}
    base = document_losses(first.model, first.tokenizer, held_out, max_tokens=options.max_tokens, **how_long)
    docs = [loss.doc for loss in base]
    losses = {}
    if parent is not None:
        losses["pruned"] = document_losses(pruned.model, pruned.tokenizer, held_out, docs=docs, **how_long)
    outcome = recover(
        pruned.model,
        text,
        config,
        tokenizer=pruned.tokenizer,
        teacher=None if guide is None else guide.model,
        plan=plan,
    )
    losses["recovered"] = document_losses(outcome.model, pruned.tokenizer, held_out, docs=docs, **how_long)
    general_facts = measure_general_losses(
        general,
        (first.model, first.tokenizer),
        pruned=None if parent is None else (pruned.model, pruned.tokenizer),
        recovered=(outcome.model, pruned.tokenizer),
        max_tokens=options.max_tokens,
        seed=seed,
        **how_long,
    )
    history = outcome.history
    run = {"config": config.to_dict(), "history": history.to_dict()}
    plan = replace(plan, provenance={**plan.provenance, "recoveries": [*plan.provenance.get("recoveries", ()), run]})
    fit = assess_native_fit(outcome.model.config, check_supported(outcome.model), plan.widths)
    speed = None
    if parent is not None and options.speed:
        speed = measure_speed({"base": parent.model, "pruned": outcome.model})
    report = EvalReport(
        base_model=first.name,
        dataset=DatasetFacts(held_out.name, held_out.revision, held_out.fingerprint, how),
        size=SizeFacts.measured(
            dense_parameters(pruned.model, plan),
            outcome.model.num_parameters(),
            asked_ratio=made_with.get("pruning_ratio"),
        ),
        loss=build_loss_facts(base, losses, seed=seed),
        environment=Environment.current(str(outcome.model.dtype).removeprefix("torch.")),
        speed=SpeedFacts(speed["base"], speed["pruned"]) if speed else None,
        general=general_facts,
        notes=(
            f"Recovered ({config.method}) on {history.tokens:,} tokens of {text.name} in {history.steps:,} steps and "
            f"{history.seconds / 60:.1f} minutes; the weights of step {history.best_step:,} were best on withheld "
            f"documents. It ended because {history.ended}.",
            *(() if parent else (_without_parent(guide),)),
        ),
    )
    return PruneResult(outcome.model, pruned.tokenizer, plan, report, fit, parent)


def _general(data: Any, text: TextSource, tokenizer: Any, plan: PruningPlan, seed: int) -> GeneralText | None:  # noqa: ANN401
    """General text to measure on, without what the pruning calibrated on."""
    if data is None:
        return None
    source, mixed_in = load_documents(data, tokenizer=tokenizer, seed=seed), plan.provenance.get("general_data")
    if mixed_in is None or source.fingerprint != mixed_in["fingerprint"]:
        return read_general(source, apart_from=text, tokenizer=tokenizer, seed=seed)
    first = plan.provenance["config"]["pruning_seed"]
    return read_general(source, apart_from=text, tokenizer=tokenizer, seed=first, hold_out=True)


def _check_tokens(guide: LoadedModel, pruned: LoadedModel, plan: PruningPlan) -> None:
    """Refuse a teacher in whose tokenizer a token of the model has another id, or none."""
    theirs, own = guide.tokenizer.get_vocab(), pruned.tokenizer.get_vocab()
    tokens = sorted(own, key=own.__getitem__)
    ids = [own[token] for token in tokens]
    if plan.vocabulary is not None and has_all_tokens(guide.model, plan.vocabulary):
        ids = plan.vocabulary.to_old(ids)
    for token, old in zip(tokens, ids, strict=True):
        if theirs.get(token) != old:
            raise ConfigError(
                f"The teacher {guide.name} is over other tokens: {token!r} has the id {theirs.get(token)} in its "
                f"tokenizer, and {old} in that of the model that was pruned. Give a teacher over the same tokens, or "
                f"learn from the text alone (--distillation 0)."
            )


def _without_parent(guide: LoadedModel | None) -> str:
    what = "the losses of base are those of the pruned model as it was, and speed was not compared"
    if guide is None:
        return f"No parent was given (--teacher): {what}."
    return f"The teacher {guide.name} is not the model that was pruned: {what}."


def _teacher(
    plan: PruningPlan, config: RecoveryConfig, teacher: str | Path | None, device: str | None
) -> LoadedModel | None:
    if teacher is not None:
        return load_model(teacher, device=device)
    name, revision = plan.provenance.get("base_model"), plan.provenance.get("base_revision")
    needed = config.distillation > 0 or config.rewind != "none"
    if name and (revision or "/" in name):  # a callback knows no revision; whether it is the parent, its weights tell
        try:
            return load_model(name, revision=revision, device=device)
        except LoadError:
            if revision or needed:
                raise
    if needed:
        raise ConfigError(
            f"The dense parent is needed as a teacher, and the plan names it only as {name!r}, without a revision on "
            f"the Hub. Give it (--teacher), or learn from the text alone (--distillation 0)."
        )
    return None
