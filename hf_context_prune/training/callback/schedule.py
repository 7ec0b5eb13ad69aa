"""When to prune during training, and how far: step -> config of that pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError, unknown_name
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.uniform import round_half_up
from hf_context_prune.utils.options import is_number, option

Shape = Literal["cubic", "linear"]


@dataclass(frozen=True)
class PruningSchedule:
    """Several prunings at equal distances, from `start` to `end`.

    Attributes:
        start: First pruning: a share of the training, in (0, 1), or a step, from 1.
        end: Last pruning, in the same terms.
        num_prunings: How many prunings; 1 prunes at `start` alone.
        shape: Share of the removal that is done after a share t of the prunings: ``cubic`` 1 - (1 - t)^3 (Zhu and
            Gupta, arXiv 1710.01878, Eq. 1), ``linear`` t.

    Raises:
        ConfigError: A value out of range.
    """

    start: float = option(0.1, "First pruning: a share of the training, in (0, 1), or a step, from 1.")
    end: float = option(0.5, "Last pruning, in the same terms.")
    num_prunings: int = option(3, "How many prunings; 1 prunes at --start alone.")
    shape: Shape = option(
        "cubic",
        "How the removed share grows from pruning to pruning: cubic removes more at first; linear as much each time.",
    )

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("start", "end"):
            value = getattr(self, name)
            whole = is_number(value) and value >= 1 and float(value).is_integer()
            if not (whole or (is_number(value) and 0 < value < 1)):
                raise ConfigError(
                    f"The schedule's {name} is {value!r}; it must be a share of the training in (0, 1), or a step: a "
                    f"whole number from 1 on."
                )
            object.__setattr__(self, name, int(value) if whole else float(value))
        if type(self.start) is type(self.end) and self.num_prunings != 1 and self.start > self.end:
            raise ConfigError(f"The schedule's start is {self.start!r}, after its end {self.end!r}; swap them.")
        count = self.num_prunings
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"The schedule's num_prunings is {count!r}; it must be an integer of at least 1.")
        if self.shape not in get_args(Shape):
            raise ConfigError(unknown_name("shape", self.shape, get_args(Shape)))

    def steps(self, max_steps: int) -> tuple[int, ...]:
        """Return the steps after which to prune, ascending.

        Args:
            max_steps: Steps of the training.

        Raises:
            ConfigError: The prunings do not fit into the training.
        """
        first, last = (
            value if isinstance(value, int) else max(1, round(value * max_steps)) for value in (self.start, self.end)
        )
        if self.num_prunings == 1:
            last = first
        if last >= max_steps:
            raise ConfigError(
                f"The schedule's last pruning is at step {last}, but the training ends with step {max_steps}: no "
                f"step would follow to train the pruned model. Prune earlier, or train longer."
            )
        if last - first < self.num_prunings - 1:
            raise ConfigError(
                f"The schedule has {self.num_prunings} prunings between step {first} and step {last}; at most "
                f"{max(0, last - first) + 1} fit there (start must not be after end). Use fewer, or train longer."
            )
        gaps = max(1, self.num_prunings - 1)
        return tuple(first + (last - first) * index // gaps for index in range(self.num_prunings))

    def share(self, pruning: int) -> float:
        """Return the share of the whole removal that is done after a pruning, counted from 0."""
        done = (pruning + 1) / self.num_prunings
        return done if self.shape == "linear" else 1 - (1 - done) ** 3

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain values."""
        return asdict(self)


def config_for_pruning(
    share: float,
    config: PrunerConfig,
    dense: Sequence[LayerWidths],
    current: Sequence[LayerWidths],
    final: Sequence[LayerWidths] | None,
    total_params: int,
) -> PrunerConfig:
    """Return the config of one pruning, in terms of the model before that pruning.

    Args:
        share: Share of the whole removal that is done after it.
        config: Config of the whole training.
        dense: Widths at the begin of the training.
        current: Widths before this pruning.
        final: Uniform widths after the last pruning; None for adaptive ones, which are found by measuring.
        total_params: Parameters at the begin of the training.
    """
    if final is None:
        remove = ParameterBudget.of(config, total_params).remove_params or 0
        return replace(config, pruning_ratio=None, target_params=int(total_params - share * remove))
    at = next((index for index, layer in enumerate(dense) if layer.neurons), 0)  # others have experts
    first, last, now = dense[at], final[at], current[at]
    neurons = first.neurons - round_half_up(share * (first.neurons - last.neurons))
    neurons = min(now.neurons, -(-neurons // config.round_to) * config.round_to) if share < 1 else last.neurons
    at = next((index for index, layer in enumerate(dense) if layer.kv_groups), 0)  # not all layers need have them
    most, fewest, left = dense[at].kv_groups, final[at].kv_groups, current[at].kv_groups
    groups = most - round_half_up(share * (most - fewest))
    return replace(
        config,
        pruning_ratio=None,
        target_params=None,
        native_architecture=False,  # the last widths are known to fit, and the widths before need not
        mlp_ratio=1 - neurons / now.neurons if now.neurons else 0.0,
        attention_ratio=1 - groups / left if left else 0.0,
    )
