"""Refit of the kept token rows: a few natural-gradient steps on cached hidden states.

The text of a removed token is encoded as smaller pieces that the model never saw side by side, and the model predicts
the second piece worst. The head is a multinomial logistic regression on the last hidden states h, so its loss on domain
text is convex in the rows W [tokens, hidden], and no pass through the model is needed to lower it. With p the predicted
and y the observed distribution, one step is

    W_v <- W_v - a * mean_t((p_tv - y_tv) h_t) (E[h h^T] + ridge)^-1 / (max(mean p_v, mean y_v) + prior / tokens)

the Kronecker-factored natural gradient (Martens and Grosse, arXiv 1503.05671) of one linear layer, with momentum. The
prior holds back rows that the text says little about. Validation text, which is not fitted, chooses the step size a,
and at the end, with the whole model (tied rows are inputs too), which share of the change to take.

Rows of tokens that the text does not have and the model does not expect would hardly move: they stay, and their part of
the softmax's denominator is computed once, so that the cost of a step grows with the domain's tokens and not with all.

A few million values of rows easily learn a little text by heart: the gain on unseen text grows with the amount of text
more than with anything else. So this refit reads more text than the reconstruction of the layers where that is cheap,
and takes each step on a part of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import DEFAULT_RIDGE
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import PruningWarning
from hf_context_prune.modeling.in_turns import forward_in_turns
from hf_context_prune.modeling.patching import bfloat16_layers, finish_forward
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.linalg import add_ridge_, invert_spd_
from hf_context_prune.utils.memory import free_memory
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
_MOST_VALIDATION = 8
"""Most validation samples: one in `VALIDATION_EVERY`, but no more than this."""
MORE_TEXT = 4
"""How many times more calibration samples this refit reads than the layer reconstruction does."""
_MOST_LOGITS = 2**31
"""Most logits of all the text: with a large vocabulary fewer positions are read (131,072 with 16,384 tokens), but never
fewer than by the layer reconstruction."""
_MOST_STATES = 2**28
"""Most values of the hidden states, 1 GiB: with wide states fewer positions are read."""
_STEP_LOGITS = 2**27
"""Logits of one step; a longer text is split into parts, which the steps take in turn."""
_ELEMENTS = 2**22
"""Logits that exist at once: few enough to stay in the processor's cache."""
_FEWEST_ROWS = 256
_COPIES = 5
"""Copies of the fitted rows at once: new ones, a candidate, direction, gradient, change."""
_RUN = 8
"""Tokens of a run by which two samples are found to repeat one another."""
_HASH_FACTOR = 1_099_511_628_211


