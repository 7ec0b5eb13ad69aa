"""Text that chooses and is never reported: for the size of `max_loss_increase`, and for the tokens of a budget."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.passages import SHORT_CHARS, Passages
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import SizeSearch
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.available_units import without_tokens
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.unit_curves import ProbeText, TokenProbe
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.distributed import on_main_process

_VALIDATION_TOKENS = 12_000
"""Upper limit of the tokens that a size is searched on, in whole documents."""
_PROBE_TOKENS = 6_000
"""Upper limit of the tokens that vocabularies are compared on, in passages of about 30 documents."""


def withhold_size_text(
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    config: CalibrationConfig,
    general: TextSource | None = None,
) -> tuple[TextSource, ValidationText]:
    """Withhold a tenth of the documents of the calibration text, to search the size of `max_loss_increase` on.

    Args:
        text: Text of the domain.
        tokenizer: The tokenizer of the base model.
        config: Seed and window length.
        general: General text that is calibrated on too.

    Returns:
        (the rest to calibrate on, the validation text without documents that the rest or `general` repeats).

    Raises:
        DataError: There is a single document, or what is calibrated on repeats all of them.
    """
    try:
        rest, given = hold_out_documents(text, seed=config.pruning_seed)
    except DataError as error:
        raise DataError(
            f"max_loss_increase searches on documents withheld from the calibration text, and {text.name} has one "
            f"left to calibrate on. Give more documents, or use pruning_ratio."
        ) from error
    others = [rest] if general is None else [rest, general]
    validation = ValidationText.apart_from(
        given, *others, tokenizer=tokenizer, max_tokens=_VALIDATION_TOKENS, max_seq_length=config.max_seq_length
    )
    if not len(validation.text):
        beside = "" if general is None else f" or the general text {general.name}"
        raise DataError(
            f"max_loss_increase searches on documents withheld from the calibration text {text.name}, but the "
            f"rest{beside} repeats all {len(given):,} of them. Give text with fewer repetitions, or use "
            f"pruning_ratio."
        )
    return rest, validation


def describe_size_search(validation: ValidationText, plan: PruningPlan) -> SizeSearch:
    """Return what the size search found, from the plan's provenance."""
    facts = plan.provenance["loss_budget"]
    count = validation.num_dropped
    dropped = f" ({count:,} repeat calibration text and were dropped)" if count else ""
    text = (
        f"The size was searched on at most {_VALIDATION_TOKENS:,} tokens of {len(validation.text):,} documents of "
        f"{validation.text.name}{dropped}, withheld from calibration and from the test text: "
        f"{facts['increase']:+.2%} bits per byte there, {facts['max_loss_increase']:+.2%} allowed."
    )
    return SizeSearch(facts["max_loss_increase"], facts["increase"], text, len(facts["trials"]))


def choose_token_probe(
    base: LoadedModel, calibration: CalibrationSet, config: PrunerConfig
) -> tuple[PrunerConfig, TokenProbe | None, str | None]:
    """Withhold the text that vocabularies are compared on; of a single document nothing can be, so all tokens stay.

    Returns:
        (the config, the text, why all tokens stay).

    Raises:
        DataError: There is a single document, and the config asks for tokens.
    """
    weighed = config.searches_tokens or config.searches_layers or config.native_architecture is None
    if not (config.shares_budget and weighed):
        return config, None, None  # nothing depends on the base model's loss
    try:
        return config, withhold_token_probe(base.model, base.tokenizer, calibration, config), None
    except DataError as error:
        if config.units is not None and config.searches_tokens:
            raise
        return (without_tokens(config), None, str(error)) if config.searches_tokens else (config, None, None)


def withhold_token_probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSet, config: CalibrationConfig
) -> TokenProbe:
    """Withhold documents of the calibration text that vocabularies are compared on; see [`measure_units`][].

    Of several documents of general text that are calibrated on, some are withheld too; their loss counts by its share.
    With `balance_sources`, the domain's sources count equally.

    Raises:
        DataError: The domain's text is a single document.
    """
    several = calibration.general is not None and len(calibration.general) > 1
    share = (config.general_data_ratio or 0.0) if several else 0.0
    balances = config.balance_sources
    parts = [_Part.of(model, tokenizer, calibration.domain, 1 - share, config, balance_sources=balances)]
    if calibration.general is not None and share:
        parts.append(_Part.of(model, tokenizer, calibration.general, share, config))

    def loss(candidate: PreTrainedModel, own: PreTrainedTokenizerBase) -> float:
        return sum(part.weight * part.loss(candidate, own) for part in parts)

    base_loss = sum(part.weight * part.base_loss for part in parts)
    texts = tuple(ProbeText(part.withheld, part.measured, part.weight, part.balance_sources) for part in parts)
    return TokenProbe(parts[0].counted, loss, base_loss, texts, parts[1].counted if len(parts) > 1 else None)


@dataclass(frozen=True)
class _Part:
    """Documents withheld from one text, with the base model's loss on passages of some of them."""

    counted: TextSource
    withheld: TextSource
    measured: TextSource
    base_tokens: int
    base_loss: float
    weight: float
    max_seq_length: int
    balance_sources: bool

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: TextSource,
        weight: float,
        config: CalibrationConfig,
        *,
        balance_sources: bool = False,
    ) -> _Part:
        try:
            counted, withheld = hold_out_documents(text, seed=config.pruning_seed)
        except DataError as error:
            raise DataError(
                f"Vocabularies are compared on documents withheld from the calibration text {text.name}, which is a "
                f"single one. Give text of several documents, a number of tokens (vocab_size), or other units "
                f"(units='neurons,kv_groups')."
            ) from error
        clean, _ = drop_overlapping(withheld, counted)  # a document that others repeat has no token of its own
        withheld = clean if len(clean) else withheld
        most, length = max(1, round(weight * _PROBE_TOKENS)), config.max_seq_length
        measured = Passages.of(
            withheld,
            tokenizer,
            max_tokens=most,
            passage_chars=SHORT_CHARS,
            seed=config.pruning_seed,
            balance_sources=balance_sources,
        ).text

        def measure_base() -> tuple[int, float]:
            with bfloat16_layers(model):
                base = document_losses(model, tokenizer, measured, max_seq_length=length)
            tokens = sum(loss.num_tokens for loss in base)
            return tokens, sum(loss.nll for loss in base) / tokens

        tokens, base_loss = on_main_process(measure_base)
        return cls(counted, withheld, measured, tokens, base_loss, weight, length, balance_sources)

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the loss of a model with its tokenizer, in nats per token of the base tokenizer."""
        with bfloat16_layers(model):
            losses = document_losses(model, tokenizer, self.measured, max_seq_length=self.max_seq_length)
        return sum(loss.nll for loss in losses) / self.base_tokens
