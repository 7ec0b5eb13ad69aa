"""Measure how much each layer pays for each width, at the model's output, on text that the statistics have not seen.

Errors of different layers are not comparable (a large error in one may not matter, a small one in another may), so
adaptive allocation compares their effect on the output: each layer is narrowed alone and reconstructed, and the model
is run. The measure is the mean KL(base || narrowed) of the next-token distributions, in nats per token. Where the text
is as the base model expects it, that is the increase of the cross-entropy. It is never negative and far less noisy,
since every entry of the vocabulary is compared and not only the token that came next.

This is a surrogate: the sum over layers, each narrowed alone, stands for the model with all of them narrowed. Errors of
several layers may add up to more, or cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.modeling.architectures import Target, output_weight
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.patching import Forward, in_bfloat16, patch_forwards
from hf_context_prune.modeling.specs import LayerWidths
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.scoring import top_units
from hf_context_prune.pruning.surgery import ReconstructFn, kept_features
from hf_context_prune.utils.linalg import all_finite

from .budget import Curve

PROBES = (0.75, 0.5, 0.25)
"""Shares of a layer's neurons that are kept when the layer is probed."""
PROBE_TOKENS = 2048
"""Tokens to probe on, in whole samples, two at least."""
_MOST_LOGITS = 2**27
"""Logits of a batch, half a gigabyte: with the 262,144 entries of Gemma 3's vocabulary, a batch is 512 tokens long."""
_ROWS = 32
"""Tokens whose divergence is computed at once: few enough for the processor's cache, which is five times as fast."""


