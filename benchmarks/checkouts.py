"""Run the code of 2SSP and of what its repository holds beside it, from a checkout, in this process.

The checkout is github.com/FabrizioSandri/2SSP, whose `src` also holds SliceGPT, ShortGPT, the window and BlockPruner.
Nothing of it is part of this package, and no file of it is changed: what does not run on a CPU or with transformers 5 is
replaced from outside, for the time of the call. `note` lists every deviation from the recommended call. See `peers.py`
for what a peer is, and `grasprune.py` for the other checkout.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PeerResult
from hf_context_prune.pruning.sequential.hidden_states import record_input, record_output

_TRAINED_LENGTH = 2048
"""Tokens per calibration sample of 2SSP."""


@contextmanager
def imported(folder: Path, names: Sequence[str], absent: Sequence[str] = ()) -> Iterator[list[Any]]:
    """Import modules of a folder by their names, which are as common as ``config``, and forget them afterwards.

    The random numbers of the time between are seeded with 0, and those of the caller go on as they were.

    Args:
        folder: A checkout.
        names: Its modules, in the order in which they are returned.
        absent: Packages that it imports at the top and that the call does not use; empty ones stand for them.

    Raises:
        SystemExit: There is no such folder.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: clone the peer there, or leave it out of --methods.")
    top = {name.partition(".")[0] for name in (*names, *absent)}

    def ours(name: str) -> bool:
        return name.partition(".")[0] in top

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    path, sys.path = sys.path, [str(folder), *sys.path]
    try:
        for name in absent:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].ConfigDict = types.SimpleNamespace  # type: ignore[attr-defined] # of ml_collections
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield [importlib.import_module(name) for name in names]
    finally:
        sys.path = path
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _layer_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def two_stage(folder: Path, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune by 2SSP (TMLR 2025): neurons by the norm of their activations, then whole attentions by the perplexity."""
    smaller = copy.deepcopy(model)
    smaller.config.use_cache = False
    length = max(samples.shape[1], _TRAINED_LENGTH // samples.shape[1] * samples.shape[1])
    length = min(length, samples.numel())
    long = samples.flatten()[: samples.numel() // length * length].view(-1, 1, length)
    rate = remove / _layer_parameters(smaller)
    modules = ("src.evaluation", "src.utilities", "src.pruning")
    with imported(folder, modules, ("lm_eval",)) as (evaluation, utilities, pruning):
        measure = evaluation.evaluate_perplexity

        def on_cpu(candidate: Any, ids: torch.Tensor, **options: Any) -> float:
            options |= {"device": "cpu", "seq_len": min(options.get("seq_len", length), ids.numel())}
            found: float = measure(candidate, ids, **options)
            return found

        utilities.evaluate_perplexity = pruning.evaluate_perplexity = on_cpu
        utilities.maskModel = pruning.maskModel = _mask_attention
        utilities.unmaskModel = pruning.unmaskModel = _unmask_attention
        pruning.two_stage_2ssp(smaller, list(long), rate)
    gone = sum(not hasattr(layer.self_attn, "q_proj") for layer in smaller.model.layers)
    note = (
        f"{gone} attentions gone, and neurons to one width; float32 on a CPU; calibrated on the samples of all methods, "
        f"joined to {len(long)} x {length} tokens (recommended: 32 x 2,048 of C4); a masked attention returns two values, "
        f"as transformers 5 unpacks"
    )
    step = (
        sum(parameter.numel() for parameter in model.model.layers[0].mlp.parameters()) // model.config.intermediate_size
    )
    step *= len(model.model.layers)  # a neuron of every layer
    return PeerResult(smaller, "2SSP 88ab660", f"two_stage_2ssp(model, samples, {rate:.4f})", note, step)


BLOCKPRUNER = "blockpruner"
DEPTH = ("shortgpt", "window", BLOCKPRUNER)
"""Methods of 2SSP's module that remove whole layers, or their halves."""


def depth_masks(
    folder: Path, name: str, model: Any, samples: torch.Tensor, count: int, known: dict[Any, float]
) -> tuple[list[bool], list[bool], str]:
    """Return which attentions and which MLPs a method of `DEPTH` removes, and its call with every deviation.

    ShortGPT (arXiv 2403.03853) and the window (arXiv 2403.17887) remove whole layers, by the similarity of the hidden
    states around them; BlockPruner (arXiv 2406.10594) as many attentions and MLPs, one after the other by perplexity.

    Args:
        folder: The checkout of 2SSP.
        name: The method.
        model: The base model; left as it is.
        samples: Calibration samples, [samples, length].
        count: Layers to remove, or as many attentions and MLPs.
        known: Perplexities that BlockPruner has measured on the same sample, by masks; a smaller count's are its first
            ones. The dict grows.
    """
    with imported(folder, ("src.evaluation", "src.utilities", "src.pruning"), ("lm_eval",)) as (
        evaluation,
        _,
        pruning,
    ):
        measure = evaluation.evaluate_perplexity

        def on_cpu(candidate: Any, ids: torch.Tensor, **options: Any) -> float:
            found: float = measure(candidate, ids, **{**options, "device": "cpu", "seq_len": ids.numel()})
            return found

        before: dict[int, tuple[Any, torch.Tensor]] = {}  # masks of the layers before a layer, and its input

        def once(candidate: Any, ids: torch.Tensor, **options: Any) -> float:
            layers = candidate.model.layers
            masks = tuple("forward" in vars(part) for layer in layers for part in (layer.self_attn, layer.mlp))
            if masks not in known:
                first = max(
                    (index for index, (prefix, _) in before.items() if prefix == masks[: len(prefix)]), default=0
                )
                with ExitStack() as stack:
                    for layer in layers[:first]:
                        layer.forward = lambda *_, **__: before[first][1]
                        stack.callback(vars(layer).pop, "forward")
                    seen = [stack.enter_context(record_input(layer)) for layer in layers[first:]]
                    known[masks] = on_cpu(candidate, ids, **options)
                for index, (states,) in enumerate(seen, start=first):
                    before[index] = masks[: 2 * index], states
            return known[masks]

        pruning.evaluate_perplexity = once
        pruning.compute_intermediate_outputs = _layer_outputs
        pruning.maskModel, pruning.unmaskModel = mask_layers, _unmask_layers
        if name == BLOCKPRUNER:
            one = samples.flatten()[:_TRAINED_LENGTH].view(1, -1)
            attention, mlp = pruning.blockpruner(model, count, one)
            note = f"blockpruner(model, {count}, one sample of {one.numel()} tokens)"
        else:
            function = pruning.shortGPT if name == "shortgpt" else pruning.window_based
            attention = mlp = function(model, count, list(samples.unsqueeze(1)))
            note = f"{function.__name__}(model, {count}, samples)"
    note += "; float32 on a CPU; hidden states are caught by a hook of ours, and masked modules return what transformers 5 unpacks"
    return list(map(bool, attention)), list(map(bool, mlp)), note


@torch.no_grad()
def _layer_outputs(model: Any, calibration_set: Sequence[torch.Tensor], last_token: bool) -> list[torch.Tensor]:
    """Return the last token's hidden state behind every layer, [layers, hidden] per sample, as their function does."""
    assert last_token
    found = []
    for ids in calibration_set:
        with ExitStack() as stack:
            seen = [stack.enter_context(record_output(layer)) for layer in model.model.layers]
            model(ids, use_cache=False, logits_to_keep=1)
        found.append(torch.stack([output[0, -1] for (output,) in seen]))
    return found


def mask_layers(model: Any, attnMask: Sequence[int], mlpMask: Sequence[int]) -> None:
    """Let attentions and MLPs of masks add nothing; a layer without both passes its input on."""
    _mask_attention(model, attnMask, ())
    for layer, masked in zip(model.model.layers, mlpMask, strict=True):
        if masked:
            layer.mlp.forward = torch.zeros_like


def _unmask_layers(model: Any, attnMask: Sequence[int], mlpMask: Sequence[int]) -> None:
    """Undo `mask_layers`."""
    _unmask_attention(model, attnMask, ())
    for layer, masked in zip(model.model.layers, mlpMask, strict=True):
        if masked:
            vars(layer.mlp).pop("forward", None)


def _nothing(hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def _mask_attention(model: Any, attnMask: Sequence[int], mlpMask: Sequence[int]) -> None:
    """Let the attentions of a mask add nothing, as 2SSP's `maskModel`, whose three values stock layers can't unpack."""
    for layer, masked in zip(model.model.layers, attnMask, strict=True):
        if masked:
            layer.self_attn.forward = _nothing


def _unmask_attention(model: Any, attnMask: Sequence[int], mlpMask: Sequence[int]) -> None:
    """Undo `_mask_attention`."""
    for layer, masked in zip(model.model.layers, attnMask, strict=True):
        if masked:
            vars(layer.self_attn).pop("forward", None)


def slicegpt(folder: Path, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
    """Prune by SliceGPT (ICLR 2024): a rotated, narrower residual stream, in the copy that 2SSP holds."""
    smaller = copy.deepcopy(model)
    smaller.config.torch_dtype = model.dtype
    smaller.config.use_cache = False
    width, step = _sliced_width(smaller, remove)
    parts = ("adapters.llama_adapter", "layernorm_fusion", "rotate", "slicing_scheduler", "model_utils")
    modules = tuple(f"src.slicegpt_utils.{part}" for part in parts)
    with imported(folder, modules, ("lm_eval", "ml_collections")) as (llama, fusion, rotate, schedule, signals):

        class Layer(llama.CompressedLlamaDecoderLayer):  # type: ignore[name-defined, misc]
            def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
                found: torch.Tensor = super().forward(hidden_states, **options)[0]
                return found

        class Adapter(llama.LlamaModelAdapter):  # type: ignore[name-defined, misc]
            compressed_layer_type = Layer

        rotate.config.device = torch.device("cpu")
        # Theirs walks the stack to name its caller, which takes longer than the pruning.
        rotate.cleanup_memory = signals.utils.cleanup_memory = gc.collect
        adapter = Adapter(smaller)
        fusion.replace_layers(adapter, verbose=False)
        for layer in smaller.model.layers:
            layer.self_attn.forward = _with_a_third(layer.self_attn.forward)
        fusion.fuse_modules(adapter)
        smaller.config.tie_word_embeddings = False
        rotate.rotate_and_slice(
            adapter,
            list(samples.unsqueeze(1)),
            schedule.ConstSlicingScheduler(width),
            apply_mask=False,
            final_orientation="random",
        )
    note = (
        f"the residual stream has {width} of {model.config.hidden_size} features; its shortcut matrices and the head, which "
        f"is no longer the embedding, count as parameters; the width is no multiple of 8, to hit the size; float32 on a CPU; "
        f"calibrated on the samples of all methods (recommended: 256 x 2,048 of C4)"
    )
    call = f"replace_layers, fuse_modules, rotate_and_slice(model, samples, ConstSlicingScheduler({width}))"
    return PeerResult(smaller, "SliceGPT (in 2SSP 88ab660)", call, note, step)


def _with_a_third(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention's forward with the third value that SliceGPT's layers unpack."""
    return lambda *args, **options: (*forward(*args, **options), None)


def _sliced_width(model: Any, remove: int) -> tuple[int, int]:
    """Return the width of the residual stream that leaves a number of parameters, and the parameters of one more feature."""
    config, layers = model.config, len(model.model.layers)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    rows = 2 * (attention.q_proj.out_features + attention.k_proj.out_features) + 3 * mlp.down_proj.in_features

    def count(width: int) -> int:
        embedding = config.vocab_size * (width + config.hidden_size)
        wider = config.hidden_size - width  # of the last layer's output, which the head reads
        return embedding + layers * (rows + 2 * width) * width + wider * (mlp.down_proj.in_features + width)

    wanted = model.num_parameters() - remove
    width = min(range(1, config.hidden_size), key=lambda width: abs(count(width) - wanted))
    if not math.isclose(count(width), wanted, rel_tol=0.01):
        raise SystemExit(f"SliceGPT leaves at least {count(1):,} parameters of this model; {wanted:,} are asked for.")
    return width, count(width + 1) - count(width)
