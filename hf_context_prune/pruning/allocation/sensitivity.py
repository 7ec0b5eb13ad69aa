"""Measure how much each layer pays for each width, at the model's output, on text that the statistics have not seen.

Errors of different layers are not comparable (a large error in one may not matter, a small one in another may), so
adaptive allocation compares their effect on the output: KL(base || narrowed) of the next-token distributions, in nats
per token, of each layer narrowed alone and reconstructed. Where the text is as the base model expects it, that is the
increase of the cross-entropy.

The divergence is taken to second order (`output_fisher` has the equation), so that one backward pass prices every width
of every layer, at the cost of one product of a projection each. The tokens' errors count as
uncorrelated: single tokens are far more samples than whole texts. So many tokens can be afforded that the widths are at
least as good as those of running every narrowed model on half as many.

This is a surrogate: the sum over layers, each narrowed alone, stands for the model with all of them narrowed. Errors of
several layers may add up to more, or cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.modeling.architectures import Target, output_weight
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.scoring import top_units
from hf_context_prune.pruning.sequential.sub_layer import SubLayer
from hf_context_prune.pruning.surgery import ReconstructFn, kept_features
from hf_context_prune.utils.linalg import all_finite
from hf_context_prune.utils.precision import reduced_precision_matmul

from .budget import Curve
from .output_fisher import FisherSketch, SubLayerSketch

_NAME = "hf_context_prune.sensitivity"
PROBES = (0.75, 0.5, 0.25)
"""Shares of a layer's neurons that are kept when the layer is probed."""
PROBE_TOKENS = 4096
"""Tokens to probe on, in whole samples, two at least."""
MOST_NATS = 3.0
"""Most that one token may count. A second-order loss knows no bound, and the first tokens of a sample, which all later
ones attend to, would outweigh all others."""


@dataclass
class _NarrowedLayer:
    """One target of a layer at every probed width.

    Attributes:
        counts: Units that stay, widest first.
        weights: Change of the output projection's weight, [widths * channels, features], float32.
        biases: Change of its bias, [widths, channels], float32; None: no change.
        norm: The norm behind the projection, if there is one.
        nats: Loss at each width, summed over tokens.
    """

    counts: list[int]
    weights: torch.Tensor
    biases: torch.Tensor | None
    norm: nn.Module | None
    nats: torch.Tensor

    def add(self, sketch: SubLayerSketch) -> None:
        """Add the loss on some tokens."""
        with reduced_precision_matmul():  # rounds alike in all layers, and far below the noise of the sketch
            errors = (sketch.inputs @ self.weights.T).view(len(sketch.inputs), len(self.counts), -1)
        if self.biases is not None:
            errors += self.biases
        if self.norm is not None:  # its derivative would call any shrinking of the whole output harmless
            outputs = sketch.outputs.unsqueeze(1)
            errors = self.norm(outputs + errors) - self.norm(outputs)
        losses = torch.einsum("tco,to->tc", errors, sketch.gradients).square() / 2
        self.nats += losses.clamp(max=MOST_NATS).sum(dim=0).double().cpu()


