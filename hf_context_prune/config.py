"""`PrunerConfig` and `ThresholdConfig`: every option of a pruning run, for Python, YAML and HfArgumentParser.

The command line is made from the fields; see [`option`][].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from hf_context_prune.utils.options import (
    BUDGET,
    METHOD,
    OUTPUT,
    PAPER,
    TEXT,
    VOCABULARY,
    Allowed,
    above_zero,
    at_least,
    below_one,
    check_options,
    from_options,
    is_number,
    name_such_as,
    option,
    read_options,
)

from .errors import ConfigError

CriterionName = Literal["random", "magnitude", "l1", "wanda", "flap", "taylor", "obs"]
ReconstructionName = Literal["none", "bias", "least_squares", "sequential"]
AllocationName = Literal["uniform", "adaptive"]
VocabCriterion = Literal["expected", "frequency"]

DEFAULT_PRUNING_RATIO = 0.2
DEFAULT_PAD_TO_MULTIPLE_OF = 64
DEFAULT_RIDGE = 0.3
"""Ridge of every Gram matrix that is inverted, as a share of each feature's mean square."""
THRESHOLDS = ("linear_threshold", "activation_threshold", "embedding_threshold")
_DIGITS = re.compile(r"[0-9]{1,19}")
_RATIO = below_one("0 removes nothing, 0.25 a quarter, and 1 would leave nothing")
_THRESHOLD = Allowed(lambda value: is_number(value) and value >= 0, "a number of at least 0 (the paper has 1e-3)")


