"""What the tabs tell about the models of a Space, from their plans and evaluation reports alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

from hf_context_prune.errors import ContextPruneError, LoadError
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.report import EvalReport, LossFacts
from hf_context_prune.evaluation.reports.rows import table_rows
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME

from .settings import Entry, Source

OWN = "own domain"
GENERAL = "general text"
_CRITERIA = {
    "random": "at random",
    "magnitude": "by the size of their weights",
    "l1": "by their mean activation on the domain's text (the paper's rule)",
    "wanda": "by weights times activations on the domain's text",
    "flap": "by how much their activations vary on the domain's text",
    "taylor": "by their first-order effect on the loss on the domain's text",
    "obs": "by the error that stays after the others are refitted (optimal brain surgeon)",
}
_REPAIRS = {
    "none": "What stayed was not refitted.",
    "bias": "The means of what went were added to the biases.",
    "least_squares": "The output projections were refitted to what stayed, by least squares.",
    "sequential": "The output projections were refitted block by block to the dense model's hidden states.",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a domain's pruned model.

    Attributes:
        plan: What was kept; None where it can't be read.
        report: Its figures; None where it has none.
        others: Reports on other texts, by name.
        problems: Why something is missing.
    """

    plan: PruningPlan | None = None
    report: EvalReport | None = None
    others: dict[str, EvalReport] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_facts(entry: Entry) -> Facts:
    """Read the plan and the reports of an entry; what can't be read is named in `problems`, and the rest is there."""
    problems: list[str] = []

    def attempt(read: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `read` gives, or None
        try:
            return read()
        except ContextPruneError as error:
            problems.append(str(error))
            return None

    plan_file, report_file = attempt(lambda: _fact_files(entry.model)) or (None, None)
    plan = attempt(lambda: PruningPlan.load(plan_file)) if plan_file else None
    report = attempt(lambda: EvalReport.load(report_file)) if report_file else None
    read = {name: attempt(partial(EvalReport.load, file)) for name, file in entry.reports.items()}
    others = {name: other for name, other in read.items() if other is not None}
    return Facts(plan, report, others, tuple(problems))


def _fact_files(source: Source) -> tuple[Path, Path | None]:
    """The plan, and the report if there is one."""
    if source.path is not None:
        folder = source.path
        if not folder.is_dir():
            raise LoadError(f"There is no folder {folder}. `hf-context-prune demo` or `prune` makes one.")
        manifest = verify_folder(folder, hash_weights=False)
        return folder / PLAN_NAME, folder / REPORT_NAME if REPORT_NAME in manifest["files"] else None
    if source.repo is None:
        raise LoadError("The demo's model is a dense one, and can't stand for a pruned one.")
    try:
        plan = hf_hub_download(source.repo, PLAN_NAME, revision=source.revision)
        try:
            report = hf_hub_download(source.repo, REPORT_NAME, revision=source.revision)
        except RemoteEntryNotFoundError:  # nothing was measured, as after a training
            return Path(plan), None
    except (OSError, ValueError, HTTPError) as error:
        raise LoadError(
            f"{PLAN_NAME} and {REPORT_NAME} of {source.repo} can't be fetched at {source.revision} "
            f"({type(error).__name__}). Check the network, and that hf-context-prune wrote that repository."
        ) from error
    return Path(plan), Path(report)


def removed_in_words(facts: Facts) -> list[str]:
    """Sentences on what was removed and how; empty without a plan."""
    plan, report = facts.plan, facts.report
    if plan is None:
        return []
    sentences = []
    if report is not None and report.size.pruned_parameters is not None:
        size = report.size
        gone = size.base_parameters - report.size.pruned_parameters
        sentences.append(
            f"{gone / 1e6:,.1f} of {size.base_parameters / 1e6:,.1f} million parameters are gone "
            f"({gone / size.base_parameters:.0%}): they are not zeros, the matrices are smaller."
        )
    dense, kept = plan.dense, plan.widths
    sentences.append(
        _units("MLP neurons", [w.neurons for w in dense], [w.neurons for w in kept])
        + " Each is a feature that a layer computes."
    )
    sentences.append(_units("KV groups (attention heads)", [w.kv_groups for w in dense], [w.kv_groups for w in kept]))
    if plan.vocabulary is None:
        sentences.append("The vocabulary is whole.")
    else:
        kept_tokens, all_tokens = len(plan.vocabulary.kept), plan.vocabulary.dense
        sentences.append(
            f"Vocabulary: {kept_tokens:,} of {all_tokens:,} tokens stayed; a word whose token is gone is spelt from "
            f"smaller pieces."
        )
    return sentences + _how(facts)


def _how(facts: Facts) -> list[str]:
    assert facts.plan is not None
    made = facts.plan.provenance
    config = made.get("config") or {}
    sentences = []
    if config.get("criterion") in _CRITERIA:
        sentences.append(f"Units were chosen {_CRITERIA[config['criterion']]}.")
    if config.get("reconstruction") in _REPAIRS:
        sentences.append(_REPAIRS[config["reconstruction"]])
    data, tokens = made.get("data") or {}, made.get("num_calibration_tokens")
    if isinstance(tokens, int) and data.get("name"):
        sentences.append(f"What the domain needs was read off {tokens:,} tokens of its text ({data['name']}).")
    if facts.report is not None and facts.report.loss.recovered is not None:
        sentences.append("Then it was trained on text of the domain.")
    return sentences


def _units(what: str, dense: Sequence[int], kept: Sequence[int]) -> str:
    total, left = sum(dense), sum(kept)
    if total == left:
        return f"{what}: all {total:,} stayed."
    spread = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"
    return (
        f"{what}: {total - left:,} of {total:,} are gone ({(total - left) / total:.0%}); a layer keeps {spread} of "
        f"{max(dense):,}."
    )


def matrix(facts: dict[str, Facts]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the domain matrix: each pruned model against its base, on each text it was measured on."""
    by_model = {name: _losses(fact) for name, fact in facts.items()}
    texts = list(dict.fromkeys(text for losses in by_model.values() for text in losses))
    rows = [[name, *(_change(losses.get(text)) for text in texts)] for name, losses in by_model.items() if losses]
    return ["model", *texts], rows


def _losses(facts: Facts) -> dict[str, LossFacts]:
    """Losses by the name of the text, the own domain first."""
    found = {}
    if facts.report is not None:
        found[OWN] = facts.report.loss
        if facts.report.general is not None:
            found[GENERAL] = facts.report.general.loss
    return found | {name: report.loss for name, report in facts.others.items()}


def _change(loss: LossFacts | None) -> str:
    if loss is None:
        return "not measured"
    comparison = loss.recovered_comparison or loss.comparison
    if comparison is None:
        return "one model only"
    return f"{_percent(comparison.bits_per_byte_ratio)}, {comparison.num_documents:,} documents"


def _percent(ratio: Estimate) -> str:
    text = f"{100 * (ratio.value - 1):+.1f} %"
    if ratio.interval is None:
        return text
    return f"{text} [{', '.join(f'{100 * (bound - 1):+.1f}' for bound in ratio.interval)}]"


def questions(facts: dict[str, Facts]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the multiple-choice table; no row where no report has questions."""
    rows = []
    for name, fact in facts.items():
        for text, report in [(OWN, fact.report), *fact.others.items()]:
            choice = report.multiple_choice if report is not None else None
            if choice is None or choice.pruned is None:
                continue
            for base, pruned in zip(choice.base, choice.pruned, strict=True):
                asked = f"{choice.name}, {base.source}" if text == OWN else f"{text}: {choice.name}, {base.source}"
                right = (_share(base.accuracy), _share(pruned.accuracy))
                rows.append([name, asked, f"{base.num_questions:,}", *right, f"{base.chance:.0%}"])
    return ["model", "questions", "n", "dense right", "pruned right", "by guessing"], rows


def _share(accuracy: Estimate) -> str:
    text = f"{accuracy.value:.1%}"
    if accuracy.interval is None:
        return text
    return f"{text} [{', '.join(f'{100 * bound:.1f}' for bound in accuracy.interval)}]"


def figures(report: EvalReport | None) -> list[list[str]]:
    """Rows of the report's own table: measure, base, pruned, change; none without two models."""
    if report is None or report.size.pruned_parameters is None:
        return []
    return [list(row) for row in table_rows(report)]
