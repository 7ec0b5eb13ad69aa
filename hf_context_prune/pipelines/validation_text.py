"""Text that chooses and is never reported: for the size of `max_loss_increase`, and for ``vocab_size="auto"``."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import SizeSearch
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.token_budget import VocabularyProbe
from hf_context_prune.utils.distributed import on_main_process

_VALIDATION_TOKENS = 12_000
"""Upper limit of the tokens that a size is searched on, in whole documents."""
_PROBE_TOKENS = 8_000
"""Upper limit of the tokens that vocabularies are compared on, in whole documents."""


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


def withhold_vocabulary_probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: TextSource, config: CalibrationConfig
) -> VocabularyProbe:
    """Withhold documents of the calibration text that vocabularies are compared on; see [`split_token_budget`][].

    Raises:
        DataError: The text has a single document.
    """
    try:
        counted, withheld = hold_out_documents(text, seed=config.pruning_seed)
    except DataError as error:
        raise DataError(
            f"vocab_size='auto' compares vocabularies on documents withheld from the calibration text {text.name}, "
            f"which is a single one. Give text of several documents, or a number of tokens (vocab_size)."
        ) from error
    length = config.max_seq_length

    def measure_base() -> tuple[list[str], int, float]:
        base = document_losses(model, tokenizer, withheld, max_seq_length=length, max_tokens=_PROBE_TOKENS)
        tokens = sum(loss.num_tokens for loss in base)
        return [loss.doc for loss in base], tokens, sum(loss.nll for loss in base) / tokens

    docs, base_tokens, base_loss = on_main_process(measure_base)

    def loss(candidate: PreTrainedModel, own: PreTrainedTokenizerBase) -> float:
        losses = document_losses(candidate, own, withheld, max_seq_length=length, docs=docs)
        return sum(loss.nll for loss in losses) / base_tokens

    return VocabularyProbe(counted, loss, base_loss)
