"""How much each layer pays for each width, measured at the model's output on text that the statistics have not seen.

Errors of different layers are not comparable (a large error in one may not matter, a small one in another may), so the
adaptive allocation compares what they do to the output: each layer is narrowed alone, repaired, and the model is run.
The measure is the mean KL(dense || narrowed) of the next-token distributions in nats a token. Where the text is as the
dense model expects it, that is the increase of the cross-entropy; it is never negative, and far less noisy, since every
token of the vocabulary is compared and not only the one that came next.

A surrogate: the sum over layers, each narrowed alone, stands for the model with all of them narrowed. Errors of several
layers may add up to more, or make up for one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.modeling.architectures import (
    Target,
    check_supported,
    layers_of,
    output_projection,
    output_weight,
    unit_size,
)
from hf_context_prune.modeling.patching import Forward, in_bfloat16, patch_forwards
from hf_context_prune.modeling.specs import ArchSpec, Geometry, LayerWidths, read_geometry
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.surgery import ReconstructFn
from hf_context_prune.utils.linalg import all_finite

from .budget import Curve

PROBES = (0.75, 0.5, 0.25)
"""Shares of a layer's neurons that are kept when it is probed."""
PROBE_TOKENS = 2048
"""Text to probe on, in whole blocks, two at least."""
_MOST_LOGITS = 2**27
"""Logits of a batch, half a gigabyte: with 262,144 tokens, as Gemma 3 has, a batch is 512 long."""
_ROWS = 32
"""Tokens whose divergence is computed at once: few enough for the processor's cache, which is five times as fast."""


