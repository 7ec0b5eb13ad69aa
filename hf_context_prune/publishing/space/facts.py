"""The facts in the tabs of a Space, from the plans and evaluation reports of its models alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

from hf_context_prune.errors import ConfigError, ContextPruneError, LoadError
from hf_context_prune.evaluation.reports.formatting import format_ratio, format_share
from hf_context_prune.evaluation.reports.report import EvalReport, LossFacts
from hf_context_prune.evaluation.reports.rows import table_rows
from hf_context_prune.modeling.depth import WARNING, describe_layers
from hf_context_prune.modeling.geometry import units_of
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.hub_errors import explain_hub_error
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.provenance import config_from_provenance
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME

from .example import Example
from .settings import Entry, Source

OWN = "own domain"
GENERAL = "general text"
_LOGGER = logging.getLogger(__name__)
_CRITERIA = {
    "random": "at random",
    "magnitude": "by the size of their weights",
    "l1": "by their mean activation on the domain's text (the paper's rule)",
    "wanda": "by weights times activations on the domain's text",
    "flap": "by how much their activations vary on the domain's text",
    "taylor": "by their first-order effect on the loss on the domain's text",
    "obs": "by the error that remains after the other units are refitted (optimal brain surgeon)",
}
_RECONSTRUCTIONS = {
    "none": "The layers were not reconstructed.",
    "bias": "The means of the removed units were added to the biases.",
    "least_squares": "The output projections were fitted to the remaining units by least squares.",
    "sequential": "The output projections were fitted layer by layer to the hidden states of the dense model.",
}


@dataclass(frozen=True)
class Facts:
    """The facts of a domain's pruned model.

    Attributes:
        plan: The pruning plan; None where it can't be read.
        report: The evaluation report; None where there is none.
        others: Reports on other texts, by name.
        problems: Reasons why a plan, report or example is missing.
        example: The finished example; None where there is none.
    """

    plan: PruningPlan | None = None
    report: EvalReport | None = None
    others: dict[str, EvalReport] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    example: Example | None = None

    @property
    def domain(self) -> str | None:
        """The name of the domain in the plan, if it was given."""
        return None if self.plan is None else self.plan.domain

    @property
    def data_name(self) -> str:
        """The name of the calibration text in the plan; may be empty."""
        return "" if self.plan is None else self.plan.data_name

    @property
    def share_removed(self) -> float | None:
        """The share of the parameters that was removed, where a report tells."""
        return self.report.size.achieved_ratio if self.report is not None else None


def read_facts(entry: Entry) -> Facts:
    """Read the plan, reports and example of an entry; a file that can't be read is named in `problems`."""
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
    example = attempt(lambda: Example.load(file)) if (file := entry.example) is not None else None
    return Facts(plan, report, others, tuple(problems), example)


def _fact_files(source: Source) -> tuple[Path, Path | None]:
    """Return the plan, and the report if there is one."""
    if source.path is not None:
        folder = source.path
        if not folder.is_dir():
            raise LoadError(f"There is no folder {folder}. `hf-context-prune demo` or `prune` makes one.")
        manifest = verify_folder(folder, hash_weights=False)
        return folder / PLAN_NAME, folder / REPORT_NAME if REPORT_NAME in manifest["files"] else None
    if source.repo is None:
        raise LoadError("The model of the demo is dense, so it can't be shown as a pruned one.")
    try:
        plan = hf_hub_download(source.repo, PLAN_NAME, revision=source.revision)
        try:
            report = hf_hub_download(source.repo, REPORT_NAME, revision=source.revision)
        except RemoteEntryNotFoundError:  # nothing was measured, as after a training
            return Path(plan), None
    except (OSError, ValueError, HTTPError) as error:
        raise LoadError(
            f"{PLAN_NAME} and {REPORT_NAME} of {source.repo} can't be fetched at {source.revision}: "
            f"{explain_hub_error(error)}. Check also that hf-context-prune wrote that repository."
        ) from error
    return Path(plan), Path(report)


