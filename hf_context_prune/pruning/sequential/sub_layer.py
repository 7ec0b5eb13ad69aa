"""A sub-layer (attention or MLP) of a decoder layer, as sequential reconstruction sees it.

Notation: x are the inputs of the output projection in the pruned stream, y = W x its output, and e what the pruned
residual stream lacks, beside y, to equal the base model's.

Behind a norm (Gemma 2 and 3), y enters the residual stream as gamma y / r(y), with one scale r per token. There x is
divided by r, and e by gamma, except in channels of small gamma: to give those what they lack takes changes so large
that they grow r and shrink every other channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_context_prune.modeling.architectures import (
    Target,
    channel_scale,
    norm_epsilon,
    output_projection,
    output_weight,
    post_norm,
)
from hf_context_prune.modeling.specs import ArchSpec

NORM_DAMPING = 0.1
"""Behind a norm, the square of gamma below which a channel is corrected less, as a share of the mean square."""
SINK_SHARE = 0.1
"""Behind a norm, the RMS below which a token counts less, as a share of the median."""


class SubLayer:
    """The output projection of a target in one decoder layer, and how its output enters the residual stream.

    Args:
        layer: The decoder layer.
        spec: Its architecture.
        target: Whose units the projection reads.
    """

    def __init__(self, layer: nn.Module, spec: ArchSpec, target: Target) -> None:
        self.target, self.projection = target, output_projection(layer, spec, target)
        self.post_norm, self.gamma = post_norm(layer, spec, target), channel_scale(layer, spec, target)

    @property
    def branch(self) -> nn.Module:
        """The module whose output, times the model's scale, is added to the residual stream."""
        return self.projection if self.post_norm is None else self.post_norm

    @property
    def centre(self) -> bool:
        """Whether a bias takes up the mean. Behind a norm it can't (rows are rescaled there), and stays as it is."""
        return self.projection.bias is not None and self.post_norm is None

    def regression(
        self, x: torch.Tensor, output: torch.Tensor, lacking: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of the regression: (x, e), or behind a norm (u x / r, u d e).

            r = sqrt(mean y^2 + eps)    u = min(1, r / (SINK_SHARE median r))
            d = gamma / (gamma^2 + NORM_DAMPING mean gamma^2)

        To first order in the change C of W, and without the change of r, gamma C x / r is what is added to the stream.
        u keeps attention sinks, tokens with almost no output, from having all the weight. d is 1 / gamma where gamma is
        not small: the ridge solution of gamma d = 1.

        Args:
            x: Inputs of the projection, [tokens, features].
            output: y, the projection's output, [tokens, channels].
            lacking: e, [tokens, channels].
        """
        if self.post_norm is None:
            return x, lacking
        gamma = self.gamma.float().T
        rms = (output.square().mean(dim=-1, keepdim=True) + norm_epsilon(self.post_norm)).sqrt()
        weight = 1 / rms.clamp_min(SINK_SHARE * rms.median())
        damped = gamma / (gamma.square() + NORM_DAMPING * gamma.square().mean())
        return weight * x, weight * rms * damped * lacking

    def install(self, features: Sequence[int], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Zero the columns of removed features and set the reconstructed columns of the kept ones, in place.

        Args:
            features: Kept input features, ascending.
            weight: New weight of the kept features, [channels, kept].
            bias: New bias, [channels]; None where the projection has none.
        """
        view = output_weight(self.projection)
        view.zero_()
        view[:, torch.tensor(features, device=view.device)] = weight.to(view)
        if bias is not None:
            self.projection.bias.copy_(bias)  # type: ignore[operator,union-attr]
