"""The domain matrix: prune once for every domain, measure each model on every domain. Does the context matter?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from .allocation import Budget
from .base_card import provenance_of
from .calibration_text import check_general_mix
from .card import rewrite_card
from .config import THRESHOLDS, PrunerConfig
from .data import TextSource
from .errors import ConfigError, unknown
from .evaluation import EvalReport, weight_bytes
from .files import check_writable, write_file
from .global_budget import check_budget, smaller_model
from .loading import LoadedModel, load_model
from .matrix_facts import DENSE, PICTURE_NAME, DomainMatrix
from .measuring import QuestionOptions
from .overlap import drop_overlapping
from .pipeline import as_loaded, split_text
from .plan import PruningPlan, fingerprint
from .rendering import matrix_picture
from .rows import open_rows
from .saving import PLAN_NAME, REPORT_NAME, check_target, save_pruned
from .scores import HeldOut, Scores, held_out_of, score

REFERENCE = "general"
ROWS_NAME, TABLE_NAME, MODELS = "matrix.jsonl", "matrix.md", "models"


def domain_matrix(
    model: PreTrainedModel | LoadedModel | str | Path,
    domains: Mapping[str, Any],
    output: str | Path,
    config: PrunerConfig | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    eval_data: Mapping[str, Any] | None = None,
    questions: Mapping[str, QuestionOptions] | None = None,
    reference: str | None = None,
    max_tokens: int | None = 20_000,
) -> DomainMatrix:
    """Prune a model once for each domain, and measure every result on every domain.

    Writes ``matrix.md``, ``matrix.png``, ``matrix.jsonl`` and the pruned folders with report and card
    (``models/<domain>``); a run that was killed goes on from there.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        domains: Text by the name of the domain; two or more.
        output: Folder of all results.
        config: What to remove and how: the same for all.
        tokenizer: As for [`prune`][].
        eval_data: Text for the figures by domain; a domain without one holds out a tenth of its documents. What any of
            the calibration texts has too is dropped.
        questions: Multiple-choice questions by domain.
        reference: The domain that the others are compared with: text of no domain. None: ``general``, if it is there.
        max_tokens: Held-out tokens a domain at most, whole documents.

    Raises:
        ConfigError: See [`check_matrix`][].
        ContextPruneError: See `hf_context_prune.errors`. What was finished stays.
    """
    config, folder = config or PrunerConfig(), Path(output)
    names = tuple(domains)
    reference = check_matrix(names, folder, config, eval_data or {}, questions or {}, reference)
    base = as_loaded(model, tokenizer)
    check_budget(base.model, base.tokenizer, config)
    train, held_out, splits = _texts(base, domains, eval_data or {}, questions or {}, config, max_tokens)
    setting = {
        "model": [base.name, fingerprint(base.model), str(base.model.dtype)],
        "config": config.to_dict(),
        "domains": {name: [text.name, text.fingerprint] for name, text in train.items()},
        "held_out": {name: one.setting() for name, one in held_out.items()},
    }
    scores: dict[tuple[str, str], Scores] = {}
    with open_rows(folder / ROWS_NAME, setting) as rows:
        for name, text in train.items():  # before the long work
            _finished(base, text, folder / MODELS / name, config)
        models = (DENSE, *names)
        for calibrated in tqdm(models, desc="Matrix", unit="model", name="hf_context_prune.matrix"):
            loaded: list[LoadedModel] = []

            def smaller(name: str = calibrated, loaded: list[LoadedModel] = loaded) -> LoadedModel:
                if not loaded:  # nothing is loaded or pruned where all rows are there
                    loaded.append(base if name == DENSE else _pruned(base, train[name], folder / MODELS / name, config))
                return loaded[0]

            for measured, one in held_out.items():
                row = rows.get(
                    [calibrated, measured],
                    lambda one=one, get=smaller: score(get().model, get().tokenizer, one).to_row(),  # type: ignore[misc]
                )
                scores[calibrated, measured] = Scores.from_row(row)
        result = DomainMatrix(base.name, names, held_out, splits, scores, reference, config.pruning_seed)
        changes = {(a, b): result.change(a, b).value for a in names for b in names}
        write_file(folder / PICTURE_NAME, matrix_picture(names, changes))
        write_file(folder / TABLE_NAME, result.markdown())
        for name in names:
            if not (folder / MODELS / name).exists():  # removed by hand since its rows were measured
                _pruned(base, train[name], folder / MODELS / name, config)
            _tell(result, name, base, folder / MODELS / name, config)
    return result


def check_matrix(
    names: tuple[str, ...],
    output: Path,
    config: PrunerConfig,
    eval_data: Mapping[str, Any],
    questions: Mapping[str, Any],
    reference: str | None,
) -> str | None:
    """Refuse what [`domain_matrix`][] would, before a model is loaded.

    Returns:
        The domain that the others are compared with, if there is one.

    Raises:
        ConfigError: Fewer than two domains, names that are none, a size that differs from domain to domain, or
            general text mixed into all of them.
        SaveError: The output can't be written.
    """
    if len(names) < 2:
        raise ConfigError(f"There {'is one domain' if names else 'are no domains'}; a matrix needs two or more.")
    for name in names:
        if name == DENSE or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"The domain is named {name!r}; names are letters, digits, - and _, and {DENSE!r} is the model itself."
            )
    for what, given in (("eval_data", eval_data), ("questions", questions), ("reference", [reference or names[0]])):
        for name in given:
            if name not in names:
                raise ConfigError(unknown(f"domain of {what}", name, names))
    if config.max_loss_increase is not None:
        raise ConfigError(
            f"max_loss_increase is {config.max_loss_increase:g}, which gives every domain's model another size; a "
            f"matrix compares models of one size. Give pruning_ratio."
        )
    varying = [name for name in (*THRESHOLDS, "vocab_coverage", "vocab_min_count") if getattr(config, name) is not None]
    if varying:
        raise ConfigError(
            f"{', '.join(varying)} would give every domain's model a size of its own; a matrix compares models of one "
            f"size. Give pruning_ratio, vocab_size, or both."
        )
    check_general_mix(config, None)
    check_writable(output)
    return reference or (REFERENCE if REFERENCE in names else None)


def _texts(
    base: LoadedModel,
    domains: Mapping[str, Any],
    eval_data: Mapping[str, Any],
    questions: Mapping[str, QuestionOptions],
    config: PrunerConfig,
    max_tokens: int | None,
) -> tuple[dict[str, TextSource], dict[str, HeldOut], dict[str, str]]:
    """Calibration text, what is held out, and a sentence on how, by domain."""
    train, given, splits = dict[str, TextSource](), dict[str, TextSource](), dict[str, str]()
    for name, data in domains.items():
        train[name], given[name], splits[name] = split_text(data, eval_data.get(name), config, base.tokenizer)
    held_out, named = {}, dict[str, str]()
    for name, text in train.items():
        if (same := named.setdefault(text.fingerprint, name)) != name:
            raise ConfigError(f"{same} and {name} are the same text ({text.name}), so nothing would tell them apart.")
    for name, text in given.items():
        left, number = text, len(text)
        for other, calibration in train.items():
            left = left if other == name else drop_overlapping(left, calibration)[0]
            if not len(left):
                raise ConfigError(
                    f"None of the {number:,} held-out documents of {name} is left that no other domain calibrates on; "
                    f"the last ones are in the text of {other}. Give other text for {name} or {other}, or "
                    f"held-out text of its own (--eval-data {name}=SOURCE)."
                )
        if number > len(left):
            splits[name] += f" {number - len(left):,} more were dropped: the other domains' calibration text has them."
        held_out[name] = held_out_of(
            left,
            base.tokenizer,
            max_tokens=max_tokens,
            max_seq_length=config.max_seq_length,
            questions=questions.get(name),
        )
    return train, held_out, splits


def _identity(base: LoadedModel, text: TextSource) -> dict[str, Any]:
    """What a model of a domain is known by; the base's card is not: it may lie on the Hub, and change."""
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "dtype": str(base.model.dtype),
        "data": text.identity,
    }


