"""Fewer decoder layers: the config of a model that keeps some of them, and the models whose layers must all stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.utils.compat import copy_attention_implementation

from .geometry import WITHOUT_ATTENTION, has_experts
from .plan import PruningPlan
from .specs import ArchSpec

WARNING = (
    "Fewer layers cost multi-step reasoning more than the loss on text shows (of Minitron, GSM8K fell from .87 to .29 "
    "as 4 of 36 layers went, before any training): test the task itself, and train the model back."
)
"""What reports and cards say of a model without some of its layers."""
_NOT_BY_LAYER = ("architectures", "token_id", "token_ids", "keys_to_ignore_at_inference")
"""Ends of the names of lists that have as many entries as there are layers by chance alone."""


def _count_before(value: int, kept: Sequence[int], layers: int) -> int:
    """Return how many of the kept layers are among the first `value`; beyond all layers, the value stays."""
    return value if value > layers else sum(index < value for index in kept)


def _positions(value: Sequence[int], kept: Sequence[int], layers: int) -> list[int]:
    """Return the new numbers of those of these layers that are kept."""
    return [new for new, old in enumerate(kept) if old in value]


def _spelled_out(value: Sequence[Any], kept: Sequence[int], layers: int) -> list[list[Any]]:
    """Return ``attention_types`` of GPT-Neo, [[kinds, repetitions], ...], for the kept layers, without repetitions."""
    kinds = [kind for names, count in value for _ in range(count) for kind in names]
    return [[[kinds[index] for index in kept], 1]]


def _last_experts(value: int, kept: Sequence[int], layers: int) -> int:
    """Return the new number of the last layer with experts."""
    return sum(index <= value for index in kept) - 1


_BY_LAYER: dict[str, Callable[[Any, Sequence[int], int], Any]] = {
    **dict.fromkeys(
        ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), _count_before
    ),
    "full_attn_idxs": _positions,
    "attention_types": _spelled_out,
    "moe_layer_end_index": _last_experts,
    "mlp_only_layers": _positions,
}
"""Config attributes that speak of layers, and are no list with one entry per layer: (value, kept, layers) -> value."""


def check_layers_removable(config: PreTrainedConfig, spec: ArchSpec) -> None:
    """Refuse a model whose layers belong together, so that none can be removed as a whole.

    Args:
        config: The model's config.
        spec: Its table entry.

    Raises:
        UnsupportedArchitectureError: Names the attribute and the reason.
    """
    for name, why in spec.fixed_layers:
        if value := getattr(config, name):
            raise UnsupportedArchitectureError(
                f"No whole layer of this {spec.model_type} model can be removed: with {name}={value!r}, {why}. "
                f"Remove neurons, KV groups or tokens instead."
            )


def why_not_shortened(config: PreTrainedConfig, spec: ArchSpec, kept: Collection[int]) -> str | None:
    """Return why a model can't keep these layers and no others; None if it can.

    Args:
        config: The model's config.
        spec: Its table entry.
        kept: Numbers of the layers that stay.
    """
    try:
        shorten_config(config, spec, sorted(kept))
    except UnsupportedArchitectureError as error:
        return str(error)
    return None


def _leaves_attention(config: PreTrainedConfig, kept: Collection[int]) -> bool:
    """Return whether a layer with attention is among those that stay: caches of hybrids count positions there."""
    kinds = getattr(config, "layer_types", None) or ()
    attention = {index for index, kind in enumerate(kinds) if kind not in WITHOUT_ATTENTION}
    return len(attention) == len(kinds) or not attention.isdisjoint(kept)


def shorten_config(config: PreTrainedConfig, spec: ArchSpec, kept: Sequence[int]) -> PreTrainedConfig:
    """Return the config of a model that keeps some layers; all other values are as they were.

    Shortened are the number of layers (by the name that the family gives it), every list with one entry per layer,
    mappings by layer (``per_layer_config``), and the attributes of `_BY_LAYER`.

    Args:
        config: A native or variable-width config; unchanged.
        spec: Its table entry.
        kept: Numbers of the layers that stay, ascending.

    Raises:
        UnsupportedArchitectureError: See [`check_layers_removable`][]; or no layer with attention stays; or the
            family's config can't say that the layers that stay are what they were.
    """
    layers = config.num_hidden_layers
    check_layers_removable(config, spec)
    if not _leaves_attention(config, kept):
        raise UnsupportedArchitectureError(
            f"One layer with attention must stay in this {spec.model_type} model, whose cache counts positions there; "
            f"layers {', '.join(map(str, kept))} have none. Keep another one."
        )
    values = config.to_dict()
    new = {old: number for number, old in enumerate(kept)}
    for name, value in values.items():
        if name in _BY_LAYER and value is not None:
            values[name] = _BY_LAYER[name](value, kept, layers)
        elif isinstance(value, list | tuple) and len(value) == layers and not name.endswith(_NOT_BY_LAYER):
            values[name] = [value[index] for index in kept]
    if (overrides := values.get("per_layer_config")) is not None:
        values["per_layer_config"] = {new[int(old)]: own for old, own in overrides.items() if int(old) in new}
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values |= dict.fromkeys({count, "num_hidden_layers"} & {count, *values}, len(kept))
    kinds = list(values.get("layer_types") or ())  # some configs change the list that they are given
    try:
        result: PreTrainedConfig = type(config).from_dict(values)
    except (StrictDataclassError, ValueError) as error:  # a rule of the family, such as one layer of every kind
        reason = str(error).splitlines()[-1].strip()
        raise UnsupportedArchitectureError(_refused(spec, kept, f"its config refuses them ({reason})")) from error
    if list(getattr(result, "layer_types", None) or ()) != kinds:
        found = ", ".join(result.layer_types)
        raise UnsupportedArchitectureError(_refused(spec, kept, f"its config makes them layers of {found}"))
    copy_attention_implementation(config, result)
    result.name_or_path = config.name_or_path
    _check_same_kinds(config, result, spec, kept)
    return result


def _check_same_kinds(config: PreTrainedConfig, shorter: PreTrainedConfig, spec: ArchSpec, kept: Sequence[int]) -> None:
    """Refuse a shortened config that gives experts to other layers: some configs say only "every n-th layer"."""
    if spec.experts is None:
        return
    before = [has_experts(config.per_layer_config[old], spec, old) for old in kept]
    after = [has_experts(shorter.per_layer_config[new], spec, new) for new in range(len(kept))]
    if before != after:
        interval = str(spec.experts.interval)
        count = getattr(config, interval)
        together = f" Or name {count} neighbours in removable_layers, and let all of them go." if count > 1 else ""
        why = f"its config says by a rule which layers have experts ({interval} = {count}), and would name others"
        raise UnsupportedArchitectureError(f"{_refused(spec, kept, why)}{together} Or remove experts (num_experts).")


def _refused(spec: ArchSpec, kept: Sequence[int], why: str) -> str:
    listed = ", ".join(map(str, kept))
    return f"This {spec.model_type} model can't keep layers {listed} alone: {why}. Keep another one."


def describe_layers(plan: PruningPlan) -> str | None:
    """Return a sentence on the whole layers that a plan removes; None where all stay."""
    if not (removed := plan.removed_layers):
        return None
    count, listed = len(removed), ", ".join(map(str, removed))
    was = "was" if count == 1 else "were"
    return f"{count} of {len(plan.layers)} layers {was} removed as a whole: {listed} (numbered from 0)."


def new_name(name: str, layers: str, kept: Sequence[int]) -> str | None:
    """Return the name that a module or tensor has once some layers are gone; None where it is one of those.

    Args:
        name: Its name in the whole model.
        layers: Module path of the list of layers.
        kept: Numbers of the layers that stay, ascending.
    """
    if not name.startswith(f"{layers}."):
        return name
    number, dot, rest = name[len(layers) + 1 :].partition(".")
    return f"{layers}.{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None
