"""Every option of a pruning run, for Python, YAML and HfArgumentParser; the command line is made from the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from hf_context_prune.utils.expert_options import EXPERT_SIZES, ExpertOptions
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
    is_number,
    listed_names,
    name_such_as,
    option,
)
from hf_context_prune.utils.text_options import TextOptions
from hf_context_prune.utils.unit_options import DEFAULT_UNITS, UNITS, UnitChoices

from .errors import ConfigError

CriterionName = Literal["random", "magnitude", "l1", "wanda", "flap", "taylor", "obs"]
ReconstructionName = Literal["none", "bias", "least_squares", "sequential"]
AllocationName = Literal["uniform", "adaptive"]
VocabCriterion = Literal["expected", "frequency"]

DEFAULT_PRUNING_RATIO = 0.2
DEFAULT_PAD_TO_MULTIPLE_OF = 64
NATIVE_TOLERANCE = 0.01
"""Bits per byte, as a share of the base model's, that the native architecture may cost to be the default."""
DEFAULT_RIDGE = 0.3
"""Ridge of every Gram matrix that is inverted, as a share of each feature's mean square."""
THRESHOLDS = ("linear_threshold", "activation_threshold", "embedding_threshold")
_RATIO = below_one("0 removes nothing, 0.25 a quarter, and 1 would leave nothing")
_THRESHOLD = Allowed(lambda value: is_number(value) and value >= 0, "a number of at least 0 (the paper has 1e-3)")


@dataclass(kw_only=True)
class CalibrationConfig(TextOptions):
    """The text that a pruning run is calibrated on.

    Raises:
        ConfigError: A value out of range, or an unknown name.
    """

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from a mapping of options; ``seed`` may stand for ``pruning_seed``, as on the command line.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        if "seed" in values and "pruning_seed" not in values:
            values = {"pruning_seed" if name == "seed" else name: value for name, value in values.items()}
        return super().from_dict(values)


@dataclass(kw_only=True)
class PrunerConfig(ExpertOptions, UnitChoices, CalibrationConfig):
    """What to remove, how to choose it, and how to reconstruct the rest.

    The budget is a share or number of *all* parameters (`pruning_ratio`, `target_params`; by default 0.2), a share
    of a kind of unit (`mlp_ratio`, `attention_ratio`; beside a share of all parameters, the other kind gives the
    rest), a number of layers (`num_layers`, `layer_ratio`) or of experts (`num_experts`, `experts_ratio`,
    `expert_neurons_ratio`, `shared_expert_ratio`), or the
    loss that may be added (`max_loss_increase`). Model and text decide what stays None.

    Raises:
        ConfigError: A value out of range, an unknown name, or options that contradict each other.

    Example:
        ```python
        from hf_context_prune import PrunerConfig
        config = PrunerConfig(pruning_ratio=0.3, units="neurons,kv_groups", native_architecture=True)
        ```
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
    units: str | None = option(
        None,
        f"What may be removed, separated by commas: {', '.join(UNITS)}. By default {', '.join(DEFAULT_UNITS)} where "
        f"the budget is for all parameters or the loss; the next best where a tokenizer can't be trimmed.",
        panel=BUDGET,
        allowed=Allowed(lambda value: listed_names(value, UNITS) is not None, f"one or several of {', '.join(UNITS)}"),
        metavar="NAMES",
    )
    vocab_size: int | None = option(
        None,
        "Number of vocabulary entries to keep, instead of what the budget for all units finds.",
        panel=VOCABULARY,
        allowed=at_least(1),
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
        "adaptive: sizes by measured effect on the loss; uniform: the same share of every layer, and nothing measured. "
        "By default adaptive if the budget is for all parameters or the loss, and uniform with mlp_ratio, "
        "attention_ratio or a single sample of text.",
        panel=METHOD,
    )
    refit_lm_head: bool | None = option(
        None,
        "After pruning, refit the LM head (and the tied embedding) on the calibration text: less loss at the same "
        "size. By default done, but with reconstruction none.",
        panel=METHOD,
    )
    round_to: int = option(
        1,
        "Keep MLP widths at a multiple of this number. Any width is as fast on a CPU; GPUs like multiples of 8 or 64.",
        panel=METHOD,
        allowed=at_least(1),
    )
    native_architecture: bool | None = option(
        None,
        "Plan only widths that the model's own architecture can hold, so that it loads without this package. By "
        "default done where that costs at most 1 percent more bits per byte than widths that differ by layer.",
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
        super().__post_init__()
        self.units = None if self.units is None else ",".join(listed_names(self.units, UNITS) or ())
        self._fill_in()
        self._check_budget()
        self._check_method()
        self.check_layers()
        self.check_units()
        self.check_experts()

    def _fill_in(self) -> None:
        fixed = self.mlp_ratio is not None or self.attention_ratio is not None
        if not (self.has_total_budget or fixed or self.fixes_tokens or self.fixes_layers or self.prunes_experts):
            zero = any(getattr(self, name) is not None for name in ("layer_ratio", *EXPERT_SIZES))
            self.pruning_ratio = 0.0 if zero else DEFAULT_PRUNING_RATIO  # a share of 0 removes nothing, as asked
        if self.allocation is None:
            nothing = self.pruning_ratio == 0 or self.num_calibration_samples < 2  # to remove, or to measure on
            self.allocation = "adaptive" if self.has_total_budget and not (fixed or nothing) else "uniform"

    def _check_budget(self) -> None:
        if self.pruning_ratio is not None and self.target_params is not None:
            raise ConfigError("pruning_ratio and target_params both set the size; give one of them.")
        if self.max_loss_increase is not None:
            for name in ("pruning_ratio", "target_params", "mlp_ratio", "attention_ratio", *EXPERT_SIZES):
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
        if self.refit_lm_head and self.reconstruction == "none":
            raise ConfigError(
                "refit_lm_head=True reconstructs more, and reconstruction='none' reconstructs nothing; use another "
                "reconstruction, or leave refit_lm_head out."
            )

    @property
    def refits_lm_head(self) -> bool:
        """Whether the rows of the LM head are refitted after pruning."""
        return self.reconstruction != "none" if self.refit_lm_head is None else self.refit_lm_head


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
    def prunes_layers(self) -> bool:
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
