"""Prune and reconstruct one decoder layer after the other on a base and a pruned stream.

Notation: x are the inputs of an output projection in the pruned stream, W its weight, K the kept features, and e what
the pruned residual stream lacks, beside the projection's own output W x, to equal the base model's. `regression` has
the equation. Its ridge on e is chosen layer by layer on text that is never fitted: every layer fits e again on the same
tokens, so a small ridge would learn those tokens by heart. `sub_layer` has what changes behind a norm.

Where whole layers are removed, the base stream goes through them together with the layer before the gap. So the target
of that layer's MLP is the base model's residual stream *behind* the gap: its refit contains every linear map of the
MLP's output that could stand for the removed layers (ReplaceMe, arXiv 2505.02819).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.architectures import (
    Target,
    is_parallel,
    output_projection,
    output_scale,
    output_weight,
    residual_scale,
)
from hf_context_prune.modeling.geometry import UNIT_NAMES, LayerWidths
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.plan import GONE_LAYER, LayerPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.criteria import Criterion
from hf_context_prune.pruning.scoring import top_units, weights_of_layer
from hf_context_prune.pruning.surgery import kept_features
from hf_context_prune.utils.distributed import all_gather, all_reduce_
from hf_context_prune.utils.linalg import all_finite
from hf_context_prune.utils.precision import overflow_remedy

from .checkpoint import FinishedLayer, Output
from .hidden_states import Stream, StreamStorage, record_output
from .regression import Regression, Rows, open_regression
from .replay import ORDER, ReplayedLayer
from .sub_layer import SubLayer

CORRECTION_RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Ridges tried for the correction of the upstream error, as shares of each feature's mean square."""
GAP_RIDGES = (0.01, 0.03, *CORRECTION_RIDGES)
"""The same before removed layers, whose work is far more than an error, and in a larger part predictable."""
DEFAULT_CORRECTION_RIDGE = 1.0
"""The ridge of that correction where there is too little text to withhold any for validation."""


