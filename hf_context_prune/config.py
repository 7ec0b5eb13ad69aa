"""`PrunerConfig`: every choice of a pruning run, as a dataclass that HfArgumentParser and YAML can fill."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from .errors import ConfigError, unknown_name

CriterionName = Literal["random", "magnitude", "l1", "wanda", "flap", "taylor", "obs"]
ReconstructionName = Literal["none", "bias", "least_squares", "sequential"]
AllocationName = Literal["uniform", "adaptive"]
VocabCriterion = Literal["expected", "frequency"]

Config = TypeVar("Config")

DEFAULT_PRUNING_RATIO = 0.2
THRESHOLDS = ("linear_threshold", "activation_threshold", "embedding_threshold")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def option(default: Any, help: str) -> Any:  # noqa: ANN401 - `help` is HfArgumentParser's metadata key
    """A field of a config with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class PrunerConfig:
    """What to remove, how to choose it, and how to repair what is left.

    The budget is one of: a share or number of *all* parameters (`pruning_ratio`, `target_params`), a share of each unit
    (`mlp_ratio`, `attention_ratio`), or how much worse the model may get (`max_loss_increase`). A share of all
    parameters may be combined with one unit's ratio: that ratio is then exact, and the other unit gives the rest.
    Tokens go by `vocab_size`, `vocab_coverage` or `vocab_min_count`, and count towards a share of all parameters; with
    `vocab_auto`, that budget says how many. The paper's protocol has thresholds in place of a budget
    (`linear_threshold`, `activation_threshold`, `embedding_threshold`). With none of all these, `pruning_ratio` is 0.2.
    What is left open (`pruning_ratio`, `allocation`) is filled in, so that a config always says what is done.

    Raises:
        ConfigError: A value out of range, an unknown name, or options that contradict each other.
    """

    pruning_ratio: float | None = option(
        None, "Share of all parameters to remove, from 0 up to, not including, 1 (tied embeddings counted once)."
    )
    target_params: int | None = option(None, "Number of parameters to keep at most, instead of a ratio.")
    mlp_ratio: float | None = option(None, "Share of the MLP neurons to remove, in [0, 1).")
    attention_ratio: float | None = option(None, "Share of the attention KV groups to remove, in [0, 1).")
    max_loss_increase: float | None = option(
        None,
        "As small as possible, with at most this share more bits per byte on the domain (0.03: 1.03 times as many). "
        "Found by search on documents withheld from calibration.",
    )
    criterion: CriterionName = option("obs", "Which units matter: how the importance of a unit is measured.")
    reconstruction: ReconstructionName = option(
        "sequential", "How the output projections are refitted to what is left."
    )
    allocation: AllocationName | None = option(
        None,
        "adaptive: widths by each layer's measured effect on the loss; uniform: the same in every layer. By default "
        "adaptive where the budget is for all parameters or the loss, uniform with unit ratios, stock, thresholds or a "
        "single block of text.",
    )
    refit_lm_head: bool = option(
        False,
        "After pruning, also refit the LM head (and the tied embedding) on the calibration text: less loss at the same "
        "size, in more time. Always done where tokens go.",
    )
    round_to: int = option(1, "Keep MLP widths at a multiple of this number (8 or 32 run faster on most hardware).")
    native_architecture: bool = option(
        False, "Plan only widths that the stock architecture can hold (loads without this package)."
    )
    vocab_size: int | None = option(None, "Tokens of the vocabulary to keep; by default all.")
    vocab_coverage: float | None = option(
        None, "Keep as many tokens as make up this share of the text, in (0, 1], instead of a number."
    )
    vocab_min_count: int | None = option(None, "Keep tokens that the text has at least this often, instead.")
    vocab_auto: bool = option(
        False,
        "Let the budget for all parameters choose the number of tokens too, by what they and the other units cost in "
        "loss (not with allocation=uniform).",
    )
    pad_to_multiple_of: int = option(64, "The number of kept tokens is rounded up to a multiple of this.")
    vocab_criterion: VocabCriterion = option(
        "expected",
        "Which tokens matter. expected: documents that have them, and how probable the model holds them there; "
        "frequency: how often the text has them.",
    )
    linear_threshold: float | None = option(
        None,
        "The paper's protocol (with criterion=l1, reconstruction=none): zero the rows and columns of linear layers "
        "with mean |x| of at most this, and remove the units that are then dead.",
    )
    activation_threshold: float | None = option(
        None, "The paper's protocol: remove the MLP neurons whose mean |activation| is at most this."
    )
    embedding_threshold: float | None = option(
        None, "The paper's protocol: remove the tokens whose share of the text is at most this (0: those it lacks)."
    )
    ridge: float = option(0.3, "Ridge of the refit, as a share of each feature's mean square; above 0.")
    num_calibration_samples: int = option(128, "Blocks of calibration text.")
    max_seq_length: int = option(512, "Tokens a block.")
    general_data_ratio: float = option(
        0.0,
        "Share of the calibration blocks that comes from text of no domain, in [0, 1): the domain loses a little, and "
        "less is forgotten elsewhere. Needs such a text.",
    )
    text_column: str | None = option(None, "Column with the text; found by itself where there is only one candidate.")
    domain: str | None = option(None, "Name of the domain, such as law: for the model card and its tags.")
    # Not `seed`: HfArgumentParser would refuse this class beside TrainingArguments, which has that one.
    pruning_seed: int = option(0, "Seed of everything random: choice of text, and the `random` criterion.")

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("pruning_ratio", "mlp_ratio", "attention_ratio"):
            self._check_ratio(name)
        for name, lowest in (
            ("target_params", 1),
            ("vocab_size", 1),
            ("vocab_min_count", 1),
            ("pad_to_multiple_of", 1),
            ("round_to", 1),
            ("num_calibration_samples", 1),
            ("max_seq_length", 2),
            ("pruning_seed", 0),
        ):
            self._check_integer(name, lowest)
        if not (is_number(self.general_data_ratio) and 0 <= self.general_data_ratio < 1):
            raise ConfigError(
                f"general_data_ratio is {self.general_data_ratio!r}; it must be a share in [0, 1): 0.25 takes a quarter of "
                f"the calibration samples from general text."
            )
        if self.max_loss_increase is not None and not (
            is_number(self.max_loss_increase) and 0 < self.max_loss_increase <= 1
        ):
            raise ConfigError(
                f"max_loss_increase is {self.max_loss_increase!r}; it must be a share above 0, up to 1: 0.03 allows "
                f"3 % more bits per byte."
            )
        if not (is_number(self.ridge) and 0 < self.ridge <= 1e6):
            raise ConfigError(f"ridge is {self.ridge!r}; it must be a number above 0, up to 1e6 (0.3 is a good one).")
        for name in ("native_architecture", "refit_lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        if self.vocab_coverage is not None and not (is_number(self.vocab_coverage) and 0 < self.vocab_coverage <= 1):
            raise ConfigError(
                f"vocab_coverage is {self.vocab_coverage!r}; it must be a share above 0, up to 1: 0.995 keeps as many "
                f"tokens as make up 99.5 % of the text."
            )
        if self.text_column is not None and not (isinstance(self.text_column, str) and self.text_column):
            raise ConfigError(f"text_column is {self.text_column!r}; it must be the name of a column.")
        if self.domain is not None and not (isinstance(self.domain, str) and self.domain.strip()):
            raise ConfigError(f"domain is {self.domain!r}; it must be a name, such as 'law'.")
        for name, names in (
            ("criterion", CriterionName),
            ("reconstruction", ReconstructionName),
            ("allocation", AllocationName),
            ("vocab_criterion", VocabCriterion),
        ):
            if name != "allocation" or self.allocation is not None:
                self._check_name(name, get_args(names))
        self._fill_in()
        self._check_budget()

    def _check_ratio(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not (is_number(value) and 0 <= value < 1):
            raise ConfigError(
                f"{name} is {value!r}; it must be a share in [0, 1): 0 removes nothing, 0.25 a quarter, and 1 would "
                f"leave nothing."
            )

    def _check_integer(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("target_params", "vocab_size", "vocab_min_count"):
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {lowest}.")
        if value >= 2**63:
            raise ConfigError(f"{name} is {value!r}; it must be below 2^63.")

    def _check_name(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(unknown_name(name, value, allowed))

    def _fill_in(self) -> None:
        if not self.prunes_units and not self.prunes_vocabulary:
            self.pruning_ratio = DEFAULT_PRUNING_RATIO
        if self.allocation is None:
            fixed = self.mlp_ratio is not None or self.attention_ratio is not None or self.native_architecture
            nothing = self.pruning_ratio == 0 or self.num_calibration_samples < 2  # to remove, or to measure on
            self.allocation = "adaptive" if self.has_total_budget and not (fixed or nothing) else "uniform"

    @property
    def has_total_budget(self) -> bool:
        """Whether the budget is for all parameters, or for the loss."""
        return any(x is not None for x in (self.pruning_ratio, self.target_params, self.max_loss_increase))

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
        if self.reconstruction == "sequential" and self.criterion == "taylor":
            raise ConfigError(
                "criterion='taylor' needs gradients, which the walk of reconstruction='sequential' does not have. Use "
                "criterion='obs', or reconstruction='least_squares'."
            )
        if self.allocation == "adaptive" and self.native_architecture:
            raise ConfigError(
                "allocation='adaptive' gives layers different widths, which native_architecture=True rules out; leave allocation out "
                "(None; a config fills it in)."
            )
        if self.refit_lm_head and self.reconstruction == "none":
            raise ConfigError(
                "refit_lm_head=True reconstructs more, and reconstruction='none' nothing; use another reconstruction, or leave "
                "refit_lm_head out."
            )
        self._check_thresholds(total)
        self._check_vocabulary(total)

    def _check_thresholds(self, total: bool) -> None:
        given = [name for name in THRESHOLDS if getattr(self, name) is not None]
        for name in given:
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ConfigError(f"{name} is {value!r}; it must be a number of at least 0 (the paper has 1e-3).")
            if name == "embedding_threshold" and value > 1:
                raise ConfigError(f"{name} is {value!r}; it must be a share of the text's tokens, in [0, 1].")
        if not given:
            return
        sized = total or self.max_loss_increase is not None or bool(self.mlp_ratio or self.attention_ratio)
        if sized or self.allocation == "adaptive" or self.native_architecture or self.round_to > 1:
            raise ConfigError(
                f"{given[0]} says by itself what goes, layer by layer; leave out sizes (pruning_ratio, target_params, "
                f"mlp_ratio, attention_ratio, max_loss_increase), allocation, stock and round_to, or the thresholds."
            )
        if self.criterion != "l1" or self.reconstruction != "none":
            raise ConfigError(
                f"{given[0]} is the paper's rule, which compares mean |x| and repairs nothing: give criterion='l1' and "
                f"reconstruction='none' with it (here: {self.criterion!r}, {self.reconstruction!r})."
            )

    def _check_vocabulary(self, total: bool) -> None:
        given = [
            name
            for name in ("vocab_size", "vocab_coverage", "vocab_min_count", "vocab_auto", "embedding_threshold")
            if (value := getattr(self, name)) is not None and value is not False
        ]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each set the number of tokens; give one of them.")
        if not self.vocab_auto:
            return
        if not total or self.pruning_ratio == 0:
            raise ConfigError(
                "vocab_auto needs a budget to share: pruning_ratio (above 0) or target_params. Or give vocab_size."
            )
        if self.allocation != "adaptive" or self.mlp_ratio is not None or self.attention_ratio is not None:
            raise ConfigError(
                "vocab_auto shares one budget between tokens and other units by their measured cost: it needs "
                "allocation='adaptive' (so not stock), and no mlp_ratio or attention_ratio. Or fix the tokens: "
                "vocab_size."
            )

    @property
    def prunes_units(self) -> bool:
        """Whether MLP neurons or KV groups may go."""
        sizes = (
            *(self.pruning_ratio, self.target_params, self.max_loss_increase),
            *(self.mlp_ratio, self.attention_ratio),
        )
        return self.thresholds_units or any(size is not None for size in sizes)

    @property
    def thresholds_units(self) -> bool:
        """Whether the paper's thresholds say which neurons and KV groups go."""
        return self.linear_threshold is not None or self.activation_threshold is not None

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether tokens may go."""
        return self.vocab_auto or any(
            size is not None
            for size in (self.vocab_size, self.vocab_coverage, self.vocab_min_count, self.embedding_threshold)
        )

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """Build from a mapping of options; ``seed`` may stand for ``pruning_seed``, as on the command line.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        if "seed" in values and "pruning_seed" not in values:
            values = {"pruning_seed" if name == "seed" else name: value for name, value in values.items()}
        return from_options(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> PrunerConfig:
        """Read options from a YAML file (a flat mapping).

        Raises:
            ConfigError: The file is missing, not YAML or not a mapping, or has an unknown key.
        """
        return cls.from_dict(read_yaml(path))


def from_options(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from a mapping of options.

    Raises:
        ConfigError: An unknown key, with the nearest known one.
    """
    allowed = [item.name for item in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise ConfigError(unknown_name("option", key, allowed))
    return config_class(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML mapping.

    Raises:
        ConfigError: The file is missing, not YAML or not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The config file {path} can't be read: {error}. It must be a YAML mapping.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"The config file {path} holds a {type(values).__name__}; it must be a mapping, as in 'pruning_ratio: 0.2'."
        )
    return {
        name: _number(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for name, value in values.items()
    }


def _number(value: str) -> float | int:
    """What people mean by 1e-2 or 5e7, which YAML 1.1 reads as strings."""
    number = float(value)
    return int(number) if number.is_integer() else number


def is_number(value: object) -> bool:
    """Whether a value is a finite number (and no bool)."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
