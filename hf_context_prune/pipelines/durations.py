"""How long a run will take on this machine: products of one layer's size are timed, and the rest follows from shapes.

That is meant to tell minutes from hours. A training without a time limit is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, REPEATS
from hf_context_prune.modeling.architectures import output_weight
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.layer_choice import CHOICE_TOKENS, MAP_TOKENS, REPAIR_TOKENS
from hf_context_prune.pruning.allocation.probing import SEARCH_TOKENS, TOKENS_PER_FEATURE
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS, PROBES
from hf_context_prune.pruning.depth import Depth, deepest, removable_layers, stand_in
from hf_context_prune.pruning.experts import count_experts, repairs
from hf_context_prune.pruning.scoring import Requirements
from hf_context_prune.pruning.sequential.expert_repair import SWEEPS
from hf_context_prune.pruning.sequential.layer_pruner import GAP_RIDGES
from hf_context_prune.pruning.sequential.regression import keeps_rows
from hf_context_prune.pruning.vocabulary.refit import num_refit_samples
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.utils.precision import rounded_product
from hf_context_prune.utils.stages import format_seconds

from .needs import expert_shape

_TIMED_TOKENS = 256
"""Tokens of the timed products of a layer."""
_TIMED_WIDTH = 4096
"""Most rows and columns of a matrix that is multiplied; the time of a larger one follows from it."""
_TIMED_SIZE = 1024
"""Rows and columns of the timed products of equations."""
_WALK = 2.5
"""Forward passes of the walk: the base model's, and the pruned one's before and behind each projection."""
_ROUTING = 2
"""Forward passes that the choice of experts is worth, which calls them once per slot of the routing."""
_REPAIR = 3 + 2 * SWEEPS
"""Forward passes of the repair of experts: of both models, once more behind it, and of the experts in every round."""
_SKETCH = 5
"""Forward passes that the gradients of the search are worth."""
_SYSTEMS = 7
"""Systems of a projection: four trial ridges, the best full weights, and two for the narrowed ones."""
_PROCESS = 12
"""Seconds of a fresh process that loads a model and measures its peak memory."""


@dataclass(frozen=True)
class TokenCost:
    """Seconds of a token: of the products with each matrix.

    Attributes:
        layers: In all layers.
        head: In the LM head.
    """

    layers: float
    head: float

    @classmethod
    def timed(cls, model: PreTrainedModel, tokens: int = _TIMED_TOKENS) -> TokenCost:
        """Time the products of each size that occurs.

        Args:
            model: The model; its weights may be on the meta device.
            tokens: Number of tokens that go through together.
        """
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        known: dict[tuple[int, int], float] = {}

        def seconds(weight: torch.Tensor) -> float:
            high, wide = (min(size, _TIMED_WIDTH) for size in weight.shape[-2:])
            if (high, wide) not in known:
                left, right = (torch.ones(n, wide, dtype=model.dtype, device=device) for n in (tokens, high))
                known[high, wide] = _timed(partial(_multiply, left, right))
            return known[high, wide] * (weight.numel() / (high * wide)) / tokens

        view, layers = ModelView.of_shapes(model), 0.0
        for layer, widths in zip(view.layers, view.widths, strict=True):
            for name, weight in layer.named_parameters():
                if weight.ndim > 1:
                    layers += seconds(weight) * _share_computed(view, name, widths.experts)
        return cls(layers, seconds(model.get_output_embeddings().weight))


def _share_computed(view: ModelView, name: str, experts: int) -> float:
    """Return the share of a weight that a token runs through: of experts, those that it is routed to."""
    routed = view.spec.experts
    if routed is None or not experts or not name.startswith(f"{routed.prefix}."):
        return 1.0
    per_token: int = getattr(view.model.config, routed.per_token)
    return per_token / experts


def estimate_seconds(
    model: PreTrainedModel,
    config: CalibrationConfig,
    options: EvalOptions | None = None,
    recovery: RecoveryConfig | None = None,
) -> dict[str, float]:
    """Return the seconds of each long step, from products that are timed here: about two seconds of work.

    Args:
        model: The base model; its weights may be on the meta device.
        config: All choices.
        options: How much is measured.
        recovery: The training after it, whose time is known where it has a limit.
    """
    cost = TokenCost.timed(model)
    steps = _pruning_seconds(model, config, cost.layers)
    if recovery is not None and recovery.max_minutes is not None:
        steps["training"] = 60 * recovery.max_minutes
    steps["measuring"] = estimate_measuring(model, options or EvalOptions(), 2 if recovery is None else 3, cost)
    return steps


def estimate_measuring(
    model: PreTrainedModel, options: EvalOptions, num_models: int, cost: TokenCost | None = None
) -> float:
    """Return the seconds of the figures of a report; a whole text (no `max_tokens`) counts as the default's tokens.

    Args:
        model: The largest of the models; its weights may be on the meta device.
        options: How much is measured.
        num_models: Number of models that are measured on text.
        cost: Seconds of a token; None times them.
    """
    cost = cost or TokenCost.timed(model)
    tokens = (options.max_tokens or EvalOptions().max_tokens or 0) * (1 if options.general_data is None else 2)
    seconds = num_models * tokens * (cost.layers + cost.head)
    if options.benchmark:
        alone = TokenCost.timed(model, tokens=1)
        seconds += 2 * (REPEATS + 1) * (PROMPT_TOKENS * cost.layers + NEW_TOKENS * (alone.layers + alone.head))
    if options.benchmark and options.memory:
        seconds += 2 * _PROCESS
    return seconds


def _pruning_seconds(model: PreTrainedModel, config: CalibrationConfig, dense: float) -> dict[str, float]:
    """Return the seconds of the steps of a pruning, given those of a token in all layers of the base model."""
    view = ModelView.of_shapes(model)
    tokens = config.num_calibration_samples * config.max_seq_length
    if not isinstance(config, PrunerConfig):
        return {"calibration": tokens * dense}
    steps: dict[str, float] = {}
    if (depth := stand_in(model, config) or _most_layers(model, config)) is not None:
        candidates, count = len(removable_layers(model, config)), len(depth.order)
        # Every candidate runs through the layers behind it, about half of them, and through the head.
        choice = count * (candidates * 0.75 * min(tokens, CHOICE_TOKENS) + min(tokens, MAP_TOKENS)) * dense
        if config.searches_layers and config.reconstruction == "sequential":
            choice += count * _WALK * min(tokens, REPAIR_TOKENS) * dense
        steps["choice of layers, at most" if config.searches_layers else "choice of layers"] = choice
    if config.removes_experts:
        steps["choice of experts"] = _ROUTING * tokens * dense
    if config.prunes_experts and repairs(config):
        outputs, features = expert_shape(view)
        systems = (len(GAP_RIDGES) + SWEEPS + config.narrows_experts) * (features**3 / 3 + features**2 * outputs)
        solved = count_experts(model, config) * sum(bool(widths.experts) for widths in view.widths)
        passes = _REPAIR + config.narrows_experts
        steps["experts"] = passes * tokens * dense + solved * systems * _timed_costs()["float64"]
    if config.prunes_layers or depth is not None:
        cost = _timed_costs()
        shapes = [
            tuple(output_weight(view.output_projection(*place)).shape)
            for place in view.places(Requirements.of(config).targets)
        ]
        if config.allocation == "adaptive" and shapes:
            widest = max(widths.neurons for widths in view.widths)
            text = min(tokens, max(SEARCH_TOKENS, TOKENS_PER_FEATURE * widest))
            steps["search"] = (text + _SKETCH * PROBE_TOKENS) * dense
            steps["search"] += sum(_search_seconds(m, n, text, cost) for m, n in shapes)
        steps["layers"] = _WALK * tokens * dense + sum(_solver_seconds(m, n, tokens, cost) for m, n in shapes)
    if config.refits_lm_head:
        samples = num_refit_samples(model, config.num_calibration_samples, config.max_seq_length)
        steps["refit of the LM head"] = 2 * samples * config.max_seq_length * dense
    return steps


def _most_layers(model: PreTrainedModel, config: PrunerConfig) -> Depth | None:
    """Return the most layers that a search looks at: as many as make up the budget; None where it looks at none."""
    if (most := deepest(model, config)) is None:
        return None
    remove = ParameterBudget.of(config, model.num_parameters()).remove_params
    for count in range(1, len(most.order)):
        first = replace(most, order=most.order[:count])
        if remove is not None and first.count_parameters(model) >= remove:
            return first
    return most


def describe_seconds(steps: Mapping[str, float]) -> str:
    """Return the estimate as a sentence."""
    parts = ", ".join(f"{step} {format_seconds(seconds)}" for step, seconds in steps.items())
    total = format_seconds(sum(steps.values()))
    return f"Takes about {total} on this machine when it is idle ({parts})."


def _timed_costs() -> Mapping[str, float]:
    """Return the seconds of a multiplication with addition, by kind of product."""
    matrix = torch.ones(_TIMED_SIZE, _TIMED_SIZE)
    wide = matrix.double()
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "rounded": lambda: rounded_product(matrix, matrix),
        "float32": lambda: matrix @ matrix,
        "float64": lambda: wide @ wide,
    }
    return {kind: _timed(function) / _TIMED_SIZE**3 for kind, function in kinds.items()}


def _multiply(left: torch.Tensor, right: torch.Tensor) -> None:
    product = left @ right.T
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)


def _timed(function: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three calls."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return min(found)


def _solver_seconds(outputs: int, features: int, tokens: int, cost: Mapping[str, float]) -> float:
    """Return the seconds of the equations of one output projection."""
    size, others, kind = (
        (tokens, features, "float32") if keeps_rows(features, tokens) else (features, tokens, "float64")
    )
    systems = _SYSTEMS * (size**3 / 3 + size**2 * outputs)
    surgeon = size**3 + size * features * outputs / 4
    return (systems + surgeon) * cost[kind] + size**2 * others * cost["rounded"]


def _search_seconds(outputs: int, features: int, tokens: int, cost: Mapping[str, float]) -> float:
    """Return the seconds of the Gram matrix, the surgeon's ranks and the probed widths of one output projection."""
    kept = [share * features for share in PROBES]
    systems = sum(n**3 / 3 + n**2 * outputs + n * (features - n) * outputs for n in kept)
    ranks = features**3 + features**2 * (outputs + features)
    return (systems + ranks) * cost["float64"] + features**2 * tokens * cost["rounded"]
