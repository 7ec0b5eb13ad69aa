"""Losses of a causal LM on text: per document, summed up, and compared between two models.

The unit of everything here is the *document*: records that share a `doc` id are one document. Every token of the text
is predicted exactly once, so bits per byte compare models with different vocabularies.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils import tqdm

from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import leading_token
from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.modeling.inference import check_token_ids, evaluation_mode, max_positions

from .bootstrap import Estimate, Statistic, bits_per_byte, bootstrap_estimate, ratio
from .windows import EncodedDocument, Window, batch_windows, context_token, cut_windows, encode_documents, group_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows of logits upcast to float32 at once: few enough for the processor's cache.
_LOGIT_ROWS = 32


@dataclass(frozen=True)
class DocumentLoss:
    """Loss of one model on one document.

    Attributes:
        doc: Identifier of the document.
        source: Where its first record came from.
        nll: Negative log-likelihood of all its tokens, summed (nats).
        num_tokens: Tokens predicted, without special tokens.
        num_bytes: UTF-8 bytes of its text.
    """

    doc: str
    source: str
    nll: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class LossSummary:
    """Losses of one model over documents; all intervals are 95 % percentile bootstrap intervals over documents.

    Attributes:
        bits_per_byte: Comparable between vocabularies.
        nats_per_token: Mean loss a token; comparable only between models with the same tokenizer.
        perplexity: exp(nats_per_token), with the same restriction.
        num_documents: Documents scored.
        num_tokens: Tokens scored.
        num_bytes: UTF-8 bytes of the documents.
        seed: Seed of the bootstrap.
        n_resamples: Resamples of the bootstrap.
    """

    bits_per_byte: Estimate
    nats_per_token: Estimate
    perplexity: Estimate
    num_documents: int
    num_tokens: int
    num_bytes: int
    seed: int
    n_resamples: int


@dataclass(frozen=True)
class LossComparison:
    """Losses of a pruned model against its base on the same documents, with paired bootstrap intervals.

    Attributes:
        excess_nats_per_token: Pruned minus base; None where the tokenizers cut the text into different numbers
            of tokens, as a loss per token then means nothing.
        bits_per_byte_difference: Pruned minus base.
        bits_per_byte_ratio: Pruned over base.
        num_documents: Documents compared.
        seed: Seed of the bootstrap.
        n_resamples: Resamples of the bootstrap.
    """

    excess_nats_per_token: Estimate | None
    bits_per_byte_difference: Estimate
    bits_per_byte_ratio: Estimate
    num_documents: int
    seed: int
    n_resamples: int


def document_losses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    source: TextSource,
    *,
    max_seq_length: int = 512,
    batch_tokens: int = 2048,
    max_tokens: int | None = None,
    docs: Collection[str] | None = None,
    seed: int = 0,
) -> list[DocumentLoss]:
    """Score every document of `source`, each of its tokens exactly once.

    A record is cut into windows of `max_seq_length` tokens. The first is led by the tokenizer's bos (else eos) token,
    and so is every later one where the tokenizer itself puts bos before a text ([`leading_token`][]); else the last
    token of the window before leads it. That leading token is never scored. Windows are batched by length; the results
    do not depend on the batching. Documents without any token are left out.

    To compare two tokenizers under `max_tokens`, choose the documents once: pass the `doc` ids of the first result
    as `docs` to the second call, with no budget.

    Args:
        model: Causal LM, in any mode and dtype, on any device. Its mode is given back.
        tokenizer: The model's tokenizer.
        source: Held-out text.
        max_seq_length: Tokens the model reads at once.
        batch_tokens: Tokens a batch, padding included; a batch holds at least one window.
        max_tokens: If given, take whole documents in shuffled order while they fit, but at least one.
        docs: If given, score only the documents with these ids.
        seed: Seed of that order.

    Returns:
        One loss a document, in the order of `source`.

    Raises:
        ConfigError: If a length is below 1 or beyond the model's positions.
        DataError: If there is nothing to score, an id in `docs` is unknown, the tokenizer has no bos or eos token, or
            a token id has no row in the model.
        NumericsError: If the model's logits are not finite; the message names the document.
    """
    _check_lengths(model, max_seq_length, batch_tokens, max_tokens)
    context = context_token(tokenizer)
    documents = encode_documents(group_records(source, docs), source.name, tokenizer, max_tokens, seed)
    _check_ids(model, tokenizer, documents, context)

    cut = cut_windows(documents, context, max_seq_length, each=leading_token(tokenizer) is not None)
    windows = sorted(cut, key=lambda window: -len(window.inputs))
    nll = [0.0] * len(documents)
    total = sum(document.num_tokens for document in documents)
    with (
        evaluation_mode(model),
        tqdm(total=total, unit="tok", desc="Scoring", name="hf_context_prune.evaluation") as progress,
    ):
        for batch in batch_windows(windows, batch_tokens):
            for window, loss in zip(batch, _window_losses(model, batch, context), strict=True):
                if not math.isfinite(loss):
                    document = documents[window.document]
                    raise NumericsError(
                        f"The model's logits on document {document.doc!r} of {document.source!r} are not finite (loss "
                        f"{loss}). Check the weights for NaN or Inf, or load the model in a wider dtype than "
                        f"{model.dtype}."
                    )
                nll[window.document] += loss
            progress.update(sum(len(window.targets) for window in batch))
    return [
        DocumentLoss(document.doc, document.source, loss, document.num_tokens, document.num_bytes)
        for document, loss in zip(documents, nll, strict=True)
    ]


def choose_documents(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int | None, seed: int = 0
) -> list[str]:
    """The ids of the documents that [`document_losses`][] would score under a budget, without scoring them."""
    documents = encode_documents(group_records(source, None), source.name, tokenizer, max_tokens, seed)
    return [document.doc for document in documents]


def summarize_losses(losses: Sequence[DocumentLoss], *, seed: int = 0, n_resamples: int = 2000) -> LossSummary:
    """Sum up the losses of one model, with bootstrap intervals over documents.

    Raises:
        DataError: If `losses` is empty.
        NumericsError: If the loss is so large that its perplexity is no finite number.
    """
    if not losses:
        raise DataError("There are no document losses to sum up. Score at least one document with document_losses().")
    nll = [loss.nll for loss in losses]
    num_tokens = [float(loss.num_tokens) for loss in losses]
    num_bytes = [float(loss.num_bytes) for loss in losses]
    nats = bootstrap_estimate(ratio, (nll, num_tokens), seed=seed, n_resamples=n_resamples)
    bits = bootstrap_estimate(bits_per_byte, (nll, num_bytes), seed=seed, n_resamples=n_resamples)
    return LossSummary(
        bits_per_byte=bits,
        nats_per_token=nats,
        # exp is monotone: the percentiles of the perplexity are those of the loss, transformed.
        perplexity=Estimate(
            _perplexity(nats.value),
            None if nats.interval is None else (_perplexity(nats.interval[0]), _perplexity(nats.interval[1])),
        ),
        num_documents=len(losses),
        num_tokens=sum(loss.num_tokens for loss in losses),
        num_bytes=sum(loss.num_bytes for loss in losses),
        seed=seed,
        n_resamples=n_resamples,
    )


def compare_losses(
    base: Sequence[DocumentLoss], pruned: Sequence[DocumentLoss], *, seed: int = 0, n_resamples: int = 2000
) -> LossComparison:
    """Compare two models on the same documents, paired by `doc`, in whatever order they come.

    Raises:
        DataError: If there are no documents, or the two lists do not hold the same documents with the same text.
    """
    if not base:
        raise DataError("There are no document losses to compare. Score at least one document with document_losses().")
    before = _by_doc(base, "base")
    after = _by_doc(pruned, "pruned")
    if before.keys() != after.keys():
        lone = sorted(before.keys() ^ after.keys())
        raise DataError(
            f"Base and pruned losses are of different documents: {len(lone)} are in one list only, such as "
            f"{lone[0]!r}. Score both models on the same documents (pass the ids of the first as docs=)."
        )
    pairs = [(loss, after[doc]) for doc, loss in before.items()]
    for first, second in pairs:
        if first.num_bytes != second.num_bytes:
            raise DataError(
                f"Document {first.doc!r} has {first.num_bytes} bytes in the base losses and {second.num_bytes} in the "
                "pruned losses: the texts differ. Score both models on the same text."
            )
    base_nll = [first.nll for first, _ in pairs]
    pruned_nll = [second.nll for _, second in pairs]
    num_bytes = [float(first.num_bytes) for first, _ in pairs]
    num_tokens = [float(first.num_tokens) for first, _ in pairs]
    excess = [second - first for first, second in zip(base_nll, pruned_nll, strict=True)]
    same_tokens = all(first.num_tokens == second.num_tokens for first, second in pairs)

    def estimate(statistic: Statistic, *columns: Sequence[float]) -> Estimate:
        return bootstrap_estimate(statistic, columns, seed=seed, n_resamples=n_resamples)

    return LossComparison(
        excess_nats_per_token=estimate(ratio, excess, num_tokens) if same_tokens else None,
        bits_per_byte_difference=estimate(bits_per_byte, excess, num_bytes),
        bits_per_byte_ratio=estimate(ratio, pruned_nll, base_nll),
        num_documents=len(pairs),
        seed=seed,
        n_resamples=n_resamples,
    )


def _perplexity(nats_per_token: float) -> float:
    try:
        return math.exp(nats_per_token)
    except OverflowError as error:
        raise NumericsError(
            f"The loss is {nats_per_token:.4g} nats per token: its perplexity is no finite number. The model is "
            "broken; check its weights, or prune less."
        ) from error


def _by_doc(losses: Sequence[DocumentLoss], which: str) -> dict[str, DocumentLoss]:
    by_doc: dict[str, DocumentLoss] = {}
    for loss in losses:
        if loss.doc in by_doc:
            raise DataError(f"Document {loss.doc!r} occurs twice in the {which} losses; pairing needs it once.")
        by_doc[loss.doc] = loss
    return by_doc


def _check_lengths(model: "PreTrainedModel", max_seq_length: int, batch_tokens: int, max_tokens: int | None) -> None:
    for name, value in (("max_seq_length", max_seq_length), ("batch_tokens", batch_tokens), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    limit = max_positions(model)
    if limit is not None and max_seq_length > limit:
        raise ConfigError(
            f"max_seq_length is {max_seq_length}, but the model has {limit} positions. Use at most {limit}."
        )


def _check_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: Sequence[EncodedDocument], context: int
) -> None:
    given = (ids for document in documents for ids in document.records)
    check_token_ids(model, tokenizer, itertools.chain([[context]], given))


def _window_losses(model: "PreTrainedModel", batch: Sequence[Window], padding: int) -> list[float]:
    """Return the summed loss (nats) of each window, from float32 log-probabilities added up in float64."""
    width = max(len(window.inputs) for window in batch)
    inputs = torch.full((len(batch), width), padding, dtype=torch.long)
    targets = torch.zeros_like(inputs)
    mask = torch.zeros_like(inputs)
    for row, window in enumerate(batch):
        length = len(window.inputs)
        inputs[row, :length] = torch.tensor(window.inputs)
        targets[row, :length] = torch.tensor(window.targets)
        mask[row, :length] = 1
    device = model.device
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False).logits
    flat_logits = logits.flatten(0, 1)
    flat_targets = targets.to(logits.device).flatten()
    losses = torch.cat(
        [
            -torch.log_softmax(rows.float(), dim=-1).gather(-1, ids[:, None]).squeeze(-1).cpu()
            for rows, ids in zip(flat_logits.split(_LOGIT_ROWS), flat_targets.split(_LOGIT_ROWS), strict=True)
        ]
    )
    # A masked select, not a product: whatever the model says at padded positions, NaN too, must not matter.
    scored = losses.double().view_as(mask).masked_fill(mask == 0, 0.0)
    return [float(loss) for loss in scored.sum(dim=1)]
