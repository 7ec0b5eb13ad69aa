"""Losses of a causal LM on text, document by document.

Records that share a `doc` id are one *document*. Every token of the text is predicted exactly once, so bits per byte
compare models with different vocabularies.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils import tqdm

from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import leading_token
from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.modeling.in_turns import forward_in_turns
from hf_context_prune.modeling.inference import check_token_ids, evaluation_mode, max_positions
from hf_context_prune.utils.precision import overflow_remedy

from .losses import DocumentLoss
from .windows import EncodedDocument, Window, batch_windows, context_token, cut_windows, encode_documents, group_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows of logits upcast to float32 at once: few enough for the processor's cache.
_LOGIT_ROWS = 32


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
    description: str = "Scoring",
) -> list[DocumentLoss]:
    """Score every document of `source`, each of its tokens exactly once.

    A record is cut into windows of `max_seq_length` tokens. The tokenizer's bos (else eos) token leads the first window
    and, where the tokenizer itself puts bos before a text ([`leading_token`][]), every later one; otherwise the last
    token of the previous window leads it. The leading token is never scored. Windows are batched by length; the results
    do not depend on the batching. Documents without any token are left out.

    To compare two tokenizers under `max_tokens`, choose the documents once: pass the `doc` ids of the first result
    as `docs` to the second call, without `max_tokens`.

    Args:
        model: Causal LM, in any mode and dtype, on any device. Its mode is restored.
        tokenizer: The model's tokenizer.
        source: Held-out text.
        max_seq_length: Tokens per window.
        batch_tokens: Tokens per batch, padding included; a batch holds at least one window.
        max_tokens: If given, take whole documents in shuffled order while they fit, but at least one ([`Passages`][]
            spreads a budget over more of them).
        docs: If given, score only the documents with these ids.
        seed: Seed of the shuffled order.
        description: Name of the progress bar.

    Returns:
        One loss per document, in the order of `source`.

    Raises:
        ConfigError: A length is below 1 or beyond the model's positions.
        DataError: There is nothing to score, an id in `docs` is unknown, the tokenizer has no bos or eos token, or a
            token id has no row in the model.
        NumericsError: The model's logits are not finite; names the document.
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
        tqdm(total=total, unit="tok", desc=description, name="hf_context_prune.evaluation") as progress,
    ):
        batches = list(batch_windows(windows, batch_tokens))
        outputs = forward_in_turns(model, (_model_inputs(batch, context, model.device) for batch in batches))
        for batch, output in zip(batches, outputs, strict=True):
            for window, loss in zip(batch, _window_losses(output.logits, batch), strict=True):
                if not math.isfinite(loss):
                    document = documents[window.document]
                    raise NumericsError(
                        f"The model's logits on document {document.doc!r} of {document.source!r} are not finite (loss "
                        f"{loss}). {overflow_remedy(model.dtype)}"
                    )
                nll[window.document] += loss
            progress.update(sum(len(window.targets) for window in batch))
    return [
        DocumentLoss(document.doc, document.source, loss, document.num_tokens, document.num_bytes)
        for document, loss in zip(documents, nll, strict=True)
    ]


def _check_lengths(model: "PreTrainedModel", max_seq_length: int, batch_tokens: int, max_tokens: int | None) -> None:
    for name, value in (("max_seq_length", max_seq_length), ("batch_tokens", batch_tokens), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    check_positions(model, max_seq_length)


def check_positions(model: "PreTrainedModel", max_seq_length: int) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        ConfigError: Names the most.
    """
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


def _model_inputs(batch: Sequence[Window], padding: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(window.inputs) for window in batch)
    inputs = torch.full((len(batch), width), padding, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, window in enumerate(batch):
        inputs[row, : len(window.inputs)] = torch.tensor(window.inputs)
        mask[row, : len(window.inputs)] = 1
    return {"input_ids": inputs.to(device), "attention_mask": mask.to(device)}


def _window_losses(logits: torch.Tensor, batch: Sequence[Window]) -> list[float]:
    """Return the summed loss (nats) of each window, from float32 log-probabilities added up in float64."""
    targets = torch.zeros(logits.shape[:2], dtype=torch.long)
    mask = torch.zeros_like(targets)
    for row, window in enumerate(batch):
        targets[row, : len(window.targets)] = torch.tensor(window.targets)
        mask[row, : len(window.targets)] = 1
    flat_logits = logits.flatten(0, 1)
    flat_targets = targets.to(logits.device).flatten()
    losses = torch.cat(
        [
            -torch.log_softmax(rows.float(), dim=-1).gather(-1, ids[:, None]).squeeze(-1).cpu()
            for rows, ids in zip(flat_logits.split(_LOGIT_ROWS), flat_targets.split(_LOGIT_ROWS), strict=True)
        ]
    )
    # A masked fill, not a product: the values at padded positions, NaN too, must not matter.
    scored = losses.double().view_as(mask).masked_fill(mask == 0, 0.0)
    return [float(loss) for loss in scored.sum(dim=1)]
