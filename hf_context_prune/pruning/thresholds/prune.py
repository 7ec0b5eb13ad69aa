"""The paper's own protocol: zero what lies below a threshold, and remove for real the units that are then dead.

Mini-GPTs (arXiv 2312.12682, section 3) and its code compare mean |x| over the calibration text with thresholds, and
write zeros into the weights: nothing gets smaller. Here the same weights become zero; a unit that thereby adds nothing
to the output any more is cut out, exactly; what no unit covers (rows and columns of single layers, such as inputs of
q, k and v) stays as zeros, and is counted apart.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.config import ThresholdConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.architectures import check_supported, layers_of, output_projection, output_weight
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.specs import ArchSpec, Geometry, read_geometry
from hf_context_prune.modeling.token_rows import token_modules
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel
from hf_context_prune.utils.version import versions

from .magnitudes import Magnitudes, linear_layers


@dataclass(frozen=True)
class ZeroCounts:
    """Parameters by what became of them; tied ones once.

    Attributes:
        removed: Cut out.
        zeroed: Those that became zero and stay.
    """

    removed: int
    zeroed: int


@torch.no_grad()
def zero_below_(
    model: PreTrainedModel, magnitudes: Magnitudes, *, linear: float | None = None, activation: float | None = None
) -> None:
    """Write zeros where the paper's code does (`prune_linear`, `prune_activations`), in place.

    Args:
        model: The model that was measured, or a copy.
        magnitudes: From [`measure_magnitudes`][].
        linear: Columns with mean |x| <= this, rows with mean |y| or mean |y - b| <= this, and biases with mean |y| <=
            this become zero, in every linear layer. None: no layer is touched.
        activation: Neurons whose activation has mean |a| <= this lose their row and bias in the layer before it. None:
            no neuron does.
    """
    spec = check_supported(model)
    if linear is not None:
        for name, module in linear_layers(model):
            found, weight = magnitudes.linears[name], module.weight
            weight[found.smallest_outputs.to(weight.device) <= linear] = 0
            weight[:, found.inputs.to(weight.device) <= linear] = 0
            if module.bias is not None:
                module.bias[found.outputs.to(weight.device) <= linear] = 0
    if activation is not None:
        for block, mean in zip(layers_of(model, spec), magnitudes.activations, strict=True):
            module = block.get_submodule(spec.mlp_inputs[0])
            assert isinstance(module, nn.Linear)
            gone = mean.to(module.weight.device) <= activation
            module.weight[gone] = 0
            if module.bias is not None:
                module.bias[gone] = 0


def _rows_alive(module: nn.Module) -> torch.Tensor:
    """Output features that are not zero whatever the input, [out_features], bool."""
    assert isinstance(module, nn.Linear)
    alive = module.weight.ne(0).any(dim=1)
    return alive if module.bias is None else alive | module.bias.ne(0)


def _live_neurons(block: nn.Module, spec: ArchSpec) -> torch.Tensor:
    alive = output_weight(output_projection(block, spec, "mlp")).ne(0).any(dim=0)
    activation = block.get_submodule(spec.activation)
    vanishes = bool((activation(torch.zeros(1, device=alive.device)) == 0).all())  # sigmoid does not
    for index, path in enumerate(spec.mlp_inputs):
        if index > 0 or vanishes:
            alive = alive & _rows_alive(block.get_submodule(path))
    return alive


def _live_groups(block: nn.Module, spec: ArchSpec, geometry: Geometry, groups: int) -> torch.Tensor:
    dim = geometry.head_dim
    columns = output_weight(output_projection(block, spec, "attention")).ne(0).any(dim=0).reshape(groups, -1, dim)
    for projection in spec.attention_inputs:
        if projection.roles == ("value",):  # stacked ones: the columns alone decide
            columns = columns & _rows_alive(block.get_submodule(projection.path)).reshape(groups, 1, dim)
    return columns.flatten(1).any(dim=1)


def live_units(model: PreTrainedModel) -> tuple[LayerPlan, ...]:
    """The units of every layer that can still add something to the output; at least one of each.

    A neuron is dead if its column of the output projection is zero, or its activation is zero whatever the input; a KV
    group, if that holds of every feature of its values.
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    plans = []
    for block, widths in zip(layers_of(model, spec), geometry.layers, strict=True):
        kept = [
            tuple(alive.nonzero().flatten().tolist()) or (0,)
            for alive in (_live_neurons(block, spec), _live_groups(block, spec, geometry, widths.kv_groups))
        ]
        plans.append(LayerPlan(*kept))
    return tuple(plans)


