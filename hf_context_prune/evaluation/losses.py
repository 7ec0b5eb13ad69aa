"""Losses of documents: summed up for one model, and compared between two, with bootstrap intervals."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_context_prune.errors import DataError, NumericsError

from .bootstrap import Estimate, Statistic, bits_per_byte, bootstrap_estimate, ratio, ratio_to_change

_LOGGER = logging.getLogger(__name__)
_MOST_NAMED = 100


@dataclass(frozen=True)
class DocumentLoss:
    """Loss of one model on one document.

    Attributes:
        doc: Identifier of the document.
        source: Source of its first record.
        nll: Negative log-likelihood (nats), summed over all its tokens.
        num_tokens: Number of tokens predicted, without special tokens.
        num_bytes: UTF-8 bytes of its text.
    """

    doc: str
    source: str
    nll: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class LossSummary:
    """Losses of one model over documents, with 95 % percentile bootstrap intervals over sources and documents.

    Attributes:
        bits_per_byte: Loss in bits per byte; comparable between vocabularies.
        nats_per_token: Mean loss per token; comparable only between models with the same tokenizer.
        perplexity: exp(nats_per_token), with the same restriction.
        num_documents: Number of documents scored.
        num_tokens: Number of tokens scored.
        num_bytes: UTF-8 bytes of the documents.
        seed: Seed of the bootstrap.
        n_resamples: Number of resamples of the bootstrap.
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
        num_documents: Number of documents compared.
        seed: Seed of the bootstrap.
        n_resamples: Number of resamples of the bootstrap.
    """

    excess_nats_per_token: Estimate | None
    bits_per_byte_difference: Estimate
    bits_per_byte_ratio: Estimate
    num_documents: int
    seed: int
    n_resamples: int

    @property
    def perplexity_ratio(self) -> Estimate | None:
        """Perplexity of the pruned model over that of the base; None where `excess_nats_per_token` is."""
        return None if self.excess_nats_per_token is None else _perplexity(self.excess_nats_per_token)


def mean_bits_per_byte(losses: Sequence[DocumentLoss]) -> float:
    """Return the bits per byte of all documents together, without an interval."""
    return float(bits_per_byte([loss.nll for loss in losses], [loss.num_bytes for loss in losses]))


def summarize_losses(losses: Sequence[DocumentLoss], *, seed: int = 0, n_resamples: int = 2000) -> LossSummary:
    """Sum up the losses of one model, with bootstrap intervals over sources and documents.

    Raises:
        DataError: `losses` is empty.
        NumericsError: The loss is so large that its perplexity is not a finite number.
    """
    if not losses:
        raise DataError("There are no document losses to sum up. Score at least one document with document_losses().")
    nll = [loss.nll for loss in losses]
    num_tokens = [float(loss.num_tokens) for loss in losses]
    num_bytes = [float(loss.num_bytes) for loss in losses]
    sources = [loss.source for loss in losses]
    nats = bootstrap_estimate(ratio, (nll, num_tokens), sources, seed=seed, n_resamples=n_resamples)
    bits = bootstrap_estimate(bits_per_byte, (nll, num_bytes), sources, seed=seed, n_resamples=n_resamples)
    return LossSummary(
        bits_per_byte=bits,
        nats_per_token=nats,
        perplexity=_perplexity(nats),
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
        DataError: There are no documents, or the two lists do not hold the same documents with the same text.
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
    sources = [first.source for first, _ in pairs]
    same_tokens = all(first.num_tokens == second.num_tokens for first, second in pairs)

    def estimate(statistic: Statistic, *columns: Sequence[float]) -> Estimate:
        return bootstrap_estimate(statistic, columns, sources, seed=seed, n_resamples=n_resamples)

    return LossComparison(
        excess_nats_per_token=estimate(ratio, excess, num_tokens) if same_tokens else None,
        bits_per_byte_difference=estimate(bits_per_byte, excess, num_bytes),
        bits_per_byte_ratio=estimate(ratio, pruned_nll, base_nll),
        num_documents=len(pairs),
        seed=seed,
        n_resamples=n_resamples,
    )


def compare_summaries(base: LossSummary, other: LossSummary) -> LossComparison:
    """Compare two models by their losses on the same text; without the losses of each document, without intervals."""
    excess = None
    if base.num_tokens == other.num_tokens:
        excess = Estimate(other.nats_per_token.value - base.nats_per_token.value, None)
    before, after = base.bits_per_byte.value, other.bits_per_byte.value
    return LossComparison(
        excess_nats_per_token=excess,
        bits_per_byte_difference=Estimate(after - before, None),
        bits_per_byte_ratio=Estimate(after / before, None),
        num_documents=base.num_documents,
        seed=base.seed,
        n_resamples=base.n_resamples,
    )


@dataclass(frozen=True)
class SourceLoss:
    """Losses on the documents of one source, in bits per byte.

    Attributes:
        number: Number of the source, from 1, in the order of their names. A name may be that of a client, and reports
            are published, so no report has it.
        num_documents: Its documents.
        models: Bits per byte by model, such as ``"base"`` and ``"pruned"``.
    """

    number: int
    num_documents: int
    models: dict[str, float]


def losses_by_source(measured: Mapping[str, Sequence[DocumentLoss]], *, what: str = "text") -> tuple[SourceLoss, ...]:
    """Return the losses of models on each source of a text; none where it has a single one. The log names them.

    Args:
        measured: Losses on the same documents, by model.
        what: What the log calls the text.
    """
    groups: dict[str, dict[str, list[DocumentLoss]]] = {}
    for model, losses in measured.items():
        for loss in losses:
            groups.setdefault(loss.source, {}).setdefault(model, []).append(loss)
    if len(groups) < 2:
        return ()
    found, names = [], []
    for number, (source, models) in enumerate(sorted(groups.items()), start=1):
        bits = {model: mean_bits_per_byte(losses) for model, losses in models.items()}
        found.append(SourceLoss(number, len(next(iter(models.values()))), bits))
        names.append(f"{number} {source!r:.80}")  # foreign text: no line breaks, no terminal codes
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    _LOGGER.info("Sources of the %s, by number: %s%s.", what, ", ".join(names[:_MOST_NAMED]), more)
    return tuple(found)


def relative_change(base: Sequence[DocumentLoss], own: Sequence[DocumentLoss], seed: int) -> Estimate:
    """Return the relative change of the bits per byte against another model, with its paired interval."""
    return ratio_to_change(compare_losses(base, own, seed=seed).bits_per_byte_ratio)


def _perplexity(nats_per_token: Estimate) -> Estimate:
    """Return exp of a loss."""
    try:
        return nats_per_token.map(math.exp)
    except OverflowError as error:
        raise NumericsError(
            f"The loss is {nats_per_token.value:.4g} nats per token: its perplexity is not a finite number. The model "
            f"is broken; check its weights, or prune less."
        ) from error


def _by_doc(losses: Sequence[DocumentLoss], which: str) -> dict[str, DocumentLoss]:
    by_doc: dict[str, DocumentLoss] = {}
    for loss in losses:
        if loss.doc in by_doc:
            raise DataError(f"Document {loss.doc!r} occurs twice in the {which} losses; pairing needs it once.")
        by_doc[loss.doc] = loss
    return by_doc
