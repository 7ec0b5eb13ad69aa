"""Everything that a pruning run reads, kept apart by document."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.data.balance import identify_sources
from hf_context_prune.data.documents import TextData
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.general_text import GeneralText, read_general
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.storage.loading import LoadedModel

from .validation_text import withhold_size_text

AnyConfig = PrunerConfig | ThresholdConfig


@dataclass(frozen=True)
class PruningTexts:
    """Everything that a run reads, kept apart by document.

    Attributes:
        split: Calibration and test text of the domain.
        calibration: What is calibrated on.
        validation: Text that the size is searched on, for `max_loss_increase`.
        general: General text, if it was given.
    """

    split: TextSplit
    calibration: CalibrationSet
    validation: ValidationText | None
    general: GeneralText | None

    @classmethod
    def read(
        cls,
        base: LoadedModel,
        data: TextData,
        eval_data: TextData | None,
        config: AnyConfig,
        options: EvalOptions,
        *,
        recovers: bool = False,
    ) -> PruningTexts:
        """Read and split all texts of a run, the domain's once.

        Args:
            base: The base model, whose tokenizer counts and renders.
            data: Text of the domain.
            eval_data: Test text; None holds out a tenth of `data`, by document.
            config: All choices.
            options: Says whether there is general text.
            recovers: The calibration text is trained on as well, with validation documents held out of it.

        Raises:
            DataError: A text can't be read, or too little of it is left.
        """
        tokenizer, seed = base.tokenizer, config.pruning_seed
        split = TextSplit.of(
            data,
            eval_data,
            tokenizer=tokenizer,
            text_column=config.text_column,
            seed=seed,
            use="calibration and recovery" if recovers else "calibration",
            withholds=recovers,
        )
        general = read_general(
            options.general_data,
            apart_from=split.calibration,
            test=split.test,
            tokenizer=tokenizer,
            seed=seed,
            hold_out=bool(config.general_data_ratio),
        )
        mixed_in = None if general is None else general.calibration
        if mixed_in is not None:
            split = split.without(mixed_in)
        text, validation = split.calibration, None
        if isinstance(config, PrunerConfig) and config.max_loss_increase is not None:
            text, validation = withhold_size_text(text, tokenizer, config, general=mixed_in)
        return cls(split, CalibrationSet(text, config, mixed_in), validation, general)

    def identity(self) -> list[Any]:
        """Return all of the texts that the plan depends on; with `balance_sources` also the domain's sources."""
        balances = self.calibration.config.balance_sources
        return [self.provenance(), *([identify_sources(self.calibration.domain)] if balances else [])]

    def provenance(self) -> dict[str, Any]:
        """Return the names and fingerprints of the texts that decided the plan."""
        facts: dict[str, Any] = {"data": self.calibration.domain.identity}
        if self.split.test_name is not None:  # then nothing was held out of the other text
            facts["test_data"] = self.split.test_name
        if self.validation is not None:
            text = self.validation.text
            facts["search_data"] = {"name": text.name, "fingerprint": text.fingerprint}
        if self.general is not None and self.general.calibration is not None:
            facts["general_data"] = self.general.whole
        return facts


def read_texts(
    base: LoadedModel,
    data: TextData,
    eval_data: TextData | None,
    config: AnyConfig,
    options: EvalOptions,
    *,
    by_default: bool,
    recovers: bool,
) -> tuple[AnyConfig, PruningTexts, tuple[str, ...]]:
    """Read all texts; general text that can't be calibrated on is only measured on, where its share is the default's.

    Args:
        base: As for [`PruningTexts.read`][].
        data: As for [`PruningTexts.read`][].
        eval_data: As for [`PruningTexts.read`][].
        config: As for [`PruningTexts.read`][].
        options: As for [`PruningTexts.read`][].
        by_default: Whether the config leaves the share of general text open.
        recovers: As for [`PruningTexts.read`][].

    Returns:
        (the config, the texts, a sentence on why general text is only measured on).

    Raises:
        DataError: See [`PruningTexts.read`][].
    """
    if not (by_default and config.general_data_ratio):
        return config, PruningTexts.read(base, data, eval_data, config, options, recovers=recovers), ()
    try:
        texts = PruningTexts.read(base, data, eval_data, config, options, recovers=recovers)
        texts.calibration.samples(base.tokenizer)  # refuses text of less than a sample
    except DataError as error:
        config = replace(config, general_data_ratio=None)
        texts = PruningTexts.read(base, data, eval_data, config, options, recovers=recovers)
        return config, texts, (f"No general text is calibrated on: {error}",)
    return config, texts, ()