@dataclass(kw_only=True)
class CalibrationConfig:
    """The text that a pruning run is calibrated on.

    Raises:
        ConfigError: A value out of range, or an unknown name.
    """

    num_calibration_samples: int = option(128, "Samples of calibration text.", panel=TEXT, allowed=at_least(1))
    max_seq_length: int = option(512, "Tokens per sample.", panel=TEXT, allowed=at_least(2))
    general_data_ratio: float = option(
        0.0,
        "Share of the calibration samples taken from general text instead of domain text, in [0, 1). The model loses a "
        "little more on the domain and forgets less elsewhere. Needs general text (--general-data), of which a tenth "
        "is then held out to measure on.",
        panel=TEXT,
        allowed=below_one("0.25 takes a quarter of the calibration samples from general text"),
    )
    text_column: str | None = option(
        None,
        "Column that holds the text; found automatically if there is one candidate.",
        panel=TEXT,
        allowed=name_such_as("text"),
    )
    # Not `seed`: HfArgumentParser would refuse this class beside TrainingArguments, which has that one.
    pruning_seed: int = option(
        0,
        "Seed of everything random: the choice of text, and the random criterion.",
        panel=TEXT,
        allowed=at_least(0),
        flag="seed",
    )
    domain: str | None = option(
        None,
        "Name of the domain, such as law, for the model card and its tags.",
        panel=OUTPUT,
        allowed=name_such_as("law"),
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from a mapping of options; ``seed`` may stand for ``pruning_seed``, as on the command line.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        if "seed" in values and "pruning_seed" not in values:
            values = {"pruning_seed" if name == "seed" else name: value for name, value in values.items()}
        return from_options(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a config from a YAML file (a flat mapping).

        Raises:
            ConfigError: The file is missing, not YAML or not a mapping, or has an unknown key.
        """
        return cls.from_dict(read_options(path))


@dataclass(kw_only=True)
class PrunerConfig(CalibrationConfig):
    """What to remove, how to choose it, and how to reconstruct the rest.

    The budget is one of: a share or number of *all* parameters (`pruning_ratio`, `target_params`), a share of each kind
    of unit (`mlp_ratio`, `attention_ratio`), or the loss that may be added (`max_loss_increase`). A share of all
    parameters may be combined with the ratio of one kind of unit: that ratio is then exact, and the other kind gives
    the rest. Vocabulary entries are removed by `vocab_size`, `vocab_coverage` or `vocab_min_count`, and count towards a
    share of all parameters; with ``vocab_size="auto"``, that budget decides how many. With no size at all,
    `pruning_ratio` is 0.2. Options left open (`pruning_ratio`, `allocation`) are filled in, so that a config always
    says what is done.

    Raises:
        ConfigError: A value out of range, an unknown name, or options that contradict each other.
    """

    pruning_ratio: float | None = option(
        None,
        f"Share of all parameters to remove, in [0, 1); tied embeddings count once. Default {DEFAULT_PRUNING_RATIO} "
        f"if no size is given.",
        panel=BUDGET,
        allowed=_RATIO,
    )
    target_params: int | None = option(
        None, "Largest number of parameters to keep, instead of a ratio.", panel=BUDGET, allowed=at_least(1)
    )
    max_loss_increase: float | None = option(
        None,
        "Find the smallest model whose bits per byte on validation text rise by at most this share (0.03: 3 percent).",
        panel=BUDGET,
        allowed=above_zero("0.03 allows 3 % more bits per byte"),
    )
    mlp_ratio: float | None = option(None, "Share of MLP neurons to remove, in [0, 1).", panel=BUDGET, allowed=_RATIO)
    attention_ratio: float | None = option(
        None, "Share of the attention KV groups to remove, in [0, 1).", panel=BUDGET, allowed=_RATIO
    )
    vocab_size: int | str | None = option(
        None,
        "Number of vocabulary entries to keep, or auto: the budget for all parameters decides, by the measured loss of "
        "removing entries, neurons and KV groups. All are kept by default.",
        panel=VOCABULARY,
        allowed=Allowed(lambda value: value == "auto" or at_least(1).test(value), f"'auto' or {at_least(1).text}"),
        metavar="N|auto",
    )
    vocab_coverage: float | None = option(
        None,
        "Keep as many vocabulary entries as make up this share of the text, in (0, 1], instead of a number.",
        panel=VOCABULARY,
        allowed=above_zero("0.995 keeps as many entries as make up 99.5 % of the text"),
    )
    vocab_min_count: int | None = option(
        None,
        "Keep the vocabulary entries that occur at least this often in the text, instead of a number.",
        panel=VOCABULARY,
        allowed=at_least(1),
    )
    pad_to_multiple_of: int = option(
        DEFAULT_PAD_TO_MULTIPLE_OF,
        "Round the number of kept vocabulary entries up to a multiple of this.",
        panel=VOCABULARY,
        allowed=at_least(1),
    )
    vocab_criterion: VocabCriterion = option(
        "expected",
        "How vocabulary entries are ranked. expected: by the documents that contain them, and by how probable the "
        "model holds them there; frequency: by how often they occur in the text.",
        panel=VOCABULARY,
    )
    criterion: CriterionName = option("obs", "How the importance of a unit is measured.", panel=METHOD)
    reconstruction: ReconstructionName = option(
        "sequential", "How the output projections are fitted to the units that are kept.", panel=METHOD
    )
    allocation: AllocationName | None = option(
        None,
        "adaptive: widths by each layer's measured effect on the loss; uniform: the same share in every layer. By "
        "default adaptive if the budget is for all parameters or the loss, and uniform with mlp_ratio, "
        "attention_ratio, native_architecture or a single sample of text.",
        panel=METHOD,
    )
    refit_lm_head: bool = option(
        False,
        "After pruning, also refit the LM head (and the tied embedding) on the calibration text: less loss at the same "
        "size, in more time. Always done when the vocabulary is pruned.",
        panel=METHOD,
    )
    round_to: int = option(
        1,
        "Keep MLP widths at a multiple of this number (8 or 32 run faster on most hardware).",
        panel=METHOD,
        allowed=at_least(1),
    )
    native_architecture: bool = option(
        False,
        "Plan only widths that the model's own architecture can hold, so that it loads without this package.",
        panel=METHOD,
    )
    ridge: float = option(
        DEFAULT_RIDGE,
        "Ridge of the reconstruction, as a share of each feature's mean square; above 0.",
        panel=METHOD,
        allowed=Allowed(
            lambda value: is_number(value) and 0 < value <= 1e6, "a number above 0, up to 1e6 (such as 0.3)"
        ),
    )

    def __post_init__(self) -> None:
        """Check every value, fill in what is open, and refuse contradictions."""
        if isinstance(self.vocab_size, str) and _DIGITS.fullmatch(self.vocab_size):  # HfArgumentParser gives strings
            self.vocab_size = int(self.vocab_size)
        super().__post_init__()
        self._fill_in()
        self._check_budget()
        self._check_method()
        self._check_vocabulary()

    def _fill_in(self) -> None:
        if not self.prunes_units and (not self.prunes_vocabulary or self.vocab_size == "auto"):
            self.pruning_ratio = DEFAULT_PRUNING_RATIO
        if self.allocation is None:
            fixed = self.mlp_ratio is not None or self.attention_ratio is not None or self.native_architecture
            nothing = self.pruning_ratio == 0 or self.num_calibration_samples < 2  # to remove, or to measure on
            self.allocation = "adaptive" if self.has_total_budget and not (fixed or nothing) else "uniform"

    def _check_budget(self) -> None:
        if self.pruning_ratio is not None and self.target_params is not None:
            raise ConfigError("pruning_ratio and target_params both set the size; give one of them.")
        if self.max_loss_increase is not None:
            for name in ("pruning_ratio", "target_params", "mlp_ratio", "attention_ratio"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"max_loss_increase lets the size follow from the loss, and {name} fixes it; give one of the "
                        f"two."
                    )
        total = self.pruning_ratio is not None or self.target_params is not None
        if total and self.mlp_ratio is not None and self.attention_ratio is not None:
            raise ConfigError(
                "mlp_ratio and attention_ratio together already fix the size; leave out pruning_ratio/target_params, "
                "or one of the two."
            )

    def _check_method(self) -> None:
        if self.reconstruction == "sequential" and self.criterion == "taylor":
            raise ConfigError(
                "criterion='taylor' needs gradients, which reconstruction='sequential' does not compute. Use "
                "criterion='obs', or reconstruction='least_squares'."
            )
        if self.allocation == "adaptive" and self.native_architecture:
            raise ConfigError(
                "allocation='adaptive' gives layers different widths, which native_architecture=True rules out; leave "
                "allocation out (None; a config fills it in)."
            )
        if self.refit_lm_head and self.reconstruction == "none":
            raise ConfigError(
                "refit_lm_head=True reconstructs more, and reconstruction='none' reconstructs nothing; use another "
                "reconstruction, or leave refit_lm_head out."
            )

    def _check_vocabulary(self) -> None:
        sizes = ("vocab_size", "vocab_coverage", "vocab_min_count")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each set the size of the vocabulary; give one of them.")
        units = self.mlp_ratio is not None or self.attention_ratio is not None
        shared = self.allocation == "adaptive" and self.max_loss_increase is None and not units
        if self.vocab_size == "auto" and not shared:
            raise ConfigError(
                "vocab_size='auto' shares one budget between vocabulary entries and other units by their measured "
                "loss: it needs pruning_ratio (above 0) or target_params, allocation='adaptive' (so not "
                "native_architecture), and no mlp_ratio or attention_ratio. Or give a number: vocab_size=16000."
            )

    @property
    def has_total_budget(self) -> bool:
        """Whether the budget is for all parameters, or for the loss."""
        return any(x is not None for x in (self.pruning_ratio, self.target_params, self.max_loss_increase))

    @property
    def prunes_units(self) -> bool:
        """Whether MLP neurons or KV groups may be removed."""
        return self.has_total_budget or self.mlp_ratio is not None or self.attention_ratio is not None

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether vocabulary entries may be removed."""
        return any(size is not None for size in (self.vocab_size, self.vocab_coverage, self.vocab_min_count))


@dataclass(kw_only=True)
class ThresholdConfig(CalibrationConfig):
    """The protocol of the paper (arXiv 2312.12682): thresholds alone decide what is removed, layer by layer.

    Importance is the mean absolute activation, and nothing is reconstructed.

    Raises:
        ConfigError: A value out of range, or no threshold at all.
    """

    # What the protocol fixes.
    criterion: ClassVar[CriterionName] = "l1"
    reconstruction: ClassVar[ReconstructionName] = "none"
    vocab_criterion: ClassVar[VocabCriterion] = "expected"
    pad_to_multiple_of: ClassVar[int] = DEFAULT_PAD_TO_MULTIPLE_OF

    linear_threshold: float | None = option(
        None,
        "Zero the rows and columns of linear layers whose mean |x| is at most this, and remove the units that are then "
        "dead.",
        panel=PAPER,
        allowed=_THRESHOLD,
    )
    activation_threshold: float | None = option(
        None, "Remove the MLP neurons whose mean |activation| is at most this.", panel=PAPER, allowed=_THRESHOLD
    )
    embedding_threshold: float | None = option(
        None,
        "Remove the vocabulary entries whose share of the text is at most this (0: those that do not occur).",
        panel=PAPER,
        allowed=Allowed(
            lambda value: is_number(value) and 0 <= value <= 1,
            "a share of the text's tokens, in [0, 1] (0 removes those that do not occur)",
        ),
    )

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if all(getattr(self, name) is None for name in THRESHOLDS):
            raise ConfigError(f"There is no threshold; give at least one of {', '.join(THRESHOLDS)}.")

    @property
    def prunes_units(self) -> bool:
        """Whether MLP neurons or KV groups may be removed."""
        return self.linear_threshold is not None or self.activation_threshold is not None

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether vocabulary entries may be removed."""
        return self.embedding_threshold is not None


def build_config(values: Mapping[str, Any]) -> PrunerConfig | ThresholdConfig:
    """Build the config that options describe: a `ThresholdConfig` where a threshold is among them.

    Raises:
        ConfigError: An unknown key, or options of both configs.
    """
    given = [name for name in THRESHOLDS if values.get(name) is not None]
    if not given:
        return PrunerConfig.from_dict({name: value for name, value in values.items() if name not in THRESHOLDS})
    values = {name: value for name, value in values.items() if value is not None}
    shared = {item.name for item in fields(CalibrationConfig)}
    others = [item.name for item in fields(PrunerConfig) if item.name in values and item.name not in shared]
    if others:
        raise ConfigError(
            f"{given[0]} alone decides what is removed, as in the paper, and {', '.join(others)} can't be given with "
            f"it; leave out {', '.join(others)}, or the thresholds."
        )
    return ThresholdConfig.from_dict(values)


_OLD = {"stock": "native_architecture", "vocab_multiple": "pad_to_multiple_of", "general_mix": "general_data_ratio"}


def config_from_provenance(values: Mapping[str, Any]) -> PrunerConfig | ThresholdConfig:
    """Build the config that a pruning plan was made with, also from the option names of earlier plans.

    Args:
        values: ``provenance["config"]`` of a plan.

    Raises:
        ConfigError: An unknown key or value, or a combination that is no longer possible.
    """
    values = {_OLD.get(name, name): value for name, value in values.items()}
    if values.pop("effort", None) == "high":
        values["refit_lm_head"] = True
    if values.pop("vocab_auto", False):
        values["vocab_size"] = "auto"
    if any(values.get(name) is not None for name in THRESHOLDS):
        left_open = {item.name: item.default for item in fields(PrunerConfig)}
        left_open |= {"criterion": "l1", "reconstruction": "none", "allocation": "uniform"}  # written with thresholds
        values = {name: value for name, value in values.items() if name not in left_open or value != left_open[name]}
    return build_config(values)