@torch.no_grad()
def zeros_of_paper(
    dense: PreTrainedModel, magnitudes: Magnitudes | None, config: ThresholdConfig, tokens: Collection[int]
) -> int:
    """Parameters that become zero in the paper's code, which cuts out nothing; tied ones once.

    Args:
        dense: The dense model; left as it is.
        magnitudes: Of the dense model; None where there is no threshold for units.
        config: The thresholds.
        tokens: Whose rows in embedding and head the paper's code zeroes (but not the head's bias).
    """
    zeroed = copy.deepcopy(dense)
    if magnitudes is not None:
        zero_below_(zeroed, magnitudes, linear=config.linear_threshold, activation=config.activation_threshold)
    for module in token_modules(zeroed):
        module.weight[sorted(tokens)] = 0
    return count_zeros(zeroed) - count_zeros(dense)


def count_zeros(model: nn.Module) -> int:
    """Parameters that are zero, tied ones once."""
    return sum(parameter.numel() - int(parameter.count_nonzero()) for parameter in model.parameters())


def prune_by_thresholds(
    model: PreTrainedModel, magnitudes: Magnitudes, config: ThresholdConfig, provenance: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PruningPlan, ZeroCounts]:
    """The paper's rule on a model: zeros below the thresholds, dead units cut out.

    Args:
        model: The dense model, perhaps with fewer tokens; left as it is.
        magnitudes: Measured on the dense model.
        config: With `linear_threshold`, `activation_threshold`, or both.
        provenance: Goes into the plan.

    Returns:
        (the smaller model, whose logits equal those of the zeroed one, the plan, what was counted).

    Raises:
        ConfigError: There is neither.
    """
    if config.linear_threshold is None and config.activation_threshold is None:
        raise ConfigError("There is no threshold for units; give linear_threshold or activation_threshold.")
    spec = check_supported(model)
    zeroed = copy.deepcopy(model)
    zero_below_(zeroed, magnitudes, linear=config.linear_threshold, activation=config.activation_threshold)
    plan = PruningPlan(
        model_type=spec.model_type,
        dense=read_geometry(model.config, spec).layers,
        layers=live_units(zeroed),
        model_fingerprint=fingerprint(zeroed),
        provenance={},
    )
    smaller = apply_plan(zeroed, plan).eval()
    dense, left = model.num_parameters(), smaller.num_parameters()
    before = apply_plan(model, replace(plan, model_fingerprint=fingerprint(model)))
    zeroed_left = count_zeros(smaller) - count_zeros(before)
    counts = ZeroCounts(dense - left, zeroed_left)
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
    """A sentence for the report on what thresholds zeroed and nobody could remove."""
    zeroed = (plan.provenance.get("zeroed") or {}).get("zeroed_not_removed")
    if not zeroed:
        return ()
    return (f"Thresholds: {zeroed:,} parameters became zeros that stay in the file, since no whole unit is dead.",)


def prune_below_thresholds(
    dense: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    config: ThresholdConfig,
    magnitudes: Magnitudes,
    trimmed: TrimmedModel | None,
    provenance: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any, PruningPlan]:
    """The paper's rule on units, by magnitudes that serve any thresholds.

    Args:
        dense: The dense model; left as it is.
        tokenizer: Its tokenizer.
        config: With thresholds for units.
        magnitudes: Of the dense model.
        trimmed: The model with fewer tokens, where tokens go too.
        provenance: Goes into the plan.

    Returns:
        (the smaller model, its tokenizer, the plan, which is one for the dense model).
    """
    model, vocabulary, facts = dense, None, dict(provenance or {})
    if trimmed is not None:
        model, tokenizer, vocabulary = trimmed.model, trimmed.tokenizer, trimmed.plan.vocabulary
        assert vocabulary is not None
        magnitudes = magnitudes.of_tokens(dense, vocabulary.kept)
        facts |= trimmed.plan.provenance
    smaller, plan, _ = prune_by_thresholds(model, magnitudes, config, facts)
    return smaller, tokenizer, replace(plan, vocabulary=vocabulary, model_fingerprint=fingerprint(dense))
