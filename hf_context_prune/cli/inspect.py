"""``hf-context-prune inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .export import show_export
from .options import FolderArgument, FormatOption, OutputFormat, VerboseOption
from .output import out, out_json, out_table, show_report
from .tables import inside_experts_line, widths_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_context_prune import EvalReport, PruningPlan


def inspect(folder: FolderArgument, format: FormatOption = OutputFormat.auto, verbose: VerboseOption = False) -> None:
    """Verify a pruned folder or an export, and show what was removed, how, and what it cost."""
    from hf_context_prune import EvalReport, PruningPlan, read_export, verify_folder
    from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME, PLAN_NAME, REPORT_NAME

    files = verify_folder(folder)["files"]
    if EXPORT_REPORT_NAME in files:
        show_export(read_export(folder), format)
        return
    plan = PruningPlan.load(folder / PLAN_NAME)
    report = EvalReport.load(folder / REPORT_NAME) if REPORT_NAME in files else None
    if format is OutputFormat.json:
        out_json(_facts(files, plan, report))
        return
    if format is OutputFormat.quiet:
        out(plan.sha256)
        return
    out(f"{folder}: {len(files)} files, all as they were written")
    out(f"Plan: {plan.sha256}")
    for name, value in plan.provenance.items():
        out(f"  {name}: {_short(name, value)}")
    if plan.vocabulary:
        out(f"Vocabulary: {len(plan.vocabulary.kept):,} of {plan.vocabulary.dense:,} embedding rows kept")
    out_table(widths_table(plan.dense, plan.widths))
    if plan.expert_neurons is not None:
        out(inside_experts_line(*plan.expert_neurons.sizes))
    if report:
        show_report(report, verbose=verbose)


def _short(name: str, value: Any) -> str:  # noqa: ANN401 - JSON
    """Return a value of the provenance as a line, without options that were not given."""
    if name == "sensitivity":
        return f"{len(value)} curves (--format json has them)"
    if name == "config" and isinstance(value, dict):
        value = {option: given for option, given in value.items() if given is not None}
    return json.dumps(value)


def _facts(files: Mapping[str, Any], plan: PruningPlan, report: EvalReport | None) -> dict[str, Any]:
    return {
        "files": files,
        "plan_sha256": plan.sha256,
        "provenance": dict(plan.provenance),
        "widths": [asdict(w) for w in plan.widths],
        "removed_layers": list(plan.removed_layers),
        "inside_experts": plan.expert_neurons and plan.expert_neurons.sizes,
        "vocabulary_size": len(plan.vocabulary.kept) if plan.vocabulary else None,
        "report": report.to_dict() if report else None,
    }