def _tell(result: DomainMatrix, name: str, base: LoadedModel, folder: Path, config: PrunerConfig) -> None:
    """Put the report and the card into a domain's folder, unless an earlier run left the same there."""
    report = result.report(
        name,
        str(base.model.dtype).removeprefix("torch."),
        base_bytes=None if base.folder is None else weight_bytes(base.folder),
        pruned_bytes=weight_bytes(folder),
        asked=Budget.of(config, result.scores[DENSE, name].parameters).asked_ratio,
    )
    if (folder / REPORT_NAME).is_file():
        older = EvalReport.load(folder / REPORT_NAME)
        if replace(older, created=report.created, environment=report.environment) == report:
            return
    rewrite_card(folder, report=report)


def _finished(base: LoadedModel, text: TextSource, folder: Path, config: PrunerConfig) -> bool:
    """Whether an earlier run left the very model of a domain in its folder.

    Raises:
        ConfigError: It holds another one.
        SaveError: It holds something else, or can't be written.
    """
    if not (folder / PLAN_NAME).is_file():
        check_target(folder)
        return False
    plan, asked = PruningPlan.load(folder / PLAN_NAME), {**_identity(base, text), "config": config.to_dict()}
    known = {name: plan.provenance.get(name) for name in asked}
    if plan.model_fingerprint != fingerprint(base.model) or known != asked:
        raise ConfigError(
            f"{folder} holds a model that was pruned from another one, or with other options or text. Name another "
            f"--output, or remove it."
        )
    return True


def _pruned(base: LoadedModel, text: TextSource, folder: Path, config: PrunerConfig) -> LoadedModel:
    """The model of a domain, from its folder if an earlier run left it there."""
    if not _finished(base, text, folder, config):
        model, tokenizer, plan = smaller_model(
            base.model, base.tokenizer, text, config, provenance=provenance_of(base) | _identity(base, text)
        )
        save_pruned(model, folder, tokenizer=tokenizer, plan=plan)
    return load_model(folder, device=str(base.model.device))
