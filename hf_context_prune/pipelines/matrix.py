"""The domain matrix: prune once for every domain, and measure every model on every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.data.balance import identify_sources
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import ConfigError, LoadError, SaveError, unknown_name
from hf_context_prune.evaluation.options import MAX_TEST_TOKENS, QuestionOptions
from hf_context_prune.evaluation.reports.files import check_report_folder, write_run
from hf_context_prune.evaluation.reports.report import Environment, EvalReport
from hf_context_prune.evaluation.scores import ROW_LAYOUT, HeldOut, Scores, choose_held_out, score
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.available_units import choose_units, without_tokens
from hf_context_prune.pruning.calibration.samples import CalibrationSet, check_share
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.notes import plan_notes
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.unused_options import warn_of_unused_options
from hf_context_prune.publishing.card.card import make_card
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded, load_model
from hf_context_prune.storage.provenance import collect_provenance
from hf_context_prune.storage.results_log import open_results_log
from hf_context_prune.storage.saving import count_weight_bytes, save_pruned
from hf_context_prune.storage.staging import check_target
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.version import __version__

from .matrix_report import DENSE, DomainMatrix, mixed_name
from .validation_text import choose_token_probe

REFERENCE = "general"
ROWS_NAME, MODELS = "matrix.jsonl", "models"


@reserves("output")
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
    mixes: Mapping[str, Sequence[float]] | None = None,
    max_tokens: int | None = MAX_TEST_TOKENS,
) -> DomainMatrix:
    """Prune a model once for each domain, and measure every result on every domain.

    Writes ``eval_report.json``, ``matrix.md`` with its pictures, ``matrix.jsonl`` and the pruned folders with report
    and card (``models/<domain>``); a run that was killed resumes from there.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        domains: Text by the name of the domain; two or more.
        output: Folder of all results.
        config: What to remove and how: the same for all.
        tokenizer: As for [`prune`][].
        eval_data: Test text by domain; a domain without one holds out a tenth of its documents. Documents that any
            of the calibration texts has too are dropped.
        questions: Multiple-choice questions by domain.
        reference: The domain that the others are compared with: general text. None: ``general``, if it is there.
        mixes: Shares of the reference's calibration text to mix in (`general_data_ratio`), by domain: one more model
            each (``models/<domain>+<share>``), measured on the text of the domain and of the reference.
        max_tokens: Largest number of test tokens per domain, in passages of many documents.

    Raises:
        ConfigError: See [`check_matrix`][].
        ContextPruneError: See `hf_context_prune.errors`. Finished models and rows stay.
    """
    config, folder = config or PrunerConfig(), resolve_path(output, SaveError)
    names = tuple(domains)
    shares = {domain: tuple(some) for domain, some in (mixes or {}).items()}
    reference = check_matrix(names, folder, config, eval_data or {}, questions or {}, reference, shares)
    base = ensure_loaded(model, tokenizer)
    config, tokens_stay = choose_units(base.model, base.tokenizer, config)
    check_budget(base.model, base.tokenizer, config)
    warn_of_unused_options(config)
    train, held_out, splits = _texts(base, domains, eval_data or {}, questions or {}, config, max_tokens)
    single = next((text.name for text in train.values() if len(text) < 2), None)
    if single is not None and config.searches_tokens and config.units is None:  # the same units for all models
        config, tokens_stay = without_tokens(config), f"{single} is a single document, so none can be withheld."
    setting = {
        "version": __version__,
        "row_layout": ROW_LAYOUT,
        "model": [base.name, fingerprint(base.model), str(base.model.dtype)],
        "config": config.to_dict(),
        "domains": {name: text.fingerprint for name, text in train.items()},
        **({"sources": {n: identify_sources(text) for n, text in train.items()}} if config.balance_sources else {}),
        "held_out": {name: one.setting() for name, one in held_out.items()},
    }
    scores: dict[tuple[str, str], Scores] = {}
    members = [_Member(name, name, train[name], config, tokens_stay=tokens_stay) for name in names]
    for domain, some in shares.items():
        for share in some:
            general = None if reference is None else train[reference]
            mixed = replace(config, general_data_ratio=share)
            members.append(_Member(mixed_name(domain, share), domain, train[domain], mixed, general, tokens_stay))
    with open_results_log(folder / ROWS_NAME, setting) as rows:
        for member in members:  # before the long work
            _is_finished(base, member, folder / MODELS / member.name)
        for one in tqdm([None, *members], desc="Matrix", unit="model", name="hf_context_prune.matrix"):
            loaded: list[LoadedModel] = []

            def smaller(one: _Member | None = one, loaded: list[LoadedModel] = loaded) -> LoadedModel:
                if not loaded:  # nothing is loaded or pruned where all rows are there
                    loaded.append(base if one is None else _load_or_prune(base, one, folder / MODELS / one.name))
                return loaded[0]

            name = DENSE if one is None else one.name
            for measured, kept in held_out.items():
                if one is not None and one.general is not None:  # a curve of losses on two texts
                    if measured not in (one.domain, reference):
                        continue
                    kept = replace(kept, questions=None)
                # What is mixed in depends on the reference.
                key = [name, measured] if one is None or one.general is None else [name, measured, reference]
                row = rows.get_or_measure(
                    key,
                    lambda kept=kept, get=smaller: score(get().model, get().tokenizer, kept).to_row(kept),  # type: ignore[misc]
                )
                scores[name, measured] = Scores.from_row(row, kept)
        result = DomainMatrix(base.name, names, held_out, splits, scores, reference, config.pruning_seed, shares)
        environment = Environment.current(dtype_name(base.model))
        write_run(result.run_report(environment), folder)
        for member in members:
            if not (folder / MODELS / member.name).exists():  # removed by hand since its rows were measured
                _load_or_prune(base, member, folder / MODELS / member.name)
            _write_report(result, member, base, folder / MODELS / member.name, environment)
    return result


@dataclass(frozen=True)
class _Member:
    """A model of the matrix.

    Attributes:
        name: Name of its rows and its folder.
        domain: Domain that it is calibrated on.
        text: Calibration text of the domain.
        config: All choices; with `general_data_ratio` where general text is mixed in.
        general: General text, where some is mixed in.
        tokens_stay: Why no token is removed, where the budget could have removed some.
    """

    name: str
    domain: str
    text: TextSource
    config: PrunerConfig
    general: TextSource | None = None
    tokens_stay: str | None = None

    @property
    def calibration(self) -> CalibrationSet:
        """The text that the model is calibrated on."""
        return CalibrationSet(self.text, self.config, self.general)

    def identity(self, base: LoadedModel) -> dict[str, Any]:
        """Return the fields that identify this model when a run is resumed.

        The base's card is left out, because it may change on the Hub.
        """
        return {
            "base_model": base.name,
            "base_revision": base.revision,
            "dtype": str(base.model.dtype),
            "data": self.text.identity,
            **({} if self.general is None else {"general_data": self.general.identity}),
        }


def check_matrix(
    names: tuple[str, ...],
    output: Path,
    config: PrunerConfig | ThresholdConfig,
    eval_data: Mapping[str, Any],
    questions: Mapping[str, Any],
    reference: str | None,
    mixes: Mapping[str, Sequence[float]],
) -> str | None:
    """Refuse, before a model is loaded, what [`domain_matrix`][] would refuse.

    Returns:
        The domain that the others are compared with, if there is one.

    Raises:
        ConfigError: Fewer than two domains, a bad name, a size that differs from domain to domain, general text mixed
            into all of them, or a share of it out of range.
        SaveError: The output can't be written.
    """
    if len(names) < 2:
        raise ConfigError(f"There {'is one domain' if names else 'are no domains'}; a matrix needs two or more.")
    for name in names:
        if name == DENSE or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"The domain is named {name!r}; names are letters, digits, - and _, and {DENSE!r} is the model itself."
            )
    by_domain = {"eval_data": eval_data, "questions": questions, "mixes": mixes, "reference": [reference or names[0]]}
    for what, given in by_domain.items():
        for name in given:
            if name not in names:
                raise ConfigError(unknown_name(f"domain of {what}", name, names))
    if isinstance(config, ThresholdConfig):
        raise ConfigError(
            "The paper's thresholds would give every domain's model a size of its own; a matrix compares models of one "
            "size. Give pruning_ratio, vocab_size, or both."
        )
    if config.max_loss_increase is not None:
        raise ConfigError(
            f"max_loss_increase is {config.max_loss_increase:g}, which gives every domain's model another size; a "
            f"matrix compares models of one size. Give pruning_ratio."
        )
    varying = [name for name in ("vocab_coverage", "vocab_min_count") if getattr(config, name) is not None]
    if varying:
        raise ConfigError(
            f"{', '.join(varying)} would give every domain's model a size of its own; a matrix compares models of one "
            f"size. Give pruning_ratio, vocab_size, or both."
        )
    if config.general_data_ratio:
        raise ConfigError(
            f"general_data_ratio is {config.general_data_ratio:g} for every domain; a matrix has a curve of it: "
            f"give mixes (--mix) for single domains instead."
        )
    if config.domain is not None:
        raise ConfigError(
            f"domain is {config.domain!r}, which the cards of all models would name; leave domain out: each model is "
            f"saved under the name of its own domain."
        )
    reference = reference or (REFERENCE if REFERENCE in names else None)
    for name, shares in mixes.items():
        if reference is None or name == reference:
            raise ConfigError(
                f"mixes has shares of general text for {name}, but "
                + ("that is the general text." if reference else "no domain is general text: name it as reference.")
            )
        given = ", ".join(map(str, shares))
        if len({mixed_name(name, share) for share in shares}) < len(shares) or not all(0 < x < 1 for x in shares):
            raise ConfigError(
                f"mixes of {name} are {given}; they must be above 0 and below 1, each once: 0 and 1 are the models of "
                f"{name} and {reference}."
            )
        for share in shares:
            check_share(f"The share of general text mixed in for {name}", share, config.num_calibration_samples)
    check_report_folder(output, "matrix")
    return reference


def _texts(
    base: LoadedModel,
    domains: Mapping[str, Any],
    eval_data: Mapping[str, Any],
    questions: Mapping[str, QuestionOptions],
    config: PrunerConfig,
    max_tokens: int | None,
) -> tuple[dict[str, TextSource], dict[str, HeldOut], dict[str, str]]:
    """Return calibration text, test text and questions, and how they were kept apart, each by domain."""
    train, given, splits = dict[str, TextSource](), dict[str, TextSource](), dict[str, str]()
    for name, data in domains.items():
        split = TextSplit.of(
            data,
            eval_data.get(name),
            tokenizer=base.tokenizer,
            text_column=config.text_column,
            seed=config.pruning_seed,
        )
        train[name], given[name], splits[name] = split.calibration, split.test, split.how
    held_out, named = {}, dict[str, str]()
    for name, text in train.items():
        if (same := named.setdefault(text.fingerprint, name)) != name:
            raise ConfigError(
                f"{same} and {name} are the same text ({text.name}), so their models would be the same. Give each its "
                f"own."
            )
    named = {}
    for name, text in given.items():
        if (same := named.setdefault(text.fingerprint, name)) != name:
            raise ConfigError(f"{same} and {name} are measured on the same text ({text.name}); give each its own.")
        left, number = text, len(text)
        for other, calibration in train.items():
            left = left if other == name else drop_overlapping(left, calibration)[0]
            if not len(left):
                raise ConfigError(
                    f"Other domains calibrate on all {number:,} test documents of {name}; the last are in the text "
                    f"of {other}. Give other text for {name} or {other}, or test text of its own (--eval-data "
                    f"{name}=SOURCE)."
                )
        if number > len(left):
            splits[name] += (
                f" {number - len(left):,} more were dropped, because the other domains' calibration text has them."
            )
        held_out[name] = choose_held_out(
            left,
            base.tokenizer,
            max_tokens=max_tokens,
            max_seq_length=config.max_seq_length,
            questions=questions.get(name),
        )
    return train, held_out, splits


def _write_report(
    result: DomainMatrix, member: _Member, base: LoadedModel, folder: Path, environment: Environment
) -> None:
    """Put the report and the card into a model's folder, unless an earlier run left the same there."""
    report = result.model_report(
        member.name,
        member.domain,
        environment,
        base_bytes=None if base.folder is None else count_weight_bytes(base.folder),
        pruned_bytes=count_weight_bytes(folder),
        asked=ParameterBudget.of(member.config, result.scores[DENSE, member.domain].parameters).asked_ratio,
        notes=plan_notes(PruningPlan.load(folder / PLAN_NAME), member.calibration),
    )
    if (folder / REPORT_NAME).is_file():
        older = EvalReport.load(folder / REPORT_NAME)
        if replace(older, created=report.created, environment=report.environment) == report:
            return
    make_card(folder, report=report)


