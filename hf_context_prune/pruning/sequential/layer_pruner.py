"""Prune and reconstruct one decoder layer after the other on a base and a pruned stream.

Notation: x are the inputs of an output projection in the pruned stream, W its weight, K the kept features, and e what
the pruned residual stream lacks, beside the projection's own output W x, to equal the base model's. [`regress`][] has
the equation. Its ridge on e is chosen layer by layer on text that is never fitted: every layer fits e again on the same
tokens, so a small ridge would learn those tokens by heart. `sub_layer` has what changes behind a norm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.architectures import Target, is_parallel, output_weight, residual_scale
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.specs import UNIT_NAMES, LayerWidths
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.reduce import reduce_moments
from hf_context_prune.pruning.calibration.statistics import RegressionMoments
from hf_context_prune.pruning.criteria import Criterion
from hf_context_prune.pruning.reconstruction import regress, squared_error
from hf_context_prune.pruning.scoring import top_units, weights_of_layer
from hf_context_prune.pruning.surgery import kept_features
from hf_context_prune.utils.precision import overflow_remedy, reduced_precision_matmul

from .checkpoint import FinishedLayer, Output
from .hidden_states import Stream, record_activations
from .sub_layer import SubLayer

CORRECTION_RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Ridges tried for the correction of the upstream error, as shares of each feature's mean square."""
DEFAULT_CORRECTION_RIDGE = 1.0
"""The ridge of that correction where there is too little text to withhold any for validation."""


