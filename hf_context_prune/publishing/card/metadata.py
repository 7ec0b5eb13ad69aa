"""The YAML of a card, as `ModelCardData`; values that the Hub would refuse or misread stay in the text alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from hf_context_prune.evaluation.reports.markdown import one_line
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.publishing.prompts import choose_plan_prompts
from hf_context_prune.utils.hub_ids import is_hub_id
from hf_context_prune.utils.rounding import six_digits

from .facts import CardFacts

TAGS = ("pruned", "structured-pruning", "context-pruning")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})*|code|multilingual")
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OF_IMAGES = "image-text-to-text"
_LINK = re.compile(r"https?://[^\s\"'<>]+|[A-Za-z0-9._-]+")


def card_data(facts: CardFacts) -> ModelCardData:
    """Build the metadata of a card."""
    domain = [_slug(facts.domain)] if facts.domain and _slug(facts.domain) else []
    data = _hub_id(_dataset(facts.recorded("data")))
    results = _results(facts) if facts.report else []
    return ModelCardData(
        library_name="transformers",
        datasets=[data] if data else None,
        tags=[*TAGS, *domain],
        widget=[{"text": prompt} for prompt in choose_plan_prompts(facts.plan)[:-1]],
        model_name=one_line(facts.name) if results else None,
        eval_results=results or None,
        **_of_base(facts.base, "finetune", reads_images=facts.reads_images),
    )


def export_data(base: Mapping[str, Any], library: str | None, tags: Sequence[str]) -> ModelCardData:
    """Build the metadata of an export's card.

    Args:
        base: The facts that the base states of itself.
        library: The Hub's name of the library that opens the export; None where the Hub has none.
        tags: Its tags.
    """
    return ModelCardData(library_name=library, tags=list(tags), **_of_base(base, "quantized"))


def _of_base(stated: Mapping[str, Any], relation: str, *, reads_images: bool = False) -> dict[str, Any]:
    """Return what a card repeats of its base: id, task, languages and licence, as far as they are stated."""
    task = _matching(_TASK, stated.get("pipeline_tag"))
    if reads_images:
        task = _OF_IMAGES
    elif task == _OF_IMAGES:  # the text part alone
        task = None
    licence, base = _matching(_LICENCE, stated.get("license")), _hub_id(stated.get("id"))
    return {
        "pipeline_tag": task or "text-generation",
        "base_model": base,
        "base_model_relation": relation if base else None,
        "language": _languages(stated.get("language")),
        "license": licence,
        "license_name": one_line(stated["license_name"]) if licence and "license_name" in stated else None,
        "license_link": _link(stated, base) if licence else None,
    }


def benchmark_results(report: EvalReport) -> str | None:
    """Return the answers to a Hub data set of questions as ``.eval_results/*.yaml``; None for other questions."""
    facts = report.multiple_choice
    if facts is None or facts.revision is None or facts.pruned is None:
        return None
    name, _, config = facts.name.partition("@")[0].partition(":")
    if (dataset := _hub_id(name)) is None:
        return None
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=one_line(config) or "default",
        value=round(100 * facts.pruned[-1].accuracy.value, 4),
        dataset_revision=facts.revision,
        date=report.created,
        notes=f"accuracy in %, {facts.pruned[-1].num_questions} questions, {facts.num_fewshot}-shot, {facts.scorer}",
    )
    return str(yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def _results(facts: CardFacts) -> list[EvalResult]:
    report = facts.report
    assert report is not None
    texts = [("domain", "test text of the domain", report.dataset, report.loss)]
    if report.general is not None:
        texts.append(("general", "general text", report.general.dataset, report.general.loss))
    results = []
    for kind, what, dataset, loss in texts:
        last = loss.last
        common: dict[str, Any] = {
            "task_type": "text-generation",
            **_identity(dataset.name, dataset.revision, "text", kind),
            "dataset_name": one_line(f"{dataset.name} ({what})"),
            "dataset_revision": dataset.revision,
        }
        results.append(
            EvalResult(metric_type="bits_per_byte", metric_value=six_digits(last.bits_per_byte.value), **common)
        )
        compared = loss.last_comparison
        if compared is None or compared.excess_nats_per_token is not None:  # else of other tokens than the base's
            results.append(
                EvalResult(metric_type="perplexity", metric_value=six_digits(last.perplexity.value), **common)
            )
    questions = report.multiple_choice
    if questions is not None and questions.pruned is not None:
        results.append(
            EvalResult(
                task_type="text-generation",
                **_identity(questions.name, questions.revision, "multiple-choice", "questions"),
                dataset_name=one_line(questions.name),
                dataset_revision=questions.revision,
                metric_type="accuracy",
                metric_value=six_digits(questions.pruned[-1].accuracy.value),
            )
        )
    return results


def _identity(name: str, revision: str | None, local: str, kind: str) -> dict[str, Any]:
    """Return data set, config and split of a name; the client takes figures of one identity for figures on one text.

    A data set of the Hub has a revision; without one, ``law/validation.jsonl`` is a file of that name.
    """
    path, _, split = name.partition("@")
    repo, _, config = path.partition(":")
    if revision is None or (found := _hub_id(repo)) is None:
        return {"dataset_type": local, "dataset_split": kind}
    return {"dataset_type": found, "dataset_config": one_line(config) or None, "dataset_split": one_line(split) or kind}


def _dataset(data: Any) -> object:  # noqa: ANN401 - of the provenance
    """Return the id of the calibration text if it is a data set of the Hub, which has a revision; else None."""
    name = data.get("name") if data.get("revision") else None
    return name.partition("@")[0].partition(":")[0] if isinstance(name, str) else None


def _hub_id(value: object) -> str | None:
    return value if is_hub_id(value) else None


def _matching(form: re.Pattern[str], value: object) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _languages(value: object) -> str | list[str] | None:
    given: Iterable[object] = value if isinstance(value, list) else [value]
    return [found for item in given if (found := _matching(_LANGUAGE, item))] or None


def _link(stated: Mapping[str, Any], base: str | None) -> str | None:
    """Return a link to the licence; a relative one leads into the repository of the base."""
    link = _matching(_LINK, stated.get("license_link"))
    if link is None or link.startswith("http"):
        return link
    return f"https://huggingface.co/{base}/blob/main/{link}" if base else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50]
