"""Run GRASPrune's code from a checkout, in this process, and exchange its two halves with those of this package.

GRASPrune (ACL 2026, github.com/ZiY-Wang/GRASPrune) first chooses neurons and KV groups by gates that learn from the
loss, then scales what is left; this package chooses by `obs` and measured widths, then refits the output projections.
Any choice can be followed by any repair, which tells what each is worth. Nothing of the checkout is part of this
package, and no file of it is changed: what does not run on a CPU or with transformers 5 is replaced from outside, for
the time of the call. `note` lists every deviation from the recommended call. See `peers.py` for what a peer is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.checkouts import imported
from benchmarks.peers import TOLERANCE, PeerResult
from hf_context_prune.config import PrunerConfig
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import TargetStatistics, TargetWeights
from hf_context_prune.pruning.criteria import Criterion, get_criterion
from hf_context_prune.pruning.measurements import build_plan
from hf_context_prune.pruning.planner import Planner
from hf_context_prune.pruning.sequential.prune import prune_sequentially
from hf_context_prune.pruning.surgery import apply_plan

VERSION = "GRASPrune 666f4f0"
_MODULES = ("config", "data", "evals", "gates", "pipeline", "rebuild")
_OURS = PrunerConfig()
_TRIES = 8


class _Blocks:
    """The calibration samples as GRASPrune's data set."""

    def __init__(self, samples: torch.Tensor, *_: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.samples[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Gated(NamedTuple):
    """A copy of the model with gates, and what of GRASPrune works on it."""

    model: Any
    stock: list[tuple[Any, Any]]
    pipeline: Any
    options: Any


@dataclass(frozen=True)
class GRASPrune:
    """Its code, and where the choices of its gates are kept, which take most of an hour to learn.

    Attributes:
        folder: The checkout.
        kept: Folder of the choices.
    """

    folder: Path
    kept: Path

    def prune(self, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
        """Prune as GRASPrune does: gates under a budget for neurons and KV groups, then scales."""
        layers, seconds = self.choose(model, samples, remove)
        smaller = self.rescale(model, samples, remove, layers)
        call = (
            f"attach_pruning_gates, train_gates, apply_final_hard_masks, train_rescale, materialize_all_pruning with "
            f"PruningConfig(keep_ratio={self._keep_ratio(model, remove):.4f}, num_samples={len(samples)}, "
            f"rescale_num_samples={len(samples)})"
        )
        note = (
            f"gates and scales learn on {len(samples)} x {samples.shape[1]} tokens of the domain's calibration text "
            f"(recommended: 512 x 512 of WikiText-2 train, and of its validation split for the scales); float32 on a CPU; "
            f"weights without gates are frozen; a layer that loses all KV groups gets one back, so the final masks are "
            f"applied with a keep ratio that reaches the size; its narrowed projections are put back into the stock layers, "
            f"since its own no longer run; the seed is set again between gates and scales"
        )
        return PeerResult(smaller, VERSION, call, note, step=_step(model), earlier_seconds=seconds)

    def repaired(self, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
        """Keep what GRASPrune's gates keep, and refit it as this package does."""
        layers, seconds = self.choose(model, samples, remove)
        smaller, kept = _walk(model, samples, layers, _given(layers))
        if kept != layers:
            raise RuntimeError("The walk kept other units than the gates.")
        call = "train_gates; sequential reconstruction"
        return PeerResult(smaller, VERSION, call, step=_step(model), earlier_seconds=seconds)

    def widths(self, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
        """Keep as many units of every layer as GRASPrune's gates, but choose and refit them as this package does."""
        layers, seconds = self.choose(model, samples, remove)
        smaller, _ = _walk(model, samples, layers, get_criterion(_OURS.criterion))
        call = "widths of train_gates; obs; sequential"
        return PeerResult(smaller, VERSION, call, step=_step(model), earlier_seconds=seconds)

    def scaled(self, model: Any, samples: torch.Tensor, remove: int, attention: bool) -> PeerResult:
        """Keep what this package keeps at measured widths, and scale it as GRASPrune does."""
        config = PrunerConfig(
            target_params=model.num_parameters() - remove,
            units="neurons,kv_groups",
            native_architecture=False,
            refit_lm_head=False,
        )
        plan, _ = Planner(model, samples, config).plan(config)[:2]
        smaller = self.rescale(model, samples, remove, plan.layers)
        return PeerResult(smaller, VERSION, "plan of this package; train_rescale, materialize_all_pruning")

    def choose(self, model: Any, samples: torch.Tensor, remove: int) -> tuple[tuple[LayerPlan, ...], float]:
        """Return the units that the gates keep, learned now or by an earlier call, and the seconds that an earlier call took."""
        digest = hashlib.sha256(samples.numpy().tobytes() + f"{remove} {VERSION}".encode()).hexdigest()[:16]
        path = self.kept / f"grasprune-{digest}.json"
        if path.exists():
            found = json.loads(path.read_text())
            layers = tuple(LayerPlan(tuple(neurons), tuple(groups)) for neurons, groups in found["layers"])
            return layers, found["seconds"]
        begin = time.perf_counter()
        with self._gates(model, samples, remove) as (gated, _, pipeline, options), torch.enable_grad():
            pipeline.train_gates(gated, None, options)
            layers = _harden(model, gated, pipeline, options, remove)
        pairs = [(layer.neurons, layer.kv_groups) for layer in layers]
        self.kept.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"layers": pairs, "seconds": time.perf_counter() - begin}))
        return layers, 0.0

    def rescale(self, model: Any, samples: torch.Tensor, remove: int, layers: Sequence[LayerPlan]) -> Any:
        """Return the model with some units alone, and with GRASPrune's scales on them."""
        with self._gates(model, samples, remove) as (gated, stock, pipeline, options):
            for layer, kept in zip(gated.model.layers, layers, strict=True):
                layer.mlp.register_hard_mask(_mask(kept.neurons, layer.mlp.gate_score))
                layer.self_attn.register_hard_mask_kv(_mask(kept.kv_groups, layer.self_attn.gate_score_kv))
            with torch.enable_grad():
                pipeline.train_rescale(gated, None, options)
            pipeline.materialize_all_pruning(gated)
        put_back(gated, stock)
        return gated.eval()

    def _keep_ratio(self, model: Any, remove: int) -> float:
        return 1 - remove / sum(sum(_sizes(layer)) for layer in model.model.layers)

    @contextmanager
    def _gates(self, model: Any, samples: torch.Tensor, remove: int) -> Iterator[_Gated]:
        smaller = copy.deepcopy(model).requires_grad_(False)
        stock = [(layer.mlp, layer.self_attn) for layer in smaller.model.layers]
        with imported(self.folder, _MODULES) as (config, _, _, gates, pipeline, _):
            pipeline.load_text_dataset = lambda *_: samples
            pipeline.TokenBlockDataset = _Blocks
            options = config.PruningConfig(
                device="cpu",
                dtype=torch.float32,
                keep_ratio=self._keep_ratio(model, remove),
                max_len=samples.shape[1],
                num_samples=len(samples),
                rescale_num_samples=len(samples),
            )
            pipeline.set_seed(0)
            gates.attach_pruning_gates(smaller, options.gate_init, options.tau, "cpu", "llama")
            yield _Gated(smaller, stock, pipeline, options)


def _sizes(layer: Any) -> tuple[int, int]:
    """Return the parameters of the MLP and of the attention of a layer."""
    mlp, attention = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (layer.mlp, layer.self_attn)
    )
    return mlp, attention


def _step(model: Any) -> int:
    """Return the parameters of a KV group, by which the gates step over a size."""
    return _sizes(model.model.layers[0])[1] // int(model.config.num_key_value_heads)


def _harden(model: Any, gated: Any, pipeline: Any, options: Any, remove: int) -> tuple[LayerPlan, ...]:
    """Return the units that the gates keep, at the keep ratio that removes as many parameters as are to be removed.

    Its rule puts one KV group back where a layer would lose all, beyond the budget.
    """
    sizes = [_sizes(layer) for layer in model.model.layers]
    total, found = sum(map(sum, sizes)), list[tuple[float, tuple[LayerPlan, ...]]]()
    for _ in range(_TRIES):
        pipeline.apply_final_hard_masks(gated, options)
        masks = [(layer.mlp.eval_keep_mask, layer.self_attn.eval_keep_mask_kv) for layer in gated.model.layers]
        kept = sum(
            size * float(mask.float().mean())
            for pair, both in zip(sizes, masks, strict=True)
            for size, mask in zip(pair, both, strict=True)
        )
        over = kept - (total - remove)
        found.append((abs(over), tuple(LayerPlan(_indices(neurons), _indices(groups)) for neurons, groups in masks)))
        if abs(over) <= TOLERANCE * remove / 2:
            break
        options = replace(options, keep_ratio=options.keep_ratio - over / total)
    return min(found, key=lambda one: one[0])[1]


def put_back(model: Any, stock: Sequence[tuple[Any, Any]]) -> None:
    """Put narrowed projections into the stock modules of the layers."""
    for layer, (mlp, attention) in zip(model.model.layers, stock, strict=True):
        for part, narrowed in ((mlp, layer.mlp), (attention, layer.self_attn)):
            for name, module in narrowed.named_children():
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, module)
        layer.mlp, layer.self_attn = mlp, attention