@dataclass
class _Probe:
    """A batch of text with what every block of the dense model gives on it."""

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    ids: torch.Tensor
    outputs: list[Any] = field(default_factory=list)

    def record(self) -> torch.Tensor:
        """Run the dense model once; its log-probabilities, [tokens, vocabulary], float32."""

        def recorded(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a block takes and gives
                self.outputs.append(in_bfloat16(forward)(*args, **kwargs))
                return self.outputs[-1]

            return run

        with patch_forwards(self.layers, [recorded(block.forward) for block in self.layers]):
            logits = self.model(input_ids=self.ids, use_cache=False).logits.flatten(0, 1).float()
        for rows in logits.split(_ROWS):
            rows.copy_(rows.log_softmax(dim=-1))  # in place: [tokens, vocabulary] is more than many a model
        return logits

    def logits(self, start: int) -> torch.Tensor:
        """The output of the model as it is now, [tokens, vocabulary], if no block before `start` has changed.

        Those blocks give what they gave before; masks, position embeddings, the final norm and the head are the model's
        own.
        """

        def known(output: Any) -> Forward:  # noqa: ANN401
            return lambda *args, **kwargs: output

        before = [known(output) for output in self.outputs[:start]]
        with patch_forwards(self.layers, [*before, *(in_bfloat16(block.forward) for block in self.layers[start:])]):
            return self.model(input_ids=self.ids, use_cache=False).logits.flatten(0, 1)


def _divergence(dense: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over tokens of KL(dense || narrowed), in nats.

    Args:
        dense: Log-probabilities, [tokens, vocabulary], float32.
        logits: Of the narrowed model, [tokens, vocabulary], any floating-point dtype.
    """
    return sum(
        float(nn.functional.kl_div(rows.float().log_softmax(dim=-1), wanted, reduction="sum", log_target=True))
        for wanted, rows in zip(dense.split(_ROWS), logits.split(_ROWS), strict=True)
    )


@contextmanager
def _narrowed(
    projection: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
) -> Iterator[None]:
    """Let a projection act as if only the kept features were there, with these weights; undone at the end."""
    view = output_weight(projection)
    old_weight, old_bias = view.clone(), projection.bias
    narrow = torch.zeros_like(view)  # filled before the old weight goes: the new one may be a view of it
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
    """Split token blocks for adaptive allocation, so that layers are measured on text that the refits have not seen.

    Refits do better on other parts of the documents that they were fitted to, in some layers more than in others, so
    what is measured on comes after what is fitted: `PROBE_TOKENS`, but no more than a quarter. They are blocks, not
    documents: the first may begin with the end of a document of the rest.

    Args:
        samples: [blocks, length], int64.
        fit_tokens: Text for the statistics, if not all of it is to be used. Where enough is left, the blocks to measure
            on are spread over what is left, so that no single document decides.

    Returns:
        (blocks for the statistics, blocks to measure on).

    Raises:
        ConfigError: Fewer than two blocks.
    """
    if len(samples) < 2:
        raise ConfigError(
            f"Adaptive widths are measured on text that is withheld from the statistics, but there is "
            f"{len(samples)} block of {samples.shape[-1]} tokens. Give more text (or raise num_calibration_samples), "
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
    """Narrow every layer alone to a few widths and measure the mean KL(dense || narrowed) at the output.

    A forward pass begins at the narrowed block: what the blocks before it give is recorded once. Memory: every block's
    output on the text, [tokens, vocabulary] in float32, the logits of a batch, and one refitted projection.

    Args:
        model: The dense model; runs in evaluation mode, and is as it was when this returns.
        importance: One value a unit for every (layer, target) that is to be measured.
        reconstruct: As for `apply_plan`.
        samples: Text to measure on, [blocks, length], int64; better not what `reconstruct` was fitted to.
        targets: Which units.
        batch_tokens: Tokens a batch; fewer where the vocabulary is large, but one block at least.

    Returns:
        A curve for every (layer, target) that can lose units, in nats a token.

    Raises:
        NumericsError: An output is NaN or Inf.
    """
    spec = check_supported(model)
    layers, geometry = layers_of(model, spec), read_geometry(model.config, spec)
    counts = {
        (layer, target): found
        for layer, widths in enumerate(geometry.layers)
        for target in targets
        if (layer, target) in importance and (found := probed_counts(widths, target))
    }
    head = model.get_output_embeddings().weight
    batch_tokens = min(batch_tokens, _MOST_LOGITS // len(head))
    ids = samples.split(max(1, batch_tokens // samples.shape[1]))
    batches = [_Probe(model, layers, chunk.to(model.device)) for chunk in ids]
    curves: dict[Key, Curve] = {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    # A pass costs the blocks that it runs, and the head with what is compared there.
    last = head.numel() / sum(weight.numel() for weight in layers[0].parameters())
    work = {key: len(layers) - key[0] + last for key in counts}
    bar = tqdm(
        total=len(batches) * sum(len(found) * work[key] for key, found in counts.items()),
        desc="Probing layers",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        name="hf_context_prune.sensitivity",
    )
    try:
        with torch.inference_mode(), bar:
            dense = [batch.record() for batch in batches] if counts else []
            if not all(map(all_finite, dense)):
                raise _not_finite("the dense model")
            for (layer, target), found in counts.items():
                widths = geometry.layers[layer]
                points = [(widths.neurons if target == "mlp" else widths.kv_groups, 0.0)]
                for count in found:
                    trial = _NarrowedModel(
                        layer, target, count, layers[layer], spec, geometry, importance[layer, target], reconstruct
                    )
                    divergence = 0.0
                    with trial.narrowed():
                        for batch, wanted in zip(batches, dense, strict=True):
                            divergence += _divergence(wanted, batch.logits(layer))
                            bar.update(work[layer, target])
                    if not math.isfinite(divergence):
                        raise _not_finite(f"the model with {trial.where}")
                    points.append((count, max(0.0, divergence / samples.numel())))  # not below 0 but for rounding
                curves[layer, target] = tuple(points)
    finally:
        for module in training:
            module.training = True
    return curves


def probed_counts(widths: LayerWidths, target: Target) -> list[int]:
    """Units to keep when a layer is probed, widest first."""
    total = widths.neurons if target == "mlp" else widths.kv_groups
    counts = {round(total * share) for share in PROBES}
    if target == "attention":
        counts |= {total - 1, 1}  # few units, each of which costs much
    return sorted(counts - {0, total}, reverse=True)


class _NarrowedModel:
    """One layer with one target narrowed to the most important units, refitted."""

    def __init__(
        self,
        layer: int,
        target: Target,
        count: int,
        block: nn.Module,
        spec: ArchSpec,
        geometry: Geometry,
        importance: torch.Tensor,
        reconstruct: ReconstructFn,
    ) -> None:
        self.where = f"layer {layer} ({target}) narrowed to {count} of {len(importance)} units"
        size = unit_size(geometry, target)
        units = sorted(importance.argsort(descending=True, stable=True)[:count].tolist())
        self.kept = [unit * size + feature for unit in units for feature in range(size)]
        self.projection = output_projection(block, spec, target)
        self.weight, self.bias = reconstruct(
            layer,
            target,
            output_weight(self.projection),
            self.projection.bias,  # type: ignore[arg-type]
            self.kept,
        )

    def narrowed(self) -> AbstractContextManager[None]:
        """The model is narrowed so within this context."""
        return _narrowed(self.projection, self.weight, self.bias, self.kept)


def _not_finite(where: str) -> NumericsError:
    return NumericsError(
        f"The output of {where} is not finite, so widths can't be compared. Check the model's weights, or load it in "
        f"float32."
    )
