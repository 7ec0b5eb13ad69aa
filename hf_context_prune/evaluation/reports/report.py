"""The facts of an evaluation as one value: saved as JSON, and shown in tables and model cards."""

import contextlib
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.accuracy import Accuracy, PairedAccuracy
from hf_context_prune.evaluation.losses import LossComparison, LossSummary, SourceLoss
from hf_context_prune.evaluation.speed import MemoryMeasurement, SpeedMeasurement, SpeedRatio, speed_ratio

from .codec import Saved, decode, load_json, now

SCHEMA_VERSION = 6

_PACKAGES = ("hf-context-prune", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class DatasetFacts:
    """The text of the losses.

    Attributes:
        name: Name of the text, as `TextSource.name`.
        revision: Hub commit, else None.
        fingerprint: sha256 of the texts that were measured on, in order.
        held_out: Sentences on how the text was kept apart from calibration, and on how much of it was measured on.
        max_chars: As `Passages.max_chars`: None where the text is whole.
        max_seq_length: Tokens per window; None in reports of earlier versions.
    """

    name: str
    revision: str | None
    fingerprint: str
    held_out: str
    max_chars: int | None = None
    max_seq_length: int | None = None


@dataclass(frozen=True)
class SizeFacts:
    """Sizes; None where not measured or, for a single model, where there is no pruned one. See `SizeFacts.measured`.

    Attributes:
        base_parameters: Parameters, tied ones counted once.
        pruned_parameters: The same for the pruned model.
        asked_ratio: Share of all parameters to remove, where the size was given so.
        achieved_ratio: Share of all parameters that was removed.
        base_weight_bytes: Bytes of the safetensors files.
        pruned_weight_bytes: The same for the pruned model.
    """

    base_parameters: int
    pruned_parameters: int | None = None
    asked_ratio: float | None = None
    achieved_ratio: float | None = None
    base_weight_bytes: int | None = None
    pruned_weight_bytes: int | None = None

    @classmethod
    def measured(
        cls,
        base_parameters: int,
        pruned_parameters: int | None = None,
        *,
        asked_ratio: float | None = None,
        base_weight_bytes: int | None = None,
        pruned_weight_bytes: int | None = None,
    ) -> "SizeFacts":
        """Return the facts with the achieved ratio computed."""
        achieved = None if pruned_parameters is None else 1 - pruned_parameters / base_parameters
        return cls(base_parameters, pruned_parameters, asked_ratio, achieved, base_weight_bytes, pruned_weight_bytes)


@dataclass(frozen=True)
class LossFacts:
    """Losses of the base and the pruned model, and their comparison; only `base` is set for a single model.

    Attributes:
        base: Losses of the base, or of the single model; None where a recovery had no base to measure.
        pruned: Losses of the pruned model; None where a recovered model was trained again, and the losses that it had
            before any training are not known.
        comparison: Pruned model against base.
        predicted_excess: `comparison.excess_nats_per_token` as adaptive allocation predicted it, from the change of the
            output (KL) on calibration text when each layer alone is narrowed; None for other allocations.
        recovered: Losses of the pruned model after recovery; None without one.
        recovered_comparison: Recovered model against base.
        by_source: Losses on each source of the text; empty where it has a single one.
    """

    base: LossSummary | None
    pruned: LossSummary | None = None
    comparison: LossComparison | None = None
    predicted_excess: float | None = None
    recovered: LossSummary | None = None
    recovered_comparison: LossComparison | None = None
    by_source: tuple[SourceLoss, ...] = ()

    def __post_init__(self) -> None:
        """Refuse losses without a finite perplexity.

        Raises:
            ConfigError: There are no losses.
            NumericsError: A comparison has no finite perplexity.
        """
        _ = self.last
        for comparison in (self.comparison, self.recovered_comparison):
            if comparison is not None:
                _ = comparison.perplexity_ratio  # raises

    @property
    def last(self) -> LossSummary:
        """Losses of the model that the report is about.

        Raises:
            ConfigError: There are none.
        """
        found = self.recovered or self.pruned or self.base
        if found is None:
            raise ConfigError("A report holds the losses of one model at least.")
        return found

    @property
    def last_comparison(self) -> LossComparison | None:
        """That model against the base; None where there is no base, or no other model."""
        return self.comparison if self.recovered is None else self.recovered_comparison


@dataclass(frozen=True)
class TextLosses:
    """Losses on a second text.

    Attributes:
        dataset: The text.
        loss: Losses on it, as `EvalReport.loss`.
    """

    dataset: DatasetFacts
    loss: LossFacts


@dataclass(frozen=True)
class SizeSearch:
    """A size found by search: the smallest within an allowed loss increase.

    Attributes:
        allowed: Allowed relative increase of the bits per byte.
        measured: Increase at the chosen size, on the text of the search.
        text: A sentence on that text, which is not the text of `EvalReport.loss`.
        num_trials: Number of sizes measured.
    """

    allowed: float
    measured: float
    text: str
    num_trials: int


@dataclass(frozen=True)
class SpeedFacts:
    """Speeds measured in one call of `measure_speed`; `pruned` is None for a single model."""

    base: SpeedMeasurement
    pruned: SpeedMeasurement | None = None

    def __post_init__(self) -> None:
        self.ratio()  # refuses measurements that can't be compared

    def ratio(self) -> SpeedRatio | None:
        """Return the speed of the pruned model over that of the base, None for a single model.

        Raises:
            ConfigError: The two were measured in different settings.
        """
        return None if self.pruned is None else speed_ratio(self.base, self.pruned)


@dataclass(frozen=True)
class MemoryFacts:
    """Peak memory; None for a model that was not measured (a base without a folder) or does not exist."""

    base: MemoryMeasurement | None = None
    pruned: MemoryMeasurement | None = None


@dataclass(frozen=True)
class MultipleChoiceFacts:
    """Answers to multiple-choice questions; the last two are None for a single model.

    Attributes:
        name: Name of the questions, as `QuestionSet.name`.
        revision: Hub commit, else None.
        scorer: How answers were chosen.
        num_fewshot: Largest number of examples before a question.
        base: Accuracies by source and of all questions, of the base or of the single model.
        pruned: The same for the pruned model.
        paired: Pruned model against base.
    """

    name: str
    revision: str | None
    scorer: str
    num_fewshot: int
    base: tuple[Accuracy, ...]
    pruned: tuple[Accuracy, ...] | None = None
    paired: tuple[PairedAccuracy, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse figures of the pruned model on other groups than the base's.

        Raises:
            ConfigError: Their numbers differ.
        """
        if any(groups is not None and len(groups) != len(self.base) for groups in (self.pruned, self.paired)):
            raise ConfigError(f"The base has {len(self.base)} groups of questions, and the pruned model others.")


@dataclass(frozen=True)
class Environment:
    """Where figures were measured: package versions, Python, platform, torch threads, dtype of the losses."""

    packages: dict[str, str]
    python: str
    platform: str
    threads: int
    dtype: str

    @classmethod
    def current(cls, dtype: str) -> "Environment":
        """Describe this process; packages that are not installed are left out."""
        packages = {}
        for name in _PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                packages[name] = metadata.version(name)
        return cls(packages, platform.python_version(), platform.platform(), torch.get_num_threads(), dtype)


@dataclass(frozen=True)
class GeneratedText:
    """What the last model of a report wrote, greedily.

    Attributes:
        prompt: One of `publishing.prompts`, never text of the user's.
        text: The continuation.
    """

    prompt: str
    text: str


@dataclass(frozen=True)
class EvalReport(Saved):
    """One evaluation, of a pruned model against its base or of a single model (where every `pruned` is None).

    Attributes:
        base_model: Name of the base, or of the single model.
        dataset: The text of the losses.
        size: Parameters and bytes.
        loss: Losses with intervals.
        environment: Where the figures were measured.
        speed: Speeds; None where not measured.
        memory: Peak memory; None where not measured.
        budget: How the size was found; None where it was given.
        multiple_choice: Answers to questions; None where none were asked.
        general: Losses on general text, which show what was forgotten; None where not measured.
        example: What the model writes after a prompt of its domain; None where it wrote nothing.
        notes: Sentences that a reader of the figures must know.
        created: UTC time, ISO 8601 to the second.
        schema_version: Version of the JSON layout.
    """

    base_model: str
    dataset: DatasetFacts
    size: SizeFacts
    loss: LossFacts
    environment: Environment
    speed: SpeedFacts | None = None
    memory: MemoryFacts | None = None
    budget: SizeSearch | None = None
    multiple_choice: MultipleChoiceFacts | None = None
    general: TextLosses | None = None
    example: GeneratedText | None = None
    notes: tuple[str, ...] = ()
    created: str = field(default_factory=now)
    schema_version: int = SCHEMA_VERSION

    def summary(self, *, intervals: bool = False) -> str:
        """Return the figures for people: size, speed and losses in words, then as a table.

        Args:
            intervals: Show intervals, quartiles and the losses per token too.

        Example:
            >>> print(EvalReport.load("mini-gpt/eval_report.json").summary())  # doctest: +SKIP
        """
        from .summary import describe

        return describe(self, intervals=intervals)

    def to_pandas(self) -> Any:  # noqa: ANN401 - pandas is no dependency
        """Return the table of figures as a `pandas.DataFrame` of strings, with intervals; the index is the measure.

        Raises:
            ConfigError: pandas is not installed.
        """
        from .rows import table_header, table_rows

        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas: pip install pandas.") from error
        header = table_header(self)
        return pandas.DataFrame(table_rows(self, intervals=True), columns=list(header)).set_index(header[0])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EvalReport":
        """Return the report that `to_dict` gave.

        Reports of the schema versions 2 to 5 lack what was added later, which reads as not measured.

        Raises:
            LoadError: The schema version is unknown, or a key is missing, unknown or of the wrong type.
        """
        if not isinstance(data, dict):
            raise LoadError(f"An evaluation report must be a JSON object, not {type(data).__name__}.")
        if (version := data.get("schema_version")) not in range(2, SCHEMA_VERSION + 1):
            raise LoadError(
                f"The evaluation report has schema_version {version!r}; this version of hf_context_prune reads 2 to "
                f"{SCHEMA_VERSION}. Install the version that wrote it, or evaluate again."
            )
        try:
            return decode(cls, {"created": None, **data, "schema_version": SCHEMA_VERSION}, "report")
        except (ConfigError, ArithmeticError, LookupError, ValueError) as error:
            raise LoadError(f"The evaluation report contradicts itself: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvalReport":
        """Read a saved report.

        Raises:
            LoadError: The file is missing, is no JSON, or is no report of a known version.
        """
        return cls.from_dict(load_json(path))
