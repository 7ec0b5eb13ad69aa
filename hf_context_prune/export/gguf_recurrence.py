"""Values of layers that mix tokens by a recurrence or a convolution, as llama.cpp has them."""

from __future__ import annotations

from typing import Any

import torch


def recurrent_values(config: Any, name: str, values: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the values of a tensor of such a layer for the file; those of others are returned unchanged.

    Args:
        config: The config of the model.
        name: Name of the tensor in the model.
        values: Its values in the model.
    """
    if ".conv.conv." in name or name.endswith("conv1d.weight"):
        values = values.squeeze(1)  # one channel each
    if name.endswith(".A_log"):
        values = -values.exp()
    if ".mamba." in name:
        values = _of_mamba(config, name.rpartition(".mamba.")[2], values)
    if ".linear_attn." in name:
        values = _of_linear_attention(config, name.rpartition(".linear_attn.")[2], values)
    return values


def _of_mamba(config: Any, part: str, values: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    if part in ("A_log", "D"):
        return values.unsqueeze(1)
    return values.unflatten(0, (config.mamba_n_groups, -1)) if part == "norm.weight" else values


def _of_linear_attention(config: Any, part: str, values: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Reorder value heads: in transformers those of a key head are neighbours, in llama.cpp they are a stride apart."""
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    shared = 2 * keys * config.linear_key_head_dim  # rows of queries and keys, before those of values
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return torch.cat([values[:shared], _strided(values[shared:], keys, size)])
    if part == "in_proj_z.weight":
        return _strided(values, keys, size)
    if part == "out_proj.weight":
        return _strided(values.T, keys, size).T
    if part in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        return _strided(values, keys, 1)
    return values


def _strided(rows: torch.Tensor, keys: int, size: int) -> torch.Tensor:
    """Return rows of heads of `size`, which belong to so many key heads one after the other, key head by key head."""
    return rows.unflatten(0, (keys, -1, size)).transpose(0, 1).flatten(0, 2)