def num_refit_samples(model: PreTrainedModel, num_samples: int, length: int) -> int:
    """Return how many samples are worth their time for [`refit_rows`][], if the reconstruction has `num_samples`."""
    head = model.get_output_embeddings()
    if head is None:
        return num_samples
    tokens, hidden = head.weight.shape
    cheap = max(num_samples, _MOST_LOGITS // tokens // length)
    return max(VALIDATION_EVERY, min(MORE_TEXT * num_samples, cheap, _MOST_STATES // hidden // length))


def refit_to_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    num_samples: int,
    max_seq_length: int,
    seed: int,
) -> dict[str, float] | None:
    """Run [`refit_rows`][] on as many samples of a text as [`num_refit_samples`][] returns."""
    count = num_refit_samples(model, num_samples, max_seq_length)
    options: dict[str, Any] = {"num_samples": count, "max_seq_length": max_seq_length, "seed": seed}
    samples = tokenize_samples(source, tokenizer, **options, warn_if_short=count <= num_samples)
    return refit_rows(model, samples)


@dataclass(frozen=True)
class KnownStates:
    """Hidden states that an earlier stage left.

    Attributes:
        samples: Samples in the model's ids, [samples, length], int64.
        states: Hidden states of the model behind its last layer, [samples, length, hidden].
    """

    samples: torch.Tensor
    states: torch.Tensor


@torch.no_grad()
def refit_rows(
    model: PreTrainedModel, samples: torch.Tensor, known: KnownStates | None = None, *, batch_size: int = 4
) -> dict[str, float] | None:
    """Refit the head's rows (and tied embedding) to domain text, in place; never to a higher loss on validation text.

    Args:
        model: A model with a small vocabulary; in evaluation mode.
        samples: Samples in the model's ids, [samples, length], int64; all are used, see [`num_refit_samples`][].
        known: Samples with the model's hidden states behind its last layer, which need no forward pass where they are
            the first of `samples`.
        batch_size: Samples per forward pass.

    Returns:
        Nats per token on the validation samples before and after, and the share of the change that was taken; None
        where there is too little text or memory, or the logits are not linear in the last hidden states (soft caps,
        scales).
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    validation = min(len(samples) // VALIDATION_EVERY, _MOST_VALIDATION)
    if not validation:
        return None
    order = _validation_last(samples, validation)
    states = _hidden_states(model, head, samples, order, known, batch_size)
    if states is None:
        return None
    samples = samples[order]
    split = len(states) - validation * (samples.shape[1] - 1)
    targets = samples[:, 1:].reshape(-1).to(states.device)
    weight = head.weight
    fit = _RowRegression(weight, head.bias, (states[:split], targets[:split]), (states[split:], targets[split:]))
    if (needed := _COPIES * fit.old.nbytes) > free_memory(weight.device):
        warnings.warn(
            f"The {len(fit.rows):,} rows of the LM head that the text uses are not refitted: that takes "
            f"{needed / 2**30:.1f} GiB of memory. Allow more (max_memory), or give fewer samples.",
            PruningWarning,
            stacklevel=2,
        )
        return None
    before, change = fit.validation_loss, fit.solve() - fit.old
    losses, withheld = {0.0: before}, samples[-validation:]

    def take(share: float) -> None:
        weight[fit.rows] = (fit.old + share * change).to(weight.dtype)

    def measure(share: float) -> None:
        take(share)
        losses[share] = _loss(model, withheld, batch_size)

    measure(0.5)
    measure(1.0)
    vertex = _vertex(before, losses[0.5], losses[1.0])
    if vertex is not None:
        measure(vertex)
    best = min(losses, key=lambda share: losses[share])
    take(best)
    return {"before": before, "after": losses[best], "share": best}


def _validation_last(samples: torch.Tensor, count: int) -> torch.Tensor:
    """Return an order of the samples in which the validation samples are the last `count`.

    Texts of a domain repeat one another, and validation text that repeats fitted text rewards learning it by heart. So
    of the last quarter of the samples, those are taken that share the fewest runs of tokens with the others, the last
    ones first.
    """
    candidates = range(len(samples) - max(count, len(samples) // 4), len(samples))
    runs = samples.unfold(1, min(_RUN, samples.shape[1]), 1)
    hashes = torch.zeros(runs.shape[:2], dtype=torch.int64)
    for values in runs.unbind(-1):
        hashes = hashes * _HASH_FACTOR + values.cpu()
    seen = hashes[: candidates.start].unique()
    repeated = torch.isin(hashes[candidates.start :], seen).float().mean(dim=1)
    chosen = (candidates.stop - 1 - repeated.flip(0).argsort(stable=True)[:count]).sort().values
    rest = torch.ones(len(samples), dtype=torch.bool)
    rest[chosen] = False
    return torch.cat([rest.nonzero().squeeze(1), chosen])


def _vertex(at_none: float, at_half: float, at_all: float) -> float | None:
    """Return the share of a change with the lowest loss, by a parabola through three; None if it is not in between."""
    curvature = at_all - 2 * at_half + at_none
    if not (math.isfinite(curvature) and curvature > 0):
        return None
    share = round(0.5 - (at_all - at_none) / (4 * curvature), 3)
    return share if 0 < share < 1 and share != 0.5 else None


def _hidden_states(
    model: PreTrainedModel,
    head: nn.Module,
    samples: torch.Tensor,
    order: torch.Tensor,
    known: KnownStates | None,
    batch_size: int,
) -> torch.Tensor | None:
    """Return the head's inputs in an order of the samples, [samples * (length - 1), hidden] float32.

    None if the model changes its output.
    """
    first = samples[:1].to(model.device)
    with bfloat16_layers(model):
        logits, inputs = (run(input_ids=first, use_cache=False)[0] for run in (model, model.base_model))
    if not torch.equal(logits.float(), head(inputs).float()):
        return None
    count = 0
    if known is not None and torch.equal(samples[: len(known.samples)], known.samples):
        count = len(known.samples)
    states = inputs.new_empty(len(samples), samples.shape[1] - 1, inputs.shape[-1], dtype=torch.float32)
    place = order.argsort()
    name = "hf_context_prune.vocabulary"
    with tqdm(total=len(samples), desc="Reading hidden states", unit="sample", name=name) as bar:
        for index in range(count):
            assert known is not None
            ids = samples[index : index + 1].to(model.device)
            inputs = finish_forward(model, ids, known.states[index : index + 1].to(model.device))
            states[place[index]] = inputs[0, :-1].float()
            bar.update()
        batches = samples[count:].to(model.device).split(batch_size) if count < len(samples) else ()
        with bfloat16_layers(model):
            outputs = forward_in_turns(model, ({"input_ids": batch} for batch in batches), head=False)
            for places, output in zip(place[count:].split(batch_size), outputs, strict=False):
                states[places] = output[0][:, :-1].float()
                bar.update(len(places))
    return states.flatten(0, 1)


def _loss(model: PreTrainedModel, samples: torch.Tensor, batch_size: int) -> float:
    """Return the model's loss in nats per token."""
    total, count = 0.0, samples[:, 1:].numel()
    batches = samples.to(model.device).split(batch_size)
    with bfloat16_layers(model):
        outputs = forward_in_turns(model, ({"input_ids": batch} for batch in batches))
        for batch, output in zip(batches, outputs, strict=True):
            logits = output.logits[:, :-1].float()
            total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total / count


Text = tuple[torch.Tensor, torch.Tensor]
"""Hidden states, [positions, hidden] float32, and the next tokens, [positions] int64."""


class _RowRegression:
    """Logistic regression of the next token on hidden states, with validation text that is never fitted.

    Attributes:
        rows: Tokens whose rows are fitted, [fitted] int64: tokens that the text has, or that the model expects there
            (`LEAST_EXPECTED`).
        old: Their old rows, [fitted, hidden] float32.
        validation_loss: Nats per token of the validation text with the old rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fitted: Text, validation: Text) -> None:
        whole, bias = weight.detach().float(), None if bias is None else bias.float()
        self.count, part = len(fitted[0]), max(1, _STEP_LOGITS // len(whole))
        active = self._predicted(fitted[0][:part], whole, bias) * self.count >= LEAST_EXPECTED
        active[torch.cat([fitted[1], validation[1]])] = True
        self.rows = active.nonzero().squeeze(1)
        place = active.cumsum(0) - 1  # of a token among the fitted ones
        rest, rest_bias = whole[~active], None if bias is None else bias[~active]
        self.fitted, self.validation = (
            (states, place[targets], self._log_sum(states, rest, rest_bias)) for states, targets in (fitted, validation)
        )
        self.old, self.fitted_bias = whole[self.rows], None if bias is None else bias[self.rows]
        self.validation_loss = self._validation_loss(self.old)

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
        total = torch.zeros(len(weight), device=states.device)
        for (rows,) in self._chunks((states,), len(weight)):
            total += _logits(rows, weight, bias).softmax(dim=-1).sum(dim=0)
        return total / len(states)

    def _log_sum(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the log-sum-exp of the logits of rows, [positions]; -inf where there are none."""
        chunks = self._chunks((states,), max(1, len(weight)))
        return torch.cat([_log_sum_exp(_logits(rows, weight, bias)) for (rows,) in chunks])

    @staticmethod
    def _chunks(values: Sequence[torch.Tensor], tokens: int) -> list[tuple[torch.Tensor, ...]]:
        size = max(_FEWEST_ROWS, _ELEMENTS // tokens)  # every chunk reads all the weights
        return list(zip(*(tensor.split(size) for tensor in values), strict=True))


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp of each row and overwrite the logits; PyTorch's own is many times as slow on a CPU."""
    if not logits.shape[-1]:
        return logits.new_full(logits.shape[:1], -math.inf)
    highest = logits.amax(dim=-1)
    return logits.sub_(highest[:, None]).exp_().sum(dim=-1).log_().add_(highest)


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with reduced_precision_matmul():
        return functional.linear(states, weight, bias)


def refit_rows_in_all_processes(
    model: PreTrainedModel, samples: torch.Tensor, known: KnownStates | None = None
) -> dict[str, float] | None:
    """Run [`refit_rows`][] on the main process, and set its rows in all processes."""
    head = model.get_output_embeddings()

    def refitted() -> tuple[dict[str, float] | None, torch.Tensor | None]:
        found = refit_rows(model, samples, known)
        return found, None if found is None else head.weight.detach().cpu()

    found, rows = on_main_process(refitted)
    if rows is not None:
        with torch.no_grad():
            head.weight.copy_(rows)
    return found
