"""Run the code of peers from PyPI, in its recommended configuration, to remove a given number of parameters.

A peer is a function (model, samples, remove, attention) -> [`PeerResult`][]. A peer prunes a copy of the model;
`samples` are the calibration samples of all methods, [samples, length] int64; `remove` is the number of parameters to
remove, and `attention` says whether attention may shrink too. Models need Llama's module names and one width.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from hf_context_prune.pruning.calibration.samples import batches_of

TOLERANCE = 0.005
"""Largest relative difference between removed parameters and parameters to remove."""


@dataclass(frozen=True)
class PeerResult:
    """A model that a peer pruned, with the call that pruned it.

    Attributes:
        model: The smaller model.
        version: Package and version.
        call: The call, as code.
        note: Limits of the peer at this size, or how the size was reached; may be empty.
        step: Parameters of the smallest step that the peer can take, where it is larger than the tolerance.
        earlier_seconds: Seconds of the work that an earlier call did, and left on the disk.
    """

    model: Any
    version: str
    call: str
    note: str = ""
    step: int = 0
    earlier_seconds: float = 0.0


Peer = Callable[[Any, torch.Tensor, int, bool], PeerResult]


def check_peer(dense: Any, result: PeerResult, samples: torch.Tensor, remove: int) -> PeerResult:
    """Refuse a result of another size than requested, and a model that no longer runs.

    Raises:
        RuntimeError: The number of removed parameters is over 0.5 % and over half a step of the peer off, or the logits
            are not finite.
    """
    removed = dense.num_parameters() - result.model.num_parameters()
    if abs(removed - remove) > max(TOLERANCE * remove, 0.51 * result.step):
        raise RuntimeError(
            f"{result.version} removed {removed:,} parameters instead of {remove:,}, over {TOLERANCE:.1%} off, with "
            f"{result.call}. Correct the ratio in benchmarks/peers.py."
        )
    with torch.inference_mode():
        logits = result.model(input_ids=samples[:1], use_cache=False).logits
    if logits.shape != (1, samples.shape[1], dense.config.vocab_size) or not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"{result.version} left a model whose logits are not finite, or of shape {logits.shape}.")
    return result


def _mlp_width(model: Any, remove: int) -> tuple[int, int]:
    """Return (neurons per layer, neurons to remove from every layer so that the total comes nearest to `remove`)."""
    layers, mlp = model.model.layers, model.model.layers[0].mlp
    cost = sum(p.numel() for p in mlp.parameters()) // mlp.down_proj.in_features
    return mlp.down_proj.in_features, round(remove / (cost * len(layers)))


def _optipfair(model: Any, samples: torch.Tensor | None, remove: int, attention: bool, method: str) -> PeerResult:
    handlers, level = list(logging.root.handlers), logging.root.level
    import optipfair

    logging.root.handlers[:] = handlers  # the import of optipfair configures the root logger
    logging.root.setLevel(level)
    neurons, gone = _mlp_width(model, remove)
    # Half a neuron more, because optipfair rounds down. Its option for a multiple of 128 would miss the size.
    percentage = round(100 * (gone + 0.5) / neurons, 4)
    options: dict[str, Any] = {
        "pruning_type": "MLP_GLU",
        "neuron_selection_method": method,
        "pruning_percentage": percentage,
    }
    if samples is not None:
        options["dataloader"] = batches_of(samples)
    smaller = optipfair.prune_model(copy.deepcopy(model), **options, show_progress=False)
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "dataloader")
    shown += ", dataloader=<the calibration samples>" if samples is not None else ""
    return PeerResult(
        smaller,
        f"optipfair {metadata.version('optipfair')}",
        f"optipfair.prune_model(model, {shown})",
        "prunes MLP neurons only, so the whole budget comes from the MLP" if attention else "",
    )


def optipfair_maw(model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune by OptiPFair with data: peak-to-peak weight magnitude times activation norm (0.4.2 has data for MAW only)."""
    return _optipfair(model, samples, remove, attention, "MAW")