class SequentialPruner:
    """Both streams of all batches, moved layer by layer through the model.

    Args:
        view: The base model.
        streams: Hidden states before the first layer.
        storage: Room for what a layer computes on them.
        criterion: Ranks units.
        ridge: Share of each feature's mean square.
        seed: For the `random` criterion.
        gone: Numbers of the layers that are removed as a whole.
    """

    def __init__(
        self,
        view: ModelView,
        streams: Sequence[Stream],
        storage: StreamStorage,
        criterion: Criterion,
        ridge: float,
        seed: int,
        gone: Collection[int] = (),
    ) -> None:
        self.gone = frozenset(gone)
        self.view, self.streams, self.storage = view, streams, storage
        self.criterion, self.ridge, self.seed = criterion, ridge, seed
        config = view.model.config
        self.scale, self.parallel = residual_scale(config, view.spec), is_parallel(config, view.spec)
        withheld = [stream for stream in streams if stream.validation]
        self._first_withheld = withheld[0].start if withheld else 0  # validation comes last
        self._num_withheld = sum(stream.base[..., 0].numel() for stream in withheld)
        self._device, self._home = layer_device(view.model), view.model.device
        self._diverged = False  # whether a layer was pruned, so that the two streams differ

    def prune(self, index: int, widths: LayerWidths) -> FinishedLayer:
        """Prune one layer to its widths, and move both streams behind it and the removed layers that follow."""
        if index in self.gone:
            return self.skip(index)
        base, gap = self.view.widths[index], index + 1 in self.gone
        narrower = [
            target
            for target in ORDER
            if widths.of(target) < base.of(target) or (gap and target == "mlp" and base.neurons)
        ]
        done = FinishedLayer(LayerPlan.whole(base))
        if not narrower:
            self.replay(index, done)
            return done
        with in_hand(self.view.layers[index], self._device):
            return self._prune(index, widths, narrower, done)

    def _prune(self, index: int, widths: LayerWidths, narrower: Sequence[Target], done: FinishedLayer) -> FinishedLayer:
        layer = ReplayedLayer(index, self._copy(index), self.view, self.storage, narrower)
        for target in narrower:
            fit, validation = self._measure(layer, target, base_too=target == narrower[0])
            units, output = self._choose_and_reconstruct(layer, target, widths.of(target), fit, validation)
            kept: dict[str, Any] = {UNIT_NAMES[target]: units}
            done = FinishedLayer(replace(done.layer, **kept), {**done.outputs, target: output})
            layer.settle(target, kept_features(self.view.geometry, target, units), output)
        for stream in self.streams:
            stream.pruned.copy_(layer.call(stream, record=False))
        self._diverged = True
        return done

    def skip(self, index: int) -> FinishedLayer:
        """Remove a layer as a whole; base streams are behind it already, unless no layer that stays comes before."""
        if self.gone.issuperset(range(index)):
            with in_hand(self.view.layers[index], self._device):
                for stream in self.streams:
                    stream.base.copy_(stream.call(index, self.view.layers[index], stream.base))
        self._diverged = True
        return FinishedLayer(GONE_LAYER)

    def replay(self, index: int, done: FinishedLayer) -> None:
        """Move both streams behind a layer that is done, by an earlier, interrupted run or because it stays whole."""
        if index in self.gone:
            self.skip(index)
            return
        with in_hand(self.view.layers[index], self._device):
            self._replay(index, done)

    def _replay(self, index: int, done: FinishedLayer) -> None:
        base = pruned = self.view.layers[index]
        if done.outputs:
            pruned, self._diverged = self._copy(index), True
        for target, output in done.outputs.items():
            features = kept_features(self.view.geometry, target, done.layer.kept(target))
            SubLayer(pruned, self.view.spec, target).install(features, *output)
        for stream in self.streams:
            stream.base.copy_(self._through_gap(index, stream, stream.call(index, base, stream.base)))
            after = stream.call(index, pruned, stream.pruned, pruned=True) if self._diverged else stream.base
            stream.pruned.copy_(after)

    def _through_gap(self, index: int, stream: Stream, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the removed layers that follow a layer make of its output in the base model."""
        for removed in range(index + 1, len(self.view.layers)):
            if removed not in self.gone:
                break
            with in_hand(self.view.layers[removed], self._device):
                hidden = stream.call(removed, self.view.layers[removed], hidden)
        return hidden

    def _copy(self, index: int) -> nn.Module:
        """Return a copy of a layer that shares all weights with it but those of the output projections.

        Removed units stay in it, with output columns of zero.
        """
        layer, spec = self.view.layers[index], self.view.spec
        projections = [output_projection(layer, spec, target) for target in self.view.targets(index)]
        own = {id(weight) for projection in projections for weight in projection.parameters()}
        tensors = (*layer.parameters(), *layer.buffers())
        return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors if id(tensor) not in own})

    def _measure(self, layer: ReplayedLayer, target: Target, *, base_too: bool) -> tuple[Regression, list[Rows]]:
        """Return the regression of one sub-layer, and its withheld tokens; the pruned streams stay before the layer.

        Args:
            layer: The layer.
            target: The sub-layer.
            base_too: Move the base streams behind the layer, too.
        """
        sub_layer = layer.sub_layers[target]
        weight = output_weight(sub_layer.projection)
        # Attention is measured alone: only the MLP can make up for what a layer's output lacks, unless it runs beside.
        alone = target == "attention" and not self.parallel
        tokens = sum(stream.pruned[..., 0].numel() for stream in self.streams if not stream.validation)
        fit = open_regression(weight.shape[1], weight.shape[0], tokens, weight.device, centre=sub_layer.centre)
        # That of the streams is overwritten at each layer.
        storage = StreamStorage(self._num_withheld, device=self._device)
        withheld: list[Rows] = []
        for stream in self.streams:
            reference = self._base_pass(layer.index, stream, recorded=alone) if base_too else None
            with record_output(sub_layer.projection) as output, record_output(sub_layer.branch) as branch:
                after = layer.call(stream, without_mlp=alone)
            if alone:
                assert reference is not None  # attention comes first
                lacking = reference - stream.rows(branch[0])
            else:  # the last sub-layer that adds: it has to make up for all that the layer's output lacks
                lacking = (stream.rows(stream.base) - stream.rows(after)) / (self.scale * output_scale(layer.layer))
            x = stream.rows(layer.inputs(target, stream))
            rows = sub_layer.regression(x, stream.rows(output[0]), lacking)
            if stream.validation:
                start = stream.start - self._first_withheld
                withheld.append((storage.keep("x", start, rows[0]), storage.keep("e", start, rows[1])))
            else:
                fit.add(*rows)
        fit.finish()
        where = f"layer {layer.index} ({target})"
        fit.statistics.check_finite(f"{where}, pruned stream")
        if not fit.is_finite() or not all(all_finite(values) for rows in withheld for values in rows):
            raise NumericsError(f"NaN or Inf in the target of {where}. {overflow_remedy(self.view.model.dtype)}")
        return fit, withheld

    def _base_pass(self, index: int, stream: Stream, *, recorded: bool) -> torch.Tensor | None:
        """Move a base stream behind the layer and the removed ones that follow it.

        Args:
            index: The layer's number.
            stream: The stream.
            recorded: Return what attention adds.

        Returns:
            What attention has to add for the pruned residual stream behind it to equal the base model's, [tokens,
            outputs].
        """
        layer = self.view.layers[index]
        if not recorded:
            stream.base.copy_(self._through_gap(index, stream, stream.call(index, layer, stream.base)))
            return None
        with record_output(SubLayer(layer, self.view.spec, "attention").branch) as output:
            after = stream.call(index, layer, stream.base)
        lag = stream.rows(stream.base) - stream.rows(stream.pruned)
        stream.base.copy_(self._through_gap(index, stream, after))
        return stream.rows(output[0]) + lag / self.scale

    def _choose_and_reconstruct(
        self, layer: ReplayedLayer, target: Target, count: int, fit: Regression, withheld: list[Rows]
    ) -> tuple[tuple[int, ...], Output]:
        """Return the units that stay, and the weight and bias that reconstruct the output from them."""
        sub_layer = layer.sub_layers[target]
        old = output_weight(sub_layer.projection)
        correction_ridge = DEFAULT_CORRECTION_RIDGE
        if any(all_gather(bool(withheld))):
            ridges = GAP_RIDGES if layer.index + 1 in self.gone else CORRECTION_RIDGES
            errors = torch.tensor(fit.errors(ridges, withheld), dtype=torch.float64)
            all_reduce_([errors])
            correction_ridge = ridges[int(errors.argmin())]
        best = fit.solve(old, None, self.ridge, correction_ridge)
        if count == self.view.num_units(layer.index, target):  # before removed layers, where all units may stay
            units, features, weight = tuple(range(count)), list(range(old.shape[1])), best
        else:
            units = self._choose_units(layer, target, count, best, fit)
            del best
            features = kept_features(self.view.geometry, target, units)
            weight = fit.solve(old, features, self.ridge, correction_ridge)
        bias = sub_layer.projection.bias
        if sub_layer.centre:
            mean = fit.statistics.mean
            bias = bias.double() + fit.mean_target + old.double() @ mean - weight.double() @ mean[features]
        dtype = sub_layer.projection.weight.dtype
        bias = None if bias is None else bias.to(self._home, dtype, copy=True)  # type: ignore[call-overload]
        return units, (weight.to(self._home, dtype), bias)  # type: ignore[arg-type]

    def _choose_units(
        self, layer: ReplayedLayer, target: Target, count: int, output: torch.Tensor, fit: Regression
    ) -> tuple[int, ...]:
        """Return the best units of a sub-layer, ranked with a reconstructed output weight."""
        index = layer.index
        weights = weights_of_layer(self.view, index, target, layer.layer)
        # Every layer has its own generator, so that a resumed run draws what an uninterrupted one does.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + 2 * index + (target == "mlp")) % 2**63)
        weights = replace(weights, output=output, least_kept=count)
        scores = self.criterion.function(weights.cpu(), fit.statistics.cpu(), generator)
        return top_units(scores, count, f"layer {index} ({target})")
