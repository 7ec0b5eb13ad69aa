"""Logistic regression of the next token on cached hidden states; `refit` has the equations of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from huggingface_hub.utils import tqdm
from torch.nn import functional

from hf_context_prune.config import DEFAULT_RIDGE
from hf_context_prune.utils.linalg import add_ridge_, invert_spd_
from hf_context_prune.utils.precision import product_dtype, reduced_precision_matmul

PRIOR = 100.0
"""Occurrences that a row's own evidence is weighed against."""
STEP = 0.1
MOMENTUM = 0.7
MAX_STEPS = 24
STEP_FACTORS = (2**0.5, 2**-0.5)
"""Factors of the last step size that are tried for the next step."""
LEAST_EXPECTED = 0.1
"""A token that the text lacks is fitted if the model expects at least this many occurrences of it."""
MIN_GAIN = 3e-4
"""Gain on validation text, in nats per token, below which a step is not taken."""
_STEP_LOGITS = 2**27
"""Logits of one step; a longer text is split into parts, which the steps take in turn."""
_ELEMENTS = 2**22
"""Logits that exist at once: few enough to stay in the processor's cache."""
_BLOCK_ROWS = 2**14
"""Rows that are converted to float32 at once."""
_FEWEST_ROWS = 256

Text = tuple[torch.Tensor, torch.Tensor]
"""Hidden states, [positions, hidden] float32, and the next tokens, [positions] int64."""