def withhold_probe(samples: torch.Tensor, fit_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Split samples for adaptive allocation, so that layers are measured on text that was not fitted.

    A reconstruction does better on other parts of the documents that it was fitted to, in some layers more than in
    others, so the probe comes after the fitted text: `PROBE_TOKENS`, but no more than a quarter. The split is by
    sample, not by document: the first sample of the probe may begin with the end of a fitted document.

    Args:
        samples: [samples, length], int64.
        fit_tokens: Tokens for the statistics, if not all are to be used. Where enough is left, the probe is spread over
            the rest, so that no single document decides.

    Returns:
        (samples for the statistics, samples of the probe).

    Raises:
        ConfigError: Fewer than two samples.
    """
    if len(samples) < 2:
        raise ConfigError(
            f"Adaptive widths are measured on text that is withheld from the statistics, but there is "
            f"{len(samples)} sample of {samples.shape[-1]} tokens. Give more text (or raise num_calibration_samples), "
            f"lower max_seq_length, or use allocation='uniform'."
        )
    count = max(1, min(max(2, math.ceil(PROBE_TOKENS / samples.shape[1])), len(samples) // 4))
    fitted = len(samples) - count
    if fit_tokens is not None:
        fitted = min(fitted, max(1, fit_tokens // samples.shape[1]))
    left = len(samples) - fitted
    places = fitted + torch.arange(1, count + 1) * left // count - 1
    return samples[:fitted], samples[places]


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel,
    importance: Mapping[Key, torch.Tensor],
    reconstruct: ReconstructFn,
    samples: torch.Tensor,
    *,
    targets: Sequence[Target],
) -> dict[Key, Curve]:
    """Narrow every layer alone to a few widths and measure the mean KL(base || narrowed) at the output.

    Memory: that of [`FisherSketch`][], and one layer's reconstructed projections at every width, float32.

    Args:
        model: The base model; runs in evaluation mode, and is unchanged when this returns.
        importance: One value per unit for every (layer, target) that is to be measured.
        reconstruct: As for `apply_plan`.
        samples: Text to measure on, [samples, length], int64; preferably none that `reconstruct` was fitted to.
        targets: Which units.

    Returns:
        A curve for every (layer, target) that can lose units, in nats per token.

    Raises:
        NumericsError: An importance, a reconstruction, a logit or a gradient is NaN or Inf.
    """
    view = ModelView.of(model)
    wanted = tuple(target for target in targets if any(target == key[1] for key in importance))
    curves: dict[Key, Curve] = {}
    with evaluation_mode(model, inference=False):
        prices = LayerPrices(view, wanted, samples)
        for index in tqdm(range(len(view.layers)), desc="Pricing layers", unit="layer", name=_NAME):
            with in_hand(view.layers[index], layer_device(model)):
                curves |= prices.price(index, importance, reconstruct)
    return curves


class LayerPrices:
    """Prices the widths of one layer after the other on a text.

    Args:
        view: The base model, in evaluation mode; unchanged.
        targets: Which units.
        samples: Text to measure on, [samples, length], int64.

    Raises:
        NumericsError: A logit or a gradient is NaN or Inf.
    """

    def __init__(self, view: ModelView, targets: Sequence[Target], samples: torch.Tensor) -> None:
        self.view, self._tokens = view, samples.numel()
        self._counts: dict[tuple[int, Target], list[int]] = {
            (layer, target): found
            for layer, widths in enumerate(view.widths)
            for target in targets
            if (found := choose_probe_counts(widths, target))
        }
        self._sketch = FisherSketch(view, self._counts, samples)

    def price(self, index: int, importance: Mapping[Key, torch.Tensor], reconstruct: ReconstructFn) -> dict[Key, Curve]:
        """Return the curves of a layer's targets; call this for all layers, in order.

        Raises:
            NumericsError: An importance or a reconstruction is NaN or Inf.
        """
        narrowed = {
            key[1]: _narrow(self.view, key, counts, importance[key], reconstruct)
            for key, counts in self._counts.items()
            if key[0] == index and key in importance
        }
        for target, sketch in self._sketch.layer(index):
            if target in narrowed:
                narrowed[target].add(sketch)
        return {
            (index, target): (
                (self.view.num_units(index, target), 0.0),
                *zip(own.counts, (own.nats / self._tokens).tolist(), strict=True),
            )
            for target, own in narrowed.items()
        }


def _narrow(
    view: ModelView, key: tuple[int, Target], counts: list[int], importance: torch.Tensor, reconstruct: ReconstructFn
) -> _NarrowedLayer:
    """Narrow one layer to its most important units of a target, at every width, reconstructed."""
    layer, target = key
    own = SubLayer(view.layers[layer], view.spec, target)
    weight, bias = output_weight(own.projection), own.projection.bias
    weights, biases = [], []
    for count in counts:
        units = top_units(importance, count, f"layer {layer} ({target})")
        kept = kept_features(view.geometry, target, units)
        new_weight, new_bias = reconstruct(layer, target, weight, bias, kept)  # type: ignore[arg-type]
        change = -weight.float()
        change[:, torch.tensor(kept, device=weight.device)] += new_weight.float()
        if not all_finite(change):
            raise NumericsError(
                f"The reconstruction of layer {layer} ({target}), narrowed to {count} of {len(importance)} units, is "
                f"not finite, so widths can't be compared. Check the model's weights, or load it in float32."
            )
        old_bias = torch.zeros_like(change[:, 0]) if bias is None else bias.float()  # type: ignore[operator]
        weights.append(change)
        biases.append(torch.zeros_like(old_bias) if new_bias is None else new_bias.float() - old_bias)
    change_of_bias = torch.stack(biases)
    return _NarrowedLayer(
        counts,
        torch.cat(weights),
        change_of_bias if bool(change_of_bias.any()) else None,
        own.post_norm,
        torch.zeros(len(counts), dtype=torch.float64),
    )


def choose_probe_counts(widths: LayerWidths, target: Target) -> list[int]:
    """Return how many units to keep when a layer is probed, widest first; none where it has no such units."""
    if not (total := widths.of(target)):
        return []
    counts = {round(total * share) for share in PROBES}
    if target == "attention":
        counts |= {total - 1, 1}  # few units, each of which costs much
    return sorted(counts - {0, total}, reverse=True)
