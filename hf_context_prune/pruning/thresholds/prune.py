"""The paper's protocol: zero the weights below a threshold, and remove the units that are then dead.

Mini-GPTs (arXiv 2312.12682, section 3) and its code compare mean |x| over the calibration text with thresholds, and
write zeros into the weights: nothing gets smaller. Here the same weights become zero, and a unit that then adds nothing
to the output is removed, exactly. Zeros that no unit covers (rows and columns of single linear layers, such as inputs
of q, k and v) stay, and are counted separately.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import ThresholdConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.architectures import activation_of, output_projection, output_weight
from hf_context_prune.modeling.geometry import Geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.modeling.token_rows import token_modules
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel
from hf_context_prune.utils.version import versions

from .magnitudes import Magnitudes, linear_layers


@dataclass(frozen=True)
class ZeroCounts:
    """How many parameters thresholds removed or zeroed; tied ones counted once.

    Attributes:
        removed: Parameters that were removed.
        zeroed: Parameters that became zero and stay.
    """

    removed: int
    zeroed: int


@torch.no_grad()
def zero_below_(
    model: PreTrainedModel, magnitudes: Magnitudes, *, linear: float | None = None, activation: float | None = None
) -> None:
    """Write zeros where the paper's code does (`prune_linear`, `prune_activations`), in place.

    Args:
        model: The model that was measured, or a copy of it.
        magnitudes: From [`measure_magnitudes`][].
        linear: Columns with mean |x| <= this, rows with mean |y| or mean |y - b| <= this, and biases with mean |y| <=
            this become zero, in every linear layer. None: no layer is touched.
        activation: Neurons whose activation has mean |a| <= this lose their row and bias in the layer before it. None:
            no neuron does.
    """
    view = ModelView.of(model)
    if linear is not None:
        for name, module in linear_layers(model):
            found, weight = magnitudes.linears[name], module.weight
            weight[found.smallest_outputs.to(weight.device) <= linear] = 0
            weight[:, found.inputs.to(weight.device) <= linear] = 0
            if module.bias is not None:
                module.bias[found.outputs.to(weight.device) <= linear] = 0
    if activation is not None:
        for layer, mean in zip(view.layers, magnitudes.activations, strict=True):
            module = layer.get_submodule(view.spec.mlp_inputs[0])
            assert isinstance(module, nn.Linear)
            gone = (mean.to(module.weight.device) <= activation).nonzero().flatten()  # rows of its first block
            module.weight[gone] = 0
            if module.bias is not None:
                module.bias[gone] = 0


def _rows_alive(module: nn.Module) -> torch.Tensor:
    """Return which output features can be other than zero, [out_features], bool."""
    assert isinstance(module, nn.Linear)
    alive = module.weight.ne(0).any(dim=1)
    return alive if module.bias is None else alive | module.bias.ne(0)


def _live_neurons(layer: nn.Module, spec: ArchSpec) -> torch.Tensor:
    """Return which neurons can add something to the output, [neurons], bool."""
    alive = output_weight(output_projection(layer, spec, "mlp")).ne(0).any(dim=0)
    activation = activation_of(layer, spec)
    vanishes = bool((activation(torch.zeros(1, device=alive.device)) == 0).all())  # sigmoid does not
    blocks = [part for path in spec.mlp_inputs for part in _rows_alive(layer.get_submodule(path)).split(len(alive))]
    for index, rows in enumerate(blocks):
        if index > 0 or vanishes:
            alive = alive & rows
    return alive


def _live_groups(layer: nn.Module, spec: ArchSpec, geometry: Geometry, groups: int) -> torch.Tensor:
    """Return which KV groups can add something to the output, [groups], bool."""
    dim = geometry.head_dim
    columns = output_weight(output_projection(layer, spec, "attention")).ne(0).any(dim=0).reshape(groups, -1, dim)
    for projection in spec.attention_inputs:
        if projection.roles == ("value",):  # of stacked projections, the columns alone decide
            columns = columns & _rows_alive(layer.get_submodule(projection.path)).reshape(groups, 1, dim)
    return columns.flatten(1).any(dim=1)


def _units(alive: torch.Tensor) -> tuple[int, ...]:
    return tuple(alive.nonzero().flatten().tolist()) or (0,)


def live_units(model: PreTrainedModel) -> tuple[LayerPlan, ...]:
    """Return the units of every layer that can add something to the output; at least one of each kind.

    A neuron is dead if its column of the output projection is zero, or its activation is zero for every input. A KV
    group is dead if that is true of every feature of its values.
    """
    view = ModelView.of(model)
    plans = []
    for layer, widths in zip(view.layers, view.widths, strict=True):
        groups: tuple[int, ...] = ()
        neurons = _units(_live_neurons(layer, view.spec))
        if widths.kv_groups:
            groups = _units(_live_groups(layer, view.spec, view.geometry, widths.kv_groups))
        plans.append(LayerPlan(neurons, groups))
    return tuple(plans)


@torch.no_grad()
def count_zeros_of_paper(
    base: PreTrainedModel, magnitudes: Magnitudes | None, config: ThresholdConfig, tokens: Collection[int]
) -> int:
    """Count the parameters that become zero in the paper's code, which removes nothing; tied ones counted once.

    Args:
        base: The base model; unchanged.
        magnitudes: Measured on the base model; None where there is no threshold for units.
        config: The thresholds.
        tokens: Vocabulary entries whose rows in embedding and head the paper's code zeroes (but not the head's bias).
    """
    zeroed = copy.deepcopy(base)
    if magnitudes is not None:
        zero_below_(zeroed, magnitudes, linear=config.linear_threshold, activation=config.activation_threshold)
    for module in token_modules(zeroed):
        module.weight[sorted(tokens)] = 0
    return count_zeros(zeroed) - count_zeros(base)


def count_zeros(model: nn.Module) -> int:
    """Count the parameters that are zero, tied ones once."""
    return sum(parameter.numel() - int(parameter.count_nonzero()) for parameter in model.parameters())


def prune_by_thresholds(
    model: PreTrainedModel, magnitudes: Magnitudes, config: ThresholdConfig, provenance: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PruningPlan, ZeroCounts]:
    """Apply the paper's rule to a model: write zeros below the thresholds and remove dead units.

    Args:
        model: The base model, possibly with a smaller vocabulary; unchanged.
        magnitudes: Measured on the base model.
        config: With `linear_threshold`, `activation_threshold`, or both.
        provenance: Added to the plan.

    Returns:
        (the smaller model, whose logits equal those of the zeroed model; the plan; how many parameters it changed).

    Raises:
        ConfigError: Neither threshold is given.
    """
    if config.linear_threshold is None and config.activation_threshold is None:
        raise ConfigError("There is no threshold for units; give linear_threshold or activation_threshold.")
    view, zeroed = ModelView.of(model), copy.deepcopy(model)
    zero_below_(zeroed, magnitudes, linear=config.linear_threshold, activation=config.activation_threshold)
    plan = PruningPlan(
        model_type=view.spec.model_type,
        dense=view.widths,
        layers=live_units(zeroed),
        model_fingerprint=fingerprint(zeroed),
        provenance={},
    )
    smaller = apply_plan(zeroed, plan).eval()
    sliced = apply_plan(model, replace(plan, model_fingerprint=fingerprint(model)))
    counts = ZeroCounts(
        removed=view.num_parameters - smaller.num_parameters(), zeroed=count_zeros(smaller) - count_zeros(sliced)
    )
    facts = {
        "config": config.to_dict(),
        "num_calibration_samples": magnitudes.num_samples,
        "num_calibration_tokens": magnitudes.num_tokens,
        "versions": versions(),
        "zeroed": {"removed": counts.removed, "zeroed_not_removed": counts.zeroed},
    }
    final = replace(plan, model_fingerprint=fingerprint(model), provenance={**(provenance or {}), **facts})
    return smaller, final, counts


def zeros_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence for the report on the zeros that no unit covers, where there are any."""
    zeroed = (plan.provenance.get("zeroed") or {}).get("zeroed_not_removed")
    if not zeroed:
        return ()
    return (f"Thresholds: {zeroed:,} parameters became zeros that stay in the file, since no whole unit is dead.",)


def prune_below_thresholds(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ThresholdConfig,
    magnitudes: Magnitudes,
    trimmed: TrimmedModel | None,
    provenance: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PruningPlan]:
    """Apply the paper's rule to units, with magnitudes that serve any thresholds.

    Args:
        base: The base model; unchanged.
        tokenizer: Its tokenizer.
        config: With thresholds for units.
        magnitudes: Measured on the base model.
        trimmed: The model with a smaller vocabulary, where that is pruned too.
        provenance: Added to the plan.

    Returns:
        (the smaller model, its tokenizer, the plan, made for the base model).
    """
    model, vocabulary, facts = base, None, dict(provenance or {})
    if trimmed is not None:
        model, tokenizer, vocabulary = trimmed.model, trimmed.tokenizer, trimmed.plan.vocabulary
        assert vocabulary is not None
        magnitudes = magnitudes.for_vocabulary(base, vocabulary.kept)
        facts |= trimmed.plan.provenance
    smaller, plan, _ = prune_by_thresholds(model, magnitudes, config, facts)
    return smaller, tokenizer, replace(plan, vocabulary=vocabulary, model_fingerprint=fingerprint(base))