def describe_removal(facts: Facts) -> list[str]:
    """Return sentences on the removed parts and the method; none without a plan."""
    plan, report = facts.plan, facts.report
    if plan is None:
        return []
    sentences = []
    if report is not None and report.size.pruned_parameters is not None:
        size = report.size
        gone = size.base_parameters - report.size.pruned_parameters
        sentences.append(
            f"{gone / 1e6:,.1f} of {size.base_parameters / 1e6:,.1f} million parameters were removed "
            f"({gone / size.base_parameters:.0%}). They are not set to zero: the matrices are smaller."
        )
    if (layers := describe_layers(plan)) is not None:
        sentences.append(f"{layers} {WARNING}")
    dense, kept = [plan.dense[index] for index in plan.kept_layers], plan.kept_widths
    if "experts" in units_of(dense):
        sentences.append(
            _describe_units("experts", [w.experts for w in dense], [w.experts for w in kept])
            + " A router sends every token to a few of them."
        )
    if (inside := plan.expert_neurons) is not None and inside.width < inside.dense:
        sentences.append(f"Every expert keeps {inside.width:,} of its {inside.dense:,} neurons.")
    if "neurons" in units_of(dense):
        sentences.append(
            _describe_units("MLP neurons", [w.neurons for w in dense], [w.neurons for w in kept])
            + " Each is a feature that a layer computes."
        )
    if "kv_groups" in units_of(dense):
        sentences.append(
            _describe_units("KV groups (attention heads)", [w.kv_groups for w in dense], [w.kv_groups for w in kept])
        )
    if plan.vocabulary is None:
        sentences.append("The vocabulary is complete.")
    else:
        kept_entries, all_entries = len(plan.vocabulary.kept), plan.vocabulary.dense
        sentences.append(
            f"Vocabulary: {kept_entries:,} of {all_entries:,} entries remain. A word whose entry was removed is spelt "
            f"in smaller pieces."
        )
    return sentences + _describe_method(facts)


def _describe_method(facts: Facts) -> list[str]:
    assert facts.plan is not None
    made = facts.plan.provenance
    sentences = []
    options = made.get("config")
    try:
        config = config_from_provenance(options) if options and isinstance(options, Mapping) else None
    except ConfigError as error:  # of a later version, or of no version at all
        _LOGGER.warning("The options of a plan can't be shown: %s", error)
        config = None
    if config is not None:
        sentences += [f"Units were chosen {_CRITERIA[config.criterion]}.", _RECONSTRUCTIONS[config.reconstruction]]
    data, tokens = made.get("data") or {}, made.get("num_calibration_tokens")
    if isinstance(tokens, int) and data.get("name"):
        sentences.append(f"Both read {tokens:,} tokens of the domain's text ({data['name']}).")
    if facts.report is not None and facts.report.loss.recovered is not None:
        sentences.append("The model was then trained on text of the domain.")
    return sentences


def _describe_units(what: str, dense: Sequence[int], kept: Sequence[int]) -> str:
    total, left, kept = sum(dense), sum(kept), [count for count in kept if count]  # without layers that have none
    if total == left:
        return f"{what}: all {total:,} remain."
    spread = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"
    return (
        f"{what}: {total - left:,} of {total:,} were removed ({(total - left) / total:.0%}); {spread} of "
        f"{max(dense):,} remain per layer."
    )


def domain_table(facts: dict[str, Facts]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the domain table: each pruned model against its base, on each measured text."""
    by_model = {name: _losses(fact) for name, fact in facts.items()}
    texts = list(dict.fromkeys(text for losses in by_model.values() for text in losses))
    rows = [[name, *(_change(losses.get(text)) for text in texts)] for name, losses in by_model.items() if losses]
    return ["model", *texts], rows


def _losses(facts: Facts) -> dict[str, LossFacts]:
    """Return losses by the name of the text, the own domain first."""
    found = {}
    if facts.report is not None:
        found[OWN] = facts.report.loss
        if facts.report.general is not None:
            found[GENERAL] = facts.report.general.loss
    return found | {name: report.loss for name, report in facts.others.items()}


def _change(loss: LossFacts | None) -> str:
    if loss is None:
        return "not measured"
    comparison = loss.last_comparison
    if comparison is None:
        return "one model only"
    documents = "1 document" if comparison.num_documents == 1 else f"{comparison.num_documents:,} documents"
    return f"{format_ratio(comparison.bits_per_byte_ratio)}, {documents}"


def question_table(facts: dict[str, Facts]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the multiple-choice table; no row where no report has questions."""
    rows = []
    for name, fact in facts.items():
        for text, report in [(OWN, fact.report), *fact.others.items()]:
            choice = report.multiple_choice if report is not None else None
            if choice is None or choice.pruned is None:
                continue
            for base, pruned in zip(choice.base, choice.pruned, strict=True):
                asked = f"{choice.name}, {base.source}" if text == OWN else f"{text}: {choice.name}, {base.source}"
                right = (format_share(base.accuracy), format_share(pruned.accuracy))
                rows.append([name, asked, f"{base.num_questions:,}", *right, f"{base.chance:.0%}"])
    return ["model", "questions", "n", "dense correct", "pruned correct", "guessing"], rows


def report_rows(report: EvalReport | None) -> list[list[str]]:
    """Return the rows of the report: measure, base, pruned, change; none without two models."""
    if report is None or report.size.pruned_parameters is None:
        return []
    return [list(row) for row in table_rows(report)]
