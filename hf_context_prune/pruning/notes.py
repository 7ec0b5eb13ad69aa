"""Sentences of a report on how a plan came about."""

from __future__ import annotations

from collections.abc import Mapping

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.data.balance import group_by_source
from hf_context_prune.data.documents import TextSource
from hf_context_prune.modeling.depth import WARNING, describe_layers
from hf_context_prune.modeling.geometry import units_of, widths_vary
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.thresholds.prune import zeros_note


def plan_notes(plan: PruningPlan, calibration: CalibrationSet) -> tuple[str, ...]:
    """Return sentences for a report on how a plan came about."""
    config, text, general = calibration.config, calibration.domain, calibration.general
    calibrated: tuple[str, ...] = ()
    removes_layers = isinstance(config, PrunerConfig) and config.removes_layers
    if isinstance(config, PrunerConfig | ThresholdConfig) and (config.prunes_layers or removes_layers):
        mixed = "" if general is None else f", a share of {config.general_data_ratio:g} of {general.name}"
        calibrated = (f"Calibrated on {plan.provenance['num_calibration_tokens']:,} tokens of {text.name}{mixed}.",)
    return (
        *balance_note(calibration),
        *layers_note(plan),
        *depth_note(plan),
        *experts_note(plan),
        *sizes_note(plan),
        *vocabulary_note(plan, text),
        *refit_note(plan),
        *zeros_note(plan),
        *calibrated,
    )


def balance_note(calibration: CalibrationSet) -> tuple[str, ...]:
    """Return a sentence on sources that count equally; none where they count by their size."""
    if not calibration.config.balance_sources:
        return ()
    count = len(group_by_source(calibration.domain.documents))
    return (
        f"The {count:,} sources of {calibration.domain.name} count equally in what is calibrated on, as far as each "
        f"has text (--balance-sources).",
    )


def layers_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence on the layers that were removed as a whole, and a warning; none where all stay."""
    sentence = describe_layers(plan)
    return () if sentence is None else (f"{sentence} {WARNING}",)


def depth_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence on why as many layers went as did, where a budget decided it; see `DepthSearch`."""
    losses = plan.provenance.get("predicted_by_removed_layers") or ()
    count = len(plan.removed_layers)
    others = {number: loss for number, loss in enumerate(losses) if loss is not None and number != count}
    if not others or losses[count] is None:
        return ()
    next_best = min(others, key=lambda number: others[number])
    more = others[next_best] - losses[count]
    return (
        f"The budget removed {count or 'no'} layer{'' if count == 1 else 's'} as a whole: with {next_best or 'none'} "
        f"removed, it was predicted to cost {more:.3f} nats per token more.",
    )


def experts_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a note on the experts and their neurons that stay, and how much of the routing they had; () if all do."""
    facts = plan.provenance.get("experts")
    if not facts:
        return ()
    notes = []
    if "kept" in facts:
        notes.append(
            f"{facts['kept']} of {facts['of']} experts stay in every layer that has them, by {facts['criterion']}: "
            f"{_describe_range(facts['routed_share'])} of the routing of the calibration text went to them."
        )
    inside = [
        f"{kept:,} of {dense:,} neurons of {owner}"
        for owner, (kept, dense) in (
            ("every expert", facts.get("neurons", (0, 0))),
            ("the shared expert", facts.get("shared_neurons", (0, 0))),
        )
        if kept < dense
    ]
    if inside:
        notes.append(f"{' and '.join(inside)} stay.")
    repair = "What the others did is not made up for in the layers."
    if "error_left" in facts:
        left = {layer: share for layer, share in facts["error_left"].items() if share is not None}
        known = f": {_describe_range(left)} of the squared error is left, on text that was not fitted" if left else ""
        repair = f"They were refitted to what all did{known}."
    return (" ".join([*notes, repair]),)


def _describe_range(shares: Mapping[str, float]) -> str:
    """Return the lowest and the highest of some shares, as one where they are alike."""
    low, high = (f"{share:.0%}" for share in (min(shares.values()), max(shares.values())))
    return low if low == high else f"{low} to {high}"


def sizes_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence on what the other architecture would cost, where both were weighed."""
    losses = plan.provenance.get("predicted_losses") or {}
    if not {"variable", "native", "base"} <= losses.keys():
        return ()
    more = (losses["native"] - losses["variable"]) / losses["base"]
    if widths_vary(plan.widths):
        return (
            f"Widths differ by layer. One width for all layers (--native-architecture), which opens without this "
            f"package, is predicted to cost {more:.1%} more bits per byte.",
        )
    return (
        f"All layers have one width, so the model opens without this package; widths that differ by layer are "
        f"predicted to save {more:.1%} bits per byte (--no-native-architecture).",
    )


def vocabulary_note(plan: PruningPlan, text: TextSource) -> tuple[str, ...]:
    """Return a sentence on the vocabulary, where it was or could have been pruned."""
    if plan.vocabulary is None:
        if plan.provenance.get("all_tokens_stay"):
            return (f"All tokens stay: {plan.provenance['all_tokens_stay']}",)
        if "tokens" in (plan.provenance.get("sensitivity") or {}):
            names = {"neurons": "neurons", "kv_groups": "KV groups"}  # experts go first, by a rule of their own
            others = " and ".join(names[unit] for unit in units_of(plan.dense) if unit in names)
            return (f"All tokens stay, since removing tokens costs more than removing {others}.",)
        return ()
    facts = plan.provenance["vocabulary"]
    rows = f"; {_describe_rows(facts['refit'])}" if facts["refit"] is not None else ""
    return (
        f"Vocabulary: {len(plan.vocabulary.kept):,} of {facts['tokens_before']:,} tokens, {facts['coverage']:.2%} of "
        f"the token occurrences in {text.name}{rows}. Losses per token compare across tokenizers only where both cut "
        f"the text into the same number of tokens; bits per byte always compare.",
    )


def refit_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence on the effect of the refit of the rows, where there was one."""
    if "refit" not in plan.provenance:
        return ()
    refit = plan.provenance["refit"]
    why = ""
    if refit is None:
        why = (
            ", since there is too little text for validation, no room for the rows, or the logits are not linear in "
            "the hidden states"
        )
    return (f"After the layers, {_describe_rows(refit)}{why}.",)


def _describe_rows(refit: Mapping[str, float] | None) -> str:
    if refit is None:
        return "the rows of the tokens are unchanged"
    if not refit["share"]:
        return "the rows of the tokens are unchanged, since no refit lowered the loss on validation text"
    return (
        f"the rows of the tokens were refitted ({refit['before']:.3f} -> {refit['after']:.3f} nats per token on "
        f"validation samples)"
    )