@dataclass
class _Probe:
    """A batch of text, with the output of every layer of the base model on it."""

    view: ModelView
    ids: torch.Tensor
    outputs: list[Any] = field(default_factory=list)

    def record(self) -> torch.Tensor:
        """Run the base model once and return its log-probabilities, [tokens, vocabulary], float32."""

        def recorded(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - arguments and outputs differ by layer class
                self.outputs.append(in_bfloat16(forward)(*args, **kwargs))
                return self.outputs[-1]

            return run

        layers = self.view.layers
        with patch_forwards(layers, [recorded(layer.forward) for layer in layers]):
            logits = self.view.model(input_ids=self.ids, use_cache=False).logits.flatten(0, 1).float()
        for rows in logits.split(_ROWS):
            rows.copy_(rows.log_softmax(dim=-1))  # in place: [tokens, vocabulary] is larger than many a model
        return logits

    def logits(self, start: int) -> torch.Tensor:
        """Return the output of the model as it is now, [tokens, vocabulary], if no layer before `start` has changed.

        Those layers return what was recorded; masks, position embeddings, the final norm and the head are the model's
        own.
        """

        def known(output: Any) -> Forward:  # noqa: ANN401
            return lambda *args, **kwargs: output

        layers = self.view.layers
        before = [known(output) for output in self.outputs[:start]]
        with patch_forwards(layers, [*before, *(in_bfloat16(layer.forward) for layer in layers[start:])]):
            return self.view.model(input_ids=self.ids, use_cache=False).logits.flatten(0, 1)


def _divergence(base: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the sum over tokens of KL(base || narrowed), in nats.

    Args:
        base: Log-probabilities of the base model, [tokens, vocabulary], float32.
        logits: Logits of the narrowed model, [tokens, vocabulary], any floating-point dtype.
    """
    return sum(
        float(nn.functional.kl_div(rows.float().log_softmax(dim=-1), wanted, reduction="sum", log_target=True))
        for wanted, rows in zip(base.split(_ROWS), logits.split(_ROWS), strict=True)
    )


@contextmanager
def _narrow(
    projection: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, kept: Sequence[int]
) -> Iterator[None]:
    """Let a projection act as if only the kept features existed, with these weights; undone at the end."""
    view = output_weight(projection)
    old_weight, old_bias = view.clone(), projection.bias
    narrow = torch.zeros_like(view)  # filled before the old weight is overwritten: the new one may be a view of it
    narrow[:, torch.tensor(kept, device=view.device)] = weight.to(view.device, view.dtype)
    try:
        view.copy_(narrow)
        if bias is not None:
            projection.bias = nn.Parameter(bias.to(view.device, view.dtype), requires_grad=False)
        yield
    finally:
        view.copy_(old_weight)
        projection.bias = old_bias


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


def measure_sensitivity(
    model: PreTrainedModel,
    importance: Mapping[Key, torch.Tensor],
    reconstruct: ReconstructFn,
    samples: torch.Tensor,
    *,
    targets: Sequence[Target],
    batch_tokens: int = 2048,
) -> dict[Key, Curve]:
    """Narrow every layer alone to a few widths and measure the mean KL(base || narrowed) at the output.

    A forward pass begins at the narrowed layer: the outputs of the layers before it are recorded once. Memory: the
    output of every layer on the text, [tokens, vocabulary] in float32, the logits of a batch, and one reconstructed
    projection.

    Args:
        model: The base model; runs in evaluation mode, and is unchanged when this returns.
        importance: One value per unit for every (layer, target) that is to be measured.
        reconstruct: As for `apply_plan`.
        samples: Text to measure on, [samples, length], int64; preferably none that `reconstruct` was fitted to.
        targets: Which units.
        batch_tokens: Tokens per batch; fewer where the vocabulary is large, but one sample at least.

    Returns:
        A curve for every (layer, target) that can lose units, in nats per token.

    Raises:
        NumericsError: An importance or an output is NaN or Inf.
    """
    view = ModelView.of(model)
    counts = {
        (layer, target): found
        for layer, widths in enumerate(view.widths)
        for target in targets
        if (layer, target) in importance and (found := choose_probe_counts(widths, target))
    }
    head = model.get_output_embeddings()
    batch_tokens = min(batch_tokens, _MOST_LOGITS // len(head.weight))
    ids = samples.split(max(1, batch_tokens // samples.shape[1]))
    batches = [_Probe(view, chunk.to(model.device)) for chunk in ids]
    curves: dict[Key, Curve] = {}
    # A pass costs the layers that it runs, and the head with the comparison there.
    last = head.weight.numel() / sum(weight.numel() for weight in view.layers[0].parameters())
    work = {key: len(view.layers) - key[0] + last for key in counts}
    bar = tqdm(
        total=len(batches) * sum(len(found) * work[key] for key, found in counts.items()),
        desc="Probing layers",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        name="hf_context_prune.sensitivity",
    )
    with evaluation_mode(model), bar:
        base = [batch.record() for batch in batches] if counts else []
        if not all(map(all_finite, base)):
            raise _not_finite("the base model")
        for (layer, target), found in counts.items():
            total = view.num_units(layer, target)
            points = [(total, 0.0)]
            for count in found:
                divergence = 0.0
                with _narrowed_layer(view, layer, target, count, importance[layer, target], reconstruct):
                    for batch, wanted in zip(batches, base, strict=True):
                        divergence += _divergence(wanted, batch.logits(layer))
                        bar.update(work[layer, target])
                if not math.isfinite(divergence):
                    where = f"layer {layer} ({target}) narrowed to {count} of {total} units"
                    raise _not_finite(f"the model with {where}")
                points.append((count, max(0.0, divergence / samples.numel())))  # only rounding makes it negative
            curves[layer, target] = tuple(points)
    return curves


def choose_probe_counts(widths: LayerWidths, target: Target) -> list[int]:
    """Return how many units to keep when a layer is probed, widest first."""
    total = widths.of(target)
    counts = {round(total * share) for share in PROBES}
    if target == "attention":
        counts |= {total - 1, 1}  # few units, each of which costs much
    return sorted(counts - {0, total}, reverse=True)


@contextmanager
def _narrowed_layer(
    view: ModelView, layer: int, target: Target, count: int, importance: torch.Tensor, reconstruct: ReconstructFn
) -> Iterator[None]:
    """Narrow one layer to its most important units of a target, reconstructed; undone at the end."""
    units = top_units(importance, count, f"layer {layer} ({target})")
    kept, projection = kept_features(view.geometry, target, units), view.output_projection(layer, target)
    bias: torch.Tensor | None = projection.bias  # type: ignore[assignment]
    with _narrow(projection, *reconstruct(layer, target, output_weight(projection), bias, kept), kept):
        yield


def _not_finite(where: str) -> NumericsError:
    return NumericsError(
        f"The output of {where} is not finite, so widths can't be compared. Check the model's weights, or load it in "
        f"float32."
    )
