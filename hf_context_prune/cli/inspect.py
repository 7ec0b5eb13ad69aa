"""The inspect command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .export import show_export
from .options import FormatOption, OutputFormat
from .output import out, out_json, out_table
from .tables import report_table, widths_table


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that this tool wrote.")],
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Verify a pruned folder or an export, and show what was removed, how, and what it cost."""
    from hf_context_prune.evaluation.reports.report import EvalReport
    from hf_context_prune.export.run import read_export
    from hf_context_prune.modeling.plan import PruningPlan
    from hf_context_prune.storage.manifest import verify_folder
    from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME, PLAN_NAME, REPORT_NAME

    manifest = verify_folder(folder)
    if EXPORT_REPORT_NAME in manifest["files"]:
        show_export(read_export(folder), format)
        return
    plan = PruningPlan.load(folder / PLAN_NAME)
    figures = EvalReport.load(folder / REPORT_NAME) if REPORT_NAME in manifest["files"] else None
    if format is OutputFormat.json:
        out_json(
            {
                "files": manifest["files"],
                "plan_sha256": plan.sha256,
                "provenance": dict(plan.provenance),
                "widths": [{"neurons": w.neurons, "kv_groups": w.kv_groups} for w in plan.widths],
                "vocabulary_size": len(plan.vocabulary.kept) if plan.vocabulary else None,
                "report": figures.to_dict() if figures else None,
            }
        )
        return
    if format is OutputFormat.quiet:
        out(plan.sha256)
        return
    out(f"{folder}: {len(manifest['files'])} files, all as they were written")
    out(f"Plan: {plan.sha256}")
    for name, value in plan.provenance.items():
        many = f"{len(value)} curves (--format json has them)" if name == "sensitivity" else json.dumps(value)
        out(f"  {name}: {many}")
    if plan.vocabulary:
        out(f"Vocabulary: {len(plan.vocabulary.kept):,} of {plan.vocabulary.dense:,} embedding rows kept")
    out_table(widths_table(plan.dense, plan.widths))
    if figures:
        out_table(report_table(figures))