def _indices(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.bool().nonzero().flatten().tolist())


def _mask(kept: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _given(layers: Sequence[LayerPlan]) -> Criterion:
    """Return a criterion that keeps the units of a choice."""

    def score(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
        # With the seed 0, the walk seeds each sub-layer's generator with 2 * layer, and one more for the MLP.
        layer, mlp = divmod(generator.initial_seed(), 2)
        scores = torch.zeros(weights.num_units, dtype=torch.float64)
        scores[list(layers[layer].kept("mlp" if mlp else "attention"))] = 1.0
        return scores

    return Criterion("given", score, frozenset({"gram"}))


def _walk(
    model: Any, samples: torch.Tensor, layers: Sequence[LayerPlan], criterion: Criterion
) -> tuple[Any, tuple[LayerPlan, ...]]:
    """Return the model of as many units a layer, chosen by a criterion and refitted sequentially, and the kept units."""
    widths = [
        replace(dense, neurons=len(kept.neurons), kv_groups=len(kept.kv_groups))
        for dense, kept in zip(ModelView.of(model).widths, layers, strict=True)
    ]
    found = prune_sequentially(model, batches_of(samples), widths, criterion, ridge=_OURS.ridge, seed=0)
    plan = build_plan(model, found.layers, _OURS, found.num_samples, found.num_tokens, None)
    return apply_plan(model, plan, reconstruct=found.reconstruct), found.layers
