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
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import PruningWarning
from hf_context_prune.modeling.in_turns import forward_in_turns
from hf_context_prune.modeling.patching import bfloat16_layers, finish_forward
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.memory import free_memory

from .row_regression import RowRegression

_MOST_VALIDATION = 8
"""Most validation samples: one in `VALIDATION_EVERY`, but no more than this."""
MORE_TEXT = 4
"""How many times more calibration samples this refit reads than the layer reconstruction does."""
_MOST_LOGITS = 2**31
"""Most logits of all the text: with a large vocabulary fewer positions are read (131,072 with 16,384 tokens), but never
fewer than by the layer reconstruction."""
_MOST_STATES = 2**28
"""Most values of the hidden states, 1 GiB: with wide states fewer positions are read."""
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
    balance_sources: bool = False,
) -> dict[str, float] | None:
    """Run [`refit_rows`][] on as many samples of a text as [`num_refit_samples`][] returns."""
    count = num_refit_samples(model, num_samples, max_seq_length)
    options: dict[str, Any] = {"num_samples": count, "max_seq_length": max_seq_length, "seed": seed}
    options |= {"balance_sources": balance_sources, "warn_if_short": count <= num_samples}
    samples = tokenize_samples(source, tokenizer, **options)
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
    fit = RowRegression(weight, head.bias, (states[:split], targets[:split]), (states[split:], targets[split:]))
    if (needed := _COPIES * 4 * len(fit.rows) * weight.shape[1]) > free_memory(weight.device):  # in float32
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
