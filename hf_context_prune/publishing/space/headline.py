"""The four figures at the head of a Space: size, speed, cost on the domain, cost elsewhere; from the report alone."""

from __future__ import annotations

from dataclasses import dataclass

from hf_context_prune.evaluation.bootstrap import Estimate, ratio_to_change
from hf_context_prune.evaluation.reports.formatting import format_percent
from hf_context_prune.evaluation.reports.report import EvalReport, LossFacts
from hf_context_prune.modeling.plan import PruningPlan

from .facts import Facts

_UNKNOWN = "not measured"


@dataclass(frozen=True)
class Figure:
    """A figure of the headline.

    Attributes:
        label: What it is about.
        value: The figure, or that it was not measured.
        detail: What it means, in a few words.
    """

    label: str
    value: str
    detail: str = ""


def headline(facts: Facts, domain: str) -> list[Figure]:
    """Return the figures of a pruned model against its base.

    Args:
        facts: The facts of the model.
        domain: Name of its domain.
    """
    report = facts.report
    general = report.general.loss if report is not None and report.general is not None else None
    elsewhere = ("general text", general) if general is not None else _first_other(facts)
    return [
        _size(report),
        _speed(report),
        _cost(f"Loss on {domain} text", report.loss if report is not None else None),
        _cost(f"Loss on {elsewhere[0]}", elsewhere[1]),
    ]


def describe_parts(plan: PruningPlan | None) -> str:
    """Return a sentence on what the pruned model lacks, which names only parts that were removed; "" without a plan."""
    if plan is None:
        return ""
    removed = [
        (what, sum(getattr(w, unit) for w in plan.dense), sum(getattr(w, unit) for w in plan.widths))
        for what, unit in (
            ("MLP neurons", "neurons"),
            ("groups of attention heads", "kv_groups"),
            ("experts", "experts"),
        )
    ]
    if plan.removed_layers:
        removed.insert(0, ("layers", len(plan.layers), len(plan.kept_layers)))
    if plan.vocabulary is not None:
        removed.append(("vocabulary entries", plan.vocabulary.dense, len(plan.vocabulary.kept)))
    parts = [f"{before - after:,} of {before:,} {what}" for what, before, after in removed if after < before]
    if not parts:
        return "Nothing was removed from it."
    listed = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1]
    return f"The pruned model was made without {listed}."


def _first_other(facts: Facts) -> tuple[str, LossFacts | None]:
    return next(((name, report.loss) for name, report in facts.others.items()), ("general text", None))


def _size(report: EvalReport | None) -> Figure:
    size = report.size if report is not None else None
    if size is None or size.pruned_parameters is None:
        return Figure("Size", _UNKNOWN)
    detail = f"{size.base_parameters / 1e6:,.1f} → {size.pruned_parameters / 1e6:,.1f} million parameters"
    if size.base_weight_bytes and size.pruned_weight_bytes:
        detail += f", {size.base_weight_bytes / 1e6:,.0f} → {size.pruned_weight_bytes / 1e6:,.0f} MB"
    return Figure("Size", format_percent(size.pruned_parameters / size.base_parameters - 1), detail)


def _speed(report: EvalReport | None) -> Figure:
    ratio = report.speed.ratio() if report is not None and report.speed is not None else None
    if ratio is None:
        return Figure("Speed", _UNKNOWN)
    detail = f"tokens per second when it writes; {ratio.prefill.median:.2f}× when it reads"
    return Figure("Speed", f"{ratio.decode.median:.2f}×", detail)


def _cost(label: str, loss: LossFacts | None) -> Figure:
    comparison = loss.last_comparison if loss is not None else None
    if comparison is None:
        return Figure(label, _UNKNOWN)
    change: Estimate = ratio_to_change(comparison.bits_per_byte_ratio)
    documents = "1 test document" if comparison.num_documents == 1 else f"{comparison.num_documents:,} test documents"
    between = ""
    if ends := change.interval or change.span:
        between = f", {'95% interval' if change.interval else 'by source'} {ends[0]:+.1%} to {ends[1]:+.1%}"
    return Figure(label, format_percent(change.value), f"bits per byte, {documents}{between}")
