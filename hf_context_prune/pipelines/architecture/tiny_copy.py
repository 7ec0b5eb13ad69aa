"""A tiny random copy of a model, from its config alone: the same kinds of layers, but small enough for every test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.geometry import read_head_dim
from hf_context_prune.storage.model_config import describe

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embed_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "decoder_attention_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "num_key_value_groups")
WIDTHS = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "shared_intermediate_size", "mlp_hidden_size"),
    *("ffn_intermediate_size", "mlp_dim", "d_ff", "feed_forward_size", "inner_dim", "ff_dim", "hidden_dim"),
)
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""Names that config attributes have for a size."""
# PyTorch multiplies experts in bfloat16 where their width is a multiple of 8.
TINY_HIDDEN, TINY_HEADS, TINY_GROUPS, TINY_WIDTH, TINY_VOCABULARY = 96, 6, 3, 40, 320
_TINY_HEAD_DIMS = (24, 16)
"""Features of a head: one that is not hidden size / heads, where the config can say so, tells shapes apart."""
_TINY_POSITIONS, _TINY_WINDOW, _TINY_ROTATION = 128, 16, 8
_MOST_LAYERS = 3
_MOST_PARAMETERS = 50_000_000
_SPREAD = 0.2
"""Standard deviation of the weights; large, so that a wrong slice shows."""


@dataclass(frozen=True)
class TinyCopy:
    """A tiny random model.

    Attributes:
        model: The model, in float32 and evaluation mode.
        heads: Its query heads.
        groups: Its key/value heads, as its config says; equal to `heads` where the config has no count of them.
        head_dim: Features of a head.
    """

    model: PreTrainedModel
    heads: int
    groups: int
    head_dim: int


def make_tiny_copy(config: PreTrainedConfig, model_class: type[Any]) -> TinyCopy:
    """Build a tiny random copy of a model.

    Args:
        config: The model's config; unchanged.
        model_class: Its class.

    Raises:
        UnsupportedArchitectureError: The config lacks a size that every model has, or none of the tiny configs makes a
            model that runs.
    """
    _check_names(config)
    error: Exception | None = None
    for head_dim in _TINY_HEAD_DIMS:
        for few in (True, False):
            try:
                tiny = shrink(config, head_dim, few_layers=few)
                model = _random_model(tiny, model_class)
                with torch.no_grad():
                    logits = model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits
                if not torch.isfinite(logits).all():
                    raise ValueError("its logits are not finite")
            except Exception as failure:  # the code of any family
                error = failure
                continue
            return _measured(model)
    raise UnsupportedArchitectureError(
        f"No tiny copy of this {config.model_type} model can be made, so no entry can be tested: the sizes in its "
        f"config have names, or depend on one another, in a way that is not known "
        f"({describe(error) if error else ''}). Write the ArchSpec by hand; docs/architectures.md says how."
    )