def optipfair_ppm(model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune by OptiPFair's default: peak-to-peak magnitude of weights, without data (Martra, arXiv 2512.22671)."""
    return _optipfair(model, None, remove, attention, "PPM")


def _heads_gone(heads: int, groups: int, ratio: float) -> int:
    """Return the query heads that torch-pruning removes per KV group at a head ratio (its rule rounds up twice)."""
    return math.ceil(math.ceil(ratio * heads) / groups)


@dataclass(frozen=True)
class _Shape:
    """Ratios for torch-pruning, and the widths that result."""

    hidden: int
    heads: int
    neurons: int
    ratio: float
    mlp_ratio: float
    head_ratio: float


def _shape_by_example(model: Any, remove: int) -> _Shape:
    """Return one ratio for hidden size, heads and neurons, as in the LLM example; neurons make up the remainder.

    The hidden size is a multiple of 4 (`round_to` in the example). Of those sizes, take the one whose ratio is nearest to
    the ratio that the neurons then need: one ratio alone moves in steps of a hidden feature, too coarse to hit a size.
    """
    config, layers = model.config, len(model.model.layers)
    attention = model.model.layers[0].self_attn
    groups, total, best = config.num_key_value_heads, model.num_parameters(), None
    embeddings = sum(p.numel() for p in {*model.get_input_embeddings().parameters(), *model.lm_head.parameters()})
    for hidden in range(config.hidden_size - 4 + config.hidden_size % 4, 0, -4):
        ratio = 1 - hidden / config.hidden_size
        heads = config.num_attention_heads - groups * _heads_gone(config.num_attention_heads, groups, ratio)
        if heads < groups:
            break
        attended = 2 * (heads + groups) * attention.head_dim * hidden
        fixed = embeddings * hidden // config.hidden_size + hidden + layers * (attended + 2 * hidden)
        neurons = round((total - remove - fixed) / (layers * 3 * hidden))
        off = abs(neurons / config.intermediate_size - hidden / config.hidden_size)
        if 0 < neurons <= config.intermediate_size and (best is None or off < best[0]):
            best = off, _Shape(hidden, heads, neurons, ratio, 1 - neurons / config.intermediate_size, ratio)
    if best is None:
        raise RuntimeError(f"torch-pruning's example can't remove {remove:,} of {total:,} parameters; ask for less.")
    return best[1]


def _shape_of_units(model: Any, remove: int, attention: bool) -> _Shape:
    """Return ratios that keep the hidden size: neurons, and with `attention` one query head of every KV group."""
    config, layers = model.config, model.model.layers
    groups, heads, head_ratio = config.num_key_value_heads, config.num_attention_heads, 0.0
    if attention and heads > groups:
        head_ratio = 1 / heads
        gone = groups * _heads_gone(heads, groups, head_ratio)
        remove -= len(layers) * gone * 2 * layers[0].self_attn.head_dim * config.hidden_size
        heads -= gone
    width, narrower = _mlp_width(model, remove)
    # torch-pruning ignores its head ratio unless the general ratio, which applies to nothing else here, is above 0.
    return _Shape(config.hidden_size, heads, width - narrower, head_ratio, narrower / width, head_ratio)


def _torch_pruning(model: Any, samples: torch.Tensor, shape: _Shape, *, prune_hidden: bool) -> tuple[Any, str]:
    """Prune a copy with torch-pruning, as its LLM example does (VainF/Torch-Pruning, examples/LLMs/prune_llm.py).

    Args:
        model: The base model.
        samples: Calibration samples; a few tokens trace the graph. The importance sees no data.
        shape: The ratios.
        prune_hidden: Whether the residual stream shrinks too, as in the example.

    Returns:
        (the smaller model, the call).
    """
    import torch_pruning as tp

    smaller = copy.deepcopy(model)
    config, layers = smaller.config, list(smaller.model.layers)
    config.use_cache = False  # the tracer follows gradients of tensors, and fails on a cache object
    smaller.set_attn_implementation("eager")  # the tracer must see keys and values repeated for their query heads
    heads: dict[Any, int] = {}
    for layer in layers:
        heads[layer.self_attn.q_proj] = config.num_attention_heads
        heads[layer.self_attn.k_proj] = config.num_key_value_heads
        heads[layer.self_attn.v_proj] = config.num_key_value_heads
    kept_whole = [smaller.lm_head]
    if not prune_hidden:
        kept_whole += [smaller.get_input_embeddings()]
        kept_whole += [module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]

    def between(ratio: float, width: int) -> float:
        """Return a ratio that keeps int(width * (1 - ratio)) channels whichever way it is rounded."""
        return ratio - 0.5 / width if ratio > 0 else 0.0

    mlp_ratio = between(shape.mlp_ratio, config.intermediate_size)
    pruner = tp.pruner.BasePruner(
        smaller,
        example_inputs=samples[:1, :8],
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=between(shape.ratio, config.hidden_size),
        pruning_ratio_dict={layer.mlp.gate_proj: mlp_ratio for layer in layers}
        | {layer.mlp.up_proj: mlp_ratio for layer in layers},
        ignored_layers=kept_whole,
        num_heads=heads,
        prune_num_heads=shape.head_ratio > 0,
        prune_head_dims=False,
        head_pruning_ratio=shape.head_ratio,
        output_transform=lambda output: output.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    config.hidden_size, config.num_attention_heads = shape.hidden, shape.heads
    config.intermediate_size, config.use_cache = shape.neurons, model.config.use_cache
    smaller.set_attn_implementation(model.config._attn_implementation)
    smaller.tie_weights()  # embedding and head were pruned separately, to the same values
    for layer in layers:
        layer.self_attn.num_key_value_groups = shape.heads // config.num_key_value_heads
    for parameter in smaller.parameters():
        parameter.grad = None
    call = (
        "torch_pruning.pruner.BasePruner(model, example_inputs=ids, "
        "importance=GroupMagnitudeImportance(p=2, group_reduction='mean'), global_pruning=False, "
        f"pruning_ratio={shape.ratio:.4f}, pruning_ratio_dict={{every gate_proj and up_proj: {shape.mlp_ratio:.4f}}}, "
        f"ignored_layers=[{'lm_head' if prune_hidden else 'lm_head, embed_tokens, every o_proj and down_proj'}], "
        f"num_heads={{q, k, v of every layer}}, prune_num_heads={shape.head_ratio > 0}, prune_head_dims=False, "
        f"head_pruning_ratio={shape.head_ratio:.4f})"
    )
    return smaller, call


def torch_pruning_example(model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune as in Torch-Pruning's LLM example: hidden size, query heads and neurons by one ratio and group magnitude."""
    shape = _shape_by_example(model, remove)
    smaller, call = _torch_pruning(model, samples, shape, prune_hidden=True)
    note = (
        f"its example narrows the residual stream too (to {shape.hidden}), keeps every KV head and removes query heads "
        f"({shape.heads} stay); round_to left out and the neurons ({shape.neurons}) given a ratio of their own, to hit "
        "the size"
    )
    return PeerResult(smaller, f"torch-pruning {metadata.version('torch-pruning')}", call, note)


def torch_pruning_units(model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune by Torch-Pruning's group magnitude, but only the units that all other methods prune."""
    shape = _shape_of_units(model, remove, attention)
    smaller, call = _torch_pruning(model, samples, shape, prune_hidden=False)
    note = "its example's importance, on MLP neurons only"
    if attention:
        note = (
            f"can't remove KV heads of a grouped-query model, so a query head of every KV group goes ({shape.heads} "
            f"stay) and the neurons ({shape.neurons}) make up the rest"
        )
    return PeerResult(smaller, f"torch-pruning {metadata.version('torch-pruning')}", call, note)