class SequentialPruner:
    """Both streams of all batches, moved layer by layer through the model.

    Args:
        view: The base model.
        streams: Hidden states before the first layer.
        criterion: Ranks units.
        ridge: Share of each feature's mean square.
        seed: For the `random` criterion.
    """

    def __init__(
        self, view: ModelView, streams: Sequence[Stream], criterion: Criterion, ridge: float, seed: int
    ) -> None:
        self.view, self.streams = view, streams
        self.criterion, self.ridge, self.seed = criterion, ridge, seed
        config = view.model.config
        self.scale, self.parallel = residual_scale(config, view.spec), is_parallel(config, view.spec)

    def prune(self, index: int, widths: LayerWidths) -> FinishedLayer:
        """Prune one layer to its widths, and move both streams behind it."""
        base = self.view.widths[index]
        order: tuple[Target, ...] = ("attention", "mlp")
        narrower = [target for target in order if widths.of(target) < base.of(target)]
        done = FinishedLayer(LayerPlan(tuple(range(base.neurons)), tuple(range(base.kv_groups))))
        layer = copy.deepcopy(self.view.layers[index])  # removed units stay in it, with output columns of zero
        references = self._base_pass(index, narrower)
        for target in narrower:
            sub_layer = SubLayer(layer, self.view.spec, target)
            fit, validation = self._pruned_pass(index, layer, sub_layer, references)
            units, output = self._choose_and_reconstruct(index, layer, sub_layer, widths.of(target), fit, validation)
            done = FinishedLayer(replace(done.layer, **{UNIT_NAMES[target]: units}), {**done.outputs, target: output})
            sub_layer.install(kept_features(self.view.geometry, target, units), *output)
        for stream in self.streams:
            stream.pruned.copy_(stream.call(index, layer, stream.pruned))
        return done

    def replay(self, index: int, done: FinishedLayer) -> None:
        """Move both streams behind a layer that an earlier, interrupted run finished."""
        base, layer = self.view.layers[index], copy.deepcopy(self.view.layers[index])
        for target, output in done.outputs.items():
            features = kept_features(self.view.geometry, target, done.layer.kept(target))
            SubLayer(layer, self.view.spec, target).install(features, *output)
        for stream in self.streams:
            stream.base.copy_(stream.call(index, base, stream.base))
            stream.pruned.copy_(stream.call(index, layer, stream.pruned))

    def _base_pass(self, index: int, targets: Sequence[Target]) -> list[torch.Tensor | None]:
        """Move the base streams behind the layer.

        Returns:
            For each stream what attention has to add for the pruned residual stream behind it to equal the base
            model's, [tokens, outputs]; None where that is not needed.
        """
        references: list[torch.Tensor | None] = []
        layer = self.view.layers[index]
        attention = SubLayer(layer, self.view.spec, "attention")
        is_needed = "attention" in targets and not self.parallel
        for stream in self.streams:
            with record_activations(attention.branch, inputs=False) as output:
                after = stream.call(index, layer, stream.base)
            reference = None
            if is_needed:
                lag = stream.rows(stream.base) - stream.rows(stream.pruned)
                reference = stream.rows(output[0]) + lag / self.scale
            references.append(reference)
            stream.base.copy_(after)
        return references

    def _pruned_pass(
        self, index: int, layer: nn.Module, sub_layer: SubLayer, references: list[torch.Tensor | None]
    ) -> tuple[RegressionMoments, RegressionMoments]:
        """Return the sums of one sub-layer over fitted and validation text; the streams stay before the layer."""
        weight, target = output_weight(sub_layer.projection), sub_layer.target
        fit, validation = (
            RegressionMoments(weight.shape[1], weight.shape[0], weight.device, centre=sub_layer.centre)
            for _ in range(2)
        )
        for stream, reference in zip(self.streams, references, strict=True):
            with (
                record_activations(sub_layer.projection, inputs=True) as x,
                record_activations(sub_layer.projection, inputs=False) as output,
                record_activations(sub_layer.branch, inputs=False) as branch,
            ):
                after = stream.call(index, layer, stream.pruned)
            if reference is not None and target == "attention":
                lacking = reference - stream.rows(branch[0])
            else:  # the last sub-layer that adds: it has to make up for all that the layer's output lacks
                lacking = (stream.rows(stream.base) - stream.rows(after)) / self.scale
            rows = sub_layer.regression(stream.rows(x[0]), stream.rows(output[0]), lacking)
            with reduced_precision_matmul():  # bfloat16 rounding is far below the ridge
                (validation if stream.validation else fit).add(*rows)
        for moments in (fit, validation):
            reduce_moments(moments)
            moments.statistics.check_finite(f"layer {index} ({target}), pruned stream")
            if not bool(torch.isfinite(moments.cross).all()):
                raise NumericsError(
                    f"NaN or Inf in the target of layer {index} ({target}). {overflow_remedy(self.view.model.dtype)}"
                )
        return fit, validation

    def _choose_and_reconstruct(
        self,
        index: int,
        layer: nn.Module,
        sub_layer: SubLayer,
        count: int,
        fit: RegressionMoments,
        validation: RegressionMoments,
    ) -> tuple[tuple[int, ...], Output]:
        """Return the units that stay, and the weight and bias that reconstruct the output from them."""
        target, old = sub_layer.target, output_weight(sub_layer.projection).double()
        moments = fit.second_moments()
        shares = CORRECTION_RIDGES if validation.statistics.num_tokens else (DEFAULT_CORRECTION_RIDGE,)
        optima = {share: regress(old, *moments, None, self.ridge, share) for share in shares}
        correction_ridge = shares[0]
        if validation.statistics.num_tokens:
            withheld = validation.second_moments()
            correction_ridge = min(shares, key=lambda share: squared_error(optima[share] - old, *withheld))
        units = self._choose_units(index, layer, target, count, optima[correction_ridge], fit)
        features = kept_features(self.view.geometry, target, units)
        weight = regress(old, *moments, features, self.ridge, correction_ridge)
        bias = sub_layer.projection.bias
        if sub_layer.centre:
            mean = fit.statistics.mean
            bias = bias.double() + fit.sum_target / fit.statistics.num_tokens + old @ mean - weight @ mean[features]
        return units, (weight.float(), None if bias is None else bias.float().clone())

    def _choose_units(
        self, index: int, layer: nn.Module, target: Target, count: int, output: torch.Tensor, fit: RegressionMoments
    ) -> tuple[int, ...]:
        """Return the best units of a sub-layer, ranked with a reconstructed output weight."""
        weights = weights_of_layer(self.view, index, target, layer)
        # Every layer has its own generator, so that a resumed run draws what an uninterrupted one does.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + 2 * index + (target == "mlp")) % 2**63)
        scores = self.criterion.function(replace(weights, output=output).cpu(), fit.statistics.cpu(), generator)
        return top_units(scores, count, f"layer {index} ({target})")