def _check_names(config: PreTrainedConfig) -> None:
    """Refuse a config without the sizes that this package reads of every model, under their usual names."""
    part = getattr(config, "text_config", None)
    for name in ("hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(config, name, None), int):
            advice = (
                "its text model has them under text_config: save that one by itself"
                if part is not None
                else f"give the class an attribute_map that says which of its attributes is {name!r}"
            )
            raise UnsupportedArchitectureError(f"{type(config).__name__} has no {name}; {advice}.")
    if own_name(config, HEADS) is None:
        raise UnsupportedArchitectureError(
            f"{type(config).__name__} has no number of attention heads ({', '.join(HEADS)} are looked for), and an "
            f"ArchSpec can't describe a model without attention."
        )


def _measured(model: PreTrainedModel) -> TinyCopy:
    config = model.config
    heads = getattr(config, own_name(config, HEADS) or HEADS[0])
    name = own_name(config, GROUPS)
    groups = getattr(config, name) if name else None
    return TinyCopy(model, heads, groups or heads, read_head_dim(config) or config.hidden_size // heads)


def own_name(config: PreTrainedConfig, names: tuple[str, ...]) -> str | None:
    """Return the first of some names by which a config itself stores a value; an alias of another one is none."""
    stored = config.to_dict()
    return next((name for name in names if name in stored), None)


def shrink(config: PreTrainedConfig, head_dim: int, *, few_layers: bool = True) -> PreTrainedConfig:
    """Return a tiny config of the same kind.

    Args:
        config: The config; unchanged.
        head_dim: Features of a head, where the config can say so.
        few_layers: Whether to keep three layers at most, of as many kinds as there are.
    """
    values = copy.deepcopy(config.to_dict())
    old_heads = _first(values, HEADS) or 1
    old_hidden = _first(values, HIDDEN) or 1
    old_dim = values.get("head_dim") or old_hidden // old_heads
    own = values.get("per_layer_config") or {}
    old_groups = _first(values, GROUPS)
    groups = TINY_HEADS if old_groups == old_heads else 1 if old_groups == 1 else TINY_GROUPS
    kept = _keep_layers(values) if few_layers else range(_first(values, LAYERS) or 0)
    if own:  # what the native config sets layer by layer (Gemma 4)
        sizes = {"head_dim": 2 * head_dim, **dict.fromkeys(GROUPS, groups)}
        layers: list[dict[str, Any]] = [
            next((given for layer, given in own.items() if int(layer) == index), {}) for index in kept
        ]
        values["per_layer_config"] = {
            index: {name: sizes.get(name, value) for name, value in given.items()}
            for index, given in enumerate(layers)
            if given
        }
    if values.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = 0  # the few layers that are kept have keys of their own
    widths = iter(range(TINY_WIDTH, TINY_HIDDEN, 8))
    for name, value in values.items():
        if name in HEADS:
            values[name] = TINY_HEADS
        elif name in GROUPS and value is not None:
            values[name] = groups
        elif name == "head_dim" and value is not None:
            values[name] = head_dim
        elif name in WIDTHS:
            values[name] = next(widths)  # each has its own, so that the shapes tell which one is the MLP's
        elif name in HIDDEN:
            values[name] = TINY_HIDDEN
        else:
            values[name] = _shrunk(name, value, old_hidden)
    if {"mamba_n_heads", "mamba_d_head", "mamba_expand"} <= values.keys():  # they must make up the hidden size
        values["mamba_n_heads"], values["mamba_d_head"] = 4, values["mamba_expand"] * TINY_HIDDEN // 4
    for parameters in _dictionaries(values.get("rope_parameters")):
        for name in ("short_factor", "long_factor"):
            if isinstance(factors := parameters.get(name), list):
                parameters[name] = factors[: max(1, len(factors) * head_dim // old_dim)]
    tiny: PreTrainedConfig = type(config).from_dict(values)
    return tiny


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((values[name] for name in names if isinstance(values.get(name), int)), None)


def _shrunk(name: str, value: Any, old_hidden: int) -> Any:  # noqa: ANN401 - JSON
    """Return the tiny value of a field that holds none of the usual sizes."""
    if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.startswith("vocab_size"):
        return TINY_VOCABULARY
    if name.endswith("per_layer_input"):
        return _TINY_ROTATION
    if name.endswith("_token_id"):
        return min(value, {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0))
    most = _TINY_POSITIONS if name in POSITIONS else _TINY_WINDOW if name.endswith("window") else None
    if most is None and "rotary" in name:
        most = _TINY_ROTATION
    if most is not None:
        return min(value, most)
    return TINY_HIDDEN if value == old_hidden and name.endswith(("dim", "size", "embd")) else value


def _keep_layers(values: dict[str, Any]) -> list[int]:
    """Keep three layers, of as many kinds as there are, with their part of every list that has a value for each.

    Returns:
        The numbers of the layers that are kept.
    """
    name = next((name for name in LAYERS if isinstance(values.get(name), int)), None)
    if name is None:
        return []
    total = values[name]
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == total}
    kinds = list(zip(*lists.values(), strict=True)) if lists else [None] * total
    firsts = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    rest = [index for index in range(total) if index not in firsts[:_MOST_LAYERS]]
    kept = sorted((firsts[:_MOST_LAYERS] + rest)[:_MOST_LAYERS])
    values[name] = len(kept)
    for key, value in lists.items():
        values[key] = [value[index] for index in kept]
    return kept


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _dictionaries(part)


def _random_model(config: PreTrainedConfig, model_class: type[Any]) -> PreTrainedModel:
    with torch.device("meta"):
        size = model_class(copy.deepcopy(config)).num_parameters()
    if size > _MOST_PARAMETERS:
        raise ValueError(f"it still has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config).float().eval()
        _fill(model)
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give every weight large random values; norms and biases scatter about what they begin with."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(_SPREAD * torch.randn_like(parameter))
        elif parameter.ndim > 1:
            parameter.normal_(0.0, _SPREAD)
