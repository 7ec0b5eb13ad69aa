"""The text on which `max_loss_increase` searches the size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.perplexity import choose_documents, document_losses
from hf_context_prune.evaluation.reports.report import SizeSearch
from hf_context_prune.modeling.plan import PruningPlan

_TOKENS = 12_000
"""Withheld tokens on which a size is searched at most, in whole documents."""


@dataclass(frozen=True)
class ValidationText:
    """Documents of the domain that are neither calibrated on nor reported: the size is searched on them.

    Attributes:
        text: The documents.
        docs: Those that are scored.
        max_seq_length: Tokens a window.
        num_dropped: Documents that the calibration text has too.
    """

    text: TextSource
    docs: tuple[str, ...]
    max_seq_length: int
    num_dropped: int

    @classmethod
    def withheld_from(
        cls,
        text: TextSource,
        tokenizer: Any,  # noqa: ANN401
        config: PrunerConfig,
        general: TextSource | None = None,
    ) -> tuple[TextSource, ValidationText]:
        """(the rest of the calibration text, a tenth of its documents without those that are calibrated on as well).

        Args:
            text: Of the domain.
            tokenizer: The model's.
            config: All choices.
            general: Text of no domain that is calibrated on too.

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
                f"rest{beside} repeats all {len(given):,} of them. Give text that repeats itself less, or use "
                f"pruning_ratio."
            )
        dropped = len(given) - len(own)
        docs = choose_documents(own, tokenizer, max_tokens=_TOKENS)
        return rest, cls(own, tuple(docs), config.max_seq_length, dropped)

    def bits_per_byte(self, model: PreTrainedModel, tokenizer: Any) -> float:  # noqa: ANN401 - maybe a smaller one
        """The loss of a model on these documents."""
        losses = document_losses(model, tokenizer, self.text, max_seq_length=self.max_seq_length, docs=self.docs)
        return sum(loss.nll for loss in losses) / sum(loss.num_bytes for loss in losses) / math.log(2)

    def budget(self, plan: PruningPlan) -> SizeSearch:
        """What the search found, from the plan's provenance."""
        facts = plan.provenance["loss_budget"]
        dropped = f" ({self.num_dropped:,} that are calibrated on too were dropped)" if self.num_dropped else ""
        text = (
            f"Size searched on at most {_TOKENS:,} tokens of {len(self.text):,} documents of {self.text.name}"
            f"{dropped}, withheld from calibration and not among the held-out text of the figures: "
            f"{facts['increase']:+.2%} bits per byte there, {facts['max_loss_increase']:+.2%} allowed."
        )
        return SizeSearch(facts["max_loss_increase"], facts["increase"], text, len(facts["trials"]))