class RowRegression:
    """Logistic regression of the next token on hidden states, with validation text that is never fitted.

    Attributes:
        rows: Tokens whose rows are fitted, [fitted] int64: tokens that the text has, or that the model expects there
            (`LEAST_EXPECTED`).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fitted: Text, validation: Text) -> None:
        self.count, part = len(fitted[0]), max(1, _STEP_LOGITS // len(weight))
        every = torch.arange(len(weight), device=weight.device)
        active = self._predicted(fitted[0][:part], weight, bias) * self.count >= LEAST_EXPECTED
        active[torch.cat([fitted[1], validation[1]])] = True
        self.rows = active.nonzero().squeeze(1)
        place = active.cumsum(0) - 1  # of a token among the fitted ones
        self.fitted, self.validation = (
            (states, place[targets], self._log_sum(states, weight, bias, every[~active]))
            for states, targets in (fitted, validation)
        )
        self._weight, self.fitted_bias = weight, None if bias is None else bias[self.rows].float()

    @cached_property
    def old(self) -> torch.Tensor:
        """The old rows, [fitted, hidden] float32."""
        return self._weight[self.rows].float()

    @cached_property
    def validation_loss(self) -> float:
        """Nats per token of the validation text with the old rows."""
        return self._validation_loss(self.old)

    def solve(self) -> torch.Tensor:
        """Return the rows, [fitted, hidden] float32, at the lowest validation loss that a few steps reach."""
        states, targets, _ = self.fitted
        gram = (states.T @ states).double() / self.count
        inverse = invert_spd_(add_ridge_(gram, DEFAULT_RIDGE)).float()
        observed = torch.bincount(targets, minlength=len(self.rows)).float() / self.count
        number = max(1, round(self.count * len(self.rows) / _STEP_LOGITS))
        parts = list(zip(*(values.tensor_split(number) for values in self.fitted), strict=True))
        best, step, idle = self.old, STEP, False
        lowest, direction = self.validation_loss, torch.zeros_like(best)
        for turn in tqdm(range(MAX_STEPS), desc="Refitting rows", unit="step", name="hf_context_prune.vocabulary"):
            gradient, predicted = self._gradient(best, *parts[turn % len(parts)])
            scale = torch.maximum(predicted, observed) + PRIOR / self.count
            direction = MOMENTUM * direction + (gradient @ inverse) / scale[:, None]
            loss, size = min(
                (self._validation_loss(best - factor * step * direction), factor * step) for factor in STEP_FACTORS
            )
            if loss < lowest - MIN_GAIN:
                best, lowest, step, idle = best - size * direction, loss, size, False
            elif idle:
                break
            else:
                step, idle = step / 4, True
                direction.zero_()
        return best

    def _validation_loss(self, weight: torch.Tensor) -> float:
        """Return the nats per token of the validation text with these rows, [fitted, hidden]."""
        total = 0.0
        for states, targets, others in self._chunks(self.validation, len(weight)):
            logits = _logits(states, weight, self.fitted_bias)
            chosen = logits.gather(1, targets[:, None]).squeeze(1)
            total += float((_log_sum_exp(logits).logaddexp(others) - chosen).sum())
        return total / len(self.validation[0]) if math.isfinite(total) else math.inf  # too long a step

    def _gradient(
        self, weight: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (mean (p - y) h, mean p) over positions, for the fitted rows."""
        gradient, predicted = torch.zeros_like(weight), torch.zeros(len(weight), device=weight.device)
        # The rounding of bfloat16 averages out over the positions of a step; validation losses are not rounded.
        dtype = product_dtype(weight.device)
        rounded, bias = weight.to(dtype), None if self.fitted_bias is None else self.fitted_bias.to(dtype)
        for rows, ids, rest in self._chunks((states, targets, others), len(weight)):
            inputs = rows.to(dtype)
            logits = _logits(inputs, rounded, bias).float()
            highest = logits.amax(dim=-1)
            probability = logits.sub_(highest[:, None]).exp_()
            probability /= (probability.sum(dim=-1) + (rest - highest).exp())[:, None]
            predicted += probability.sum(dim=0)
            probability[torch.arange(len(ids), device=ids.device), ids] -= 1
            with reduced_precision_matmul():
                gradient += (probability.to(dtype).T @ inputs).float()
        return gradient / len(states), predicted / len(states)

    def _predicted(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return how often rows expect each of their tokens, [tokens]: mean p over positions."""
        every = torch.arange(len(weight), device=weight.device)
        normalisers = self._log_sum(states, weight, bias, every)
        total = torch.zeros(len(weight), device=states.device)
        for block in every.split(_BLOCK_ROWS):
            rows, own = _rows_of(weight, bias, block)
            for inputs, normaliser in self._chunks((states, normalisers), len(block)):
                total[block] += (_logits(inputs, rows, own) - normaliser[:, None]).exp_().sum(dim=0)
        return total / len(states)

    def _log_sum(
        self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
    ) -> torch.Tensor:
        """Return the log-sum-exp of the logits of some rows, [positions]; -inf where there are none."""
        total = states.new_full((len(states),), -math.inf)
        for block in index.split(_BLOCK_ROWS):
            rows, own = _rows_of(weight, bias, block)
            chunks = self._chunks((states,), max(1, len(block)))
            total = total.logaddexp(torch.cat([_log_sum_exp(_logits(inputs, rows, own)) for (inputs,) in chunks]))
        return total

    @staticmethod
    def _chunks(values: Sequence[torch.Tensor], tokens: int) -> list[tuple[torch.Tensor, ...]]:
        size = max(_FEWEST_ROWS, _ELEMENTS // tokens)  # every chunk reads all the weights
        return list(zip(*(tensor.split(size) for tensor in values), strict=True))


def _rows_of(
    weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return some rows of the head with their biases, float32."""
    return weight.detach()[index].float(), None if bias is None else bias.detach()[index].float()


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp of each row and overwrite the logits; PyTorch's own is many times as slow on a CPU."""
    if not logits.shape[-1]:
        return logits.new_full(logits.shape[:1], -math.inf)
    highest = logits.amax(dim=-1)
    return logits.sub_(highest[:, None]).exp_().sum(dim=-1).log_().add_(highest)


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with reduced_precision_matmul():
        return functional.linear(states, weight, bias)