def _is_finished(base: LoadedModel, member: _Member, folder: Path) -> bool:
    """Return whether an earlier run left this model in its folder.

    Raises:
        ConfigError: The folder holds another model.
        SaveError: The folder holds something else, or can't be written.
    """
    if not (folder / PLAN_NAME).is_file():
        check_target(folder)
        return False
    plan, asked = PruningPlan.load(folder / PLAN_NAME), {**member.identity(base), "config": member.config.to_dict()}
    known = {name: plan.provenance.get(name) for name in asked}
    if plan.model_fingerprint != fingerprint(base.model) or known != asked:
        raise ConfigError(
            f"{folder} holds a model that was pruned from another one, or with other options or text. Name another "
            f"--output, or remove it."
        )
    return True


def _load_or_prune(base: LoadedModel, member: _Member, folder: Path) -> LoadedModel:
    """Load a model from its folder, after pruning it if no earlier run left it there."""
    if not _is_finished(base, member, folder):
        provenance = collect_provenance(base) | member.identity(base)
        if member.tokens_stay is not None:
            provenance["all_tokens_stay"] = member.tokens_stay
        config, probe, _ = choose_token_probe(base, member.calibration, member.config)
        pruned = prune_model(
            base.model, base.tokenizer, member.calibration, config, token_probe=probe, provenance=provenance
        )
        save_pruned(pruned.model, folder, tokenizer=pruned.tokenizer, plan=pruned.plan)
    try:
        return load_model(folder, device=str(base.model.device))
    except LoadError as error:
        raise LoadError(f"{error} Or remove {folder}: the same command makes it again.") from error
