"""Text that chooses and is never reported: for the size of `max_loss_increase`, and for ``vocab_size="auto"``."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.losses import mean_bits_per_byte
from hf_context_prune.evaluation.perplexity import choose_documents, document_losses
from hf_context_prune.evaluation.reports.report import SizeSearch
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.token_budget import VocabularyProbe
from hf_context_prune.utils.distributed import on_main_process

_VALIDATION_TOKENS = 12_000
"""Upper limit of the tokens that a size is searched on, in whole documents."""
_PROBE_TOKENS = 8_000
"""Upper limit of the tokens that vocabularies are compared on, in whole documents."""


@dataclass(frozen=True)
class ValidationText:
    """Documents of the domain that are neither calibrated on nor reported: the size is searched on them.

    Attributes:
        text: The documents.
        docs: Names of the documents that are scored.
        max_seq_length: Tokens per window.
        num_dropped: Documents that were dropped because the calibration text has them too.
    """

    text: TextSource
    docs: tuple[str, ...]
    max_seq_length: int
    num_dropped: int

    @classmethod
    def withheld_from(
        cls,
        text: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        config: CalibrationConfig,
        general: TextSource | None = None,
    ) -> tuple[TextSource, ValidationText]:
        """Withhold a tenth of the documents of the calibration text.

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
        own, _ = drop_overlapping(given, rest)
        if general is not None:
            own, _ = drop_overlapping(own, general)
        if not len(own):
            beside = "" if general is None else f" or the general text {general.name}"
            raise DataError(
                f"max_loss_increase searches on documents withheld from the calibration text {text.name}, but the "
                f"rest{beside} repeats all {len(given):,} of them. Give text with fewer repetitions, or use "
                f"pruning_ratio."
            )
        docs = choose_documents(own, tokenizer, max_tokens=_VALIDATION_TOKENS)
        return rest, cls(own, tuple(docs), config.max_seq_length, len(given) - len(own))

    def bits_per_byte(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the loss of a model on these documents; comparable between tokenizers."""
        losses = document_losses(model, tokenizer, self.text, max_seq_length=self.max_seq_length, docs=self.docs)
        return mean_bits_per_byte(losses)

    def describe_search(self, plan: PruningPlan) -> SizeSearch:
        """Return what the size search found, from the plan's provenance."""
        facts = plan.provenance["loss_budget"]
        dropped = f" ({self.num_dropped:,} repeat calibration text and were dropped)" if self.num_dropped else ""
        text = (
            f"The size was searched on at most {_VALIDATION_TOKENS:,} tokens of {len(self.text):,} documents of "
            f"{self.text.name}{dropped}, withheld from calibration and from the test text: "
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

    def measure_base() -> tuple[list[str], int]:
        base = document_losses(model, tokenizer, withheld, max_seq_length=length, max_tokens=_PROBE_TOKENS)
        return [loss.doc for loss in base], sum(loss.num_tokens for loss in base)

    docs, base_tokens = on_main_process(measure_base)

    def loss(candidate: PreTrainedModel, own: PreTrainedTokenizerBase) -> float:
        losses = document_losses(candidate, own, withheld, max_seq_length=length, docs=docs)
        return sum(loss.nll for loss in losses) / base_tokens

    return VocabularyProbe(counted, loss)
