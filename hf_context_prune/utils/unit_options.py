"""Which units the options of a pruning config let go, and what decides how many: a budget, a number or the text."""

from __future__ import annotations

from typing import Literal, get_args

from hf_context_prune.errors import ConfigError

from .layer_options import LayerOptions

UnitName = Literal["tokens", "neurons", "kv_groups", "layers"]
UNITS: tuple[UnitName, ...] = get_args(UnitName)
DEFAULT_UNITS: tuple[UnitName, ...] = ("tokens", "neurons", "kv_groups")
"""What shares a budget where a config names no units."""
_TOKEN_SIZES = ("vocab_size", "vocab_coverage", "vocab_min_count")


class UnitChoices(LayerOptions):
    """What of a model may go, as the options of a config say.

    A kind of unit is fixed (its number is given, or follows from the text alone) or searched (the budget decides).
    """

    pruning_ratio: float | None
    target_params: int | None
    max_loss_increase: float | None
    mlp_ratio: float | None
    attention_ratio: float | None
    allocation: str | None
    units: str | None
    vocab_size: int | None
    vocab_coverage: float | None
    vocab_min_count: int | None

    def check_units(self) -> None:
        """Refuse units and their numbers where they contradict each other.

        Raises:
            ConfigError: Names them.
        """
        given = [name for name in _TOKEN_SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each set the size of the vocabulary; give one of them.")
        if given and not self.lists("tokens"):
            raise ConfigError(
                f"{given[0]} removes tokens, and units={self.units!r} keeps them all; add tokens to units, or leave "
                f"{given[0]} out."
            )
        if self.units is not None and not self.shares_budget:
            raise ConfigError(
                f"units={self.units!r} says what shares one budget by measured loss: it needs pruning_ratio (above 0), "
                f"target_params or max_loss_increase, with allocation='adaptive' and without mlp_ratio and "
                f"attention_ratio. Leave units out."
            )
        fixed = "layer_ratio" if self.num_layers is None else "num_layers"
        if self.units == "layers" and getattr(self, fixed) is not None:
            raise ConfigError(
                f"units='layers' lets the budget say how many layers go, and {fixed} says it too; give one of the two, "
                f"or add other units, which then give the rest of the budget."
            )
        if self.removable_layers is not None and not self.removes_layers:
            raise ConfigError(
                f"removable_layers={self.removable_layers!r} says which layers may be removed, but none is to be: give "
                f"num_layers or layer_ratio (above 0) too, add layers to units, or leave it out."
            )

    def lists(self, unit: UnitName) -> bool:
        """Return whether a kind of unit is among those that share a budget."""
        return unit in (DEFAULT_UNITS if self.units is None else self.units.split(","))

    @property
    def has_total_budget(self) -> bool:
        """Whether the budget is for all parameters, or for the loss."""
        return any(x is not None for x in (self.pruning_ratio, self.target_params, self.max_loss_increase))

    @property
    def shares_budget(self) -> bool:
        """Whether one budget is spent on several kinds of units, by what each costs in measured loss."""
        ratios = self.mlp_ratio is not None or self.attention_ratio is not None
        return self.has_total_budget and self.allocation == "adaptive" and not ratios

    @property
    def prunes_layers(self) -> bool:
        """Whether MLP neurons or KV groups may be removed, inside the layers."""
        inside = self.lists("neurons") or self.lists("kv_groups")
        return (self.has_total_budget and inside) or self.mlp_ratio is not None or self.attention_ratio is not None

    @property
    def fixes_tokens(self) -> bool:
        """Whether the number of tokens is given, or follows from the text alone."""
        return any(getattr(self, name) is not None for name in _TOKEN_SIZES)

    @property
    def searches_tokens(self) -> bool:
        """Whether the budget decides how many tokens stay (where the tokenizer can be trimmed)."""
        return self.shares_budget and self.lists("tokens") and not self.fixes_tokens

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether tokens may be removed."""
        return self.fixes_tokens or self.searches_tokens

    @property
    def searches_layers(self) -> bool:
        """Whether the budget decides how many decoder layers are removed as a whole."""
        fixed = self.num_layers is not None or self.layer_ratio is not None
        return self.shares_budget and self.lists("layers") and not fixed

    @property
    def removes_layers(self) -> bool:
        """Whether decoder layers may be removed as a whole."""
        return self.fixes_layers or self.searches_layers
