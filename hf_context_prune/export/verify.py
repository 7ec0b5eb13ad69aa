"""Comparison of an artefact in its runtime with the folder's own model: losses, greedy text, tokens, speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_context_prune.errors import ExportError
from hf_context_prune.evaluation.bootstrap import bits_per_byte

from .runtime import Runtime, TorchRuntime
from .sample import Sample

# Texts that the tokenizer of another runtime gets wrong if its kind was not recognised.
TOKENIZER_PROBES = (
    "It's 3.5% of 1,024; they'll pay $20000.\n\n  Then:\tnaïve café",
    "中文 и русский 🚀🚀  \n \n end ",
    "def f(x):\n    return x**2  # 12345 != 67",
)


@dataclass(frozen=True)
class Tolerance:
    """The difference that an artefact may have.

    Attributes:
        perplexity: Relative difference of the perplexity on the sample.
        gap: Largest log-probability (nats) by which the folder's model may prefer another token to the greedy token of
            the artefact. A small value allows ties alone; None allows any.
    """

    perplexity: float
    gap: float | None = None


@dataclass(frozen=True)
class Verification:
    """The result of a comparison; `before` is the folder's own model, `after` the artefact.

    Attributes:
        text: Description of the scored text.
        num_tokens: Number of scored tokens.
        before: Mean loss of the folder's model, nats per token.
        after: Mean loss of the artefact, nats per token.
        bits_per_byte_before: Bits per byte of the folder's model; None where the model scored its own text.
        bits_per_byte_after: Bits per byte of the artefact.
        perplexity_change: exp(after - before) - 1.
        largest_difference: Largest difference in the log-probability of one token (nats).
        prompts: Number of greedy continuations compared.
        new_tokens: Largest number of tokens of each.
        equal_texts: Number of continuations that are the same token by token.
        largest_gap: Largest log-probability (nats) by which the folder's model preferred another token.
        tokens_per_second_before: Decode steps per second of the folder's model, by its runtime's own clock: one
            sequence, after its prompt; median of prompts.
        tokens_per_second_after: Speed of the artefact.
        bytes_before: Size of the weights on disk.
        bytes_after: Size of the artefact.
        tolerance: The difference that was allowed.
    """

    text: str
    num_tokens: int
    before: float
    after: float
    bits_per_byte_before: float | None
    bits_per_byte_after: float | None
    perplexity_change: float
    largest_difference: float
    prompts: int
    new_tokens: int
    equal_texts: int
    largest_gap: float
    tokens_per_second_before: float
    tokens_per_second_after: float
    bytes_before: int
    bytes_after: int
    tolerance: Tolerance


@dataclass(frozen=True)
class Measurement:
    """The results of one runtime on a sample: losses of every window, texts, tokens per second."""

    losses: tuple[tuple[float, ...], ...]
    texts: tuple[tuple[int, ...], ...]
    tokens_per_second: float


def measure(runtime: Runtime, sample: Sample, before: Measurement | None = None) -> Measurement:
    """Score the windows of a sample and continue its prompts.

    Args:
        runtime: The runtime.
        sample: The sample.
        before: Results of the folder's own model, for runtimes that need approximate losses.
    """
    expected: Sequence[Sequence[float] | None] = before.losses if before else [None] * len(sample.windows)
    losses = [runtime.losses(window, about) for window, about in zip(sample.windows, expected, strict=True)]
    texts, speeds = [], []
    for prompt in sample.prompts:
        texts.append(tuple(runtime.generate(prompt, sample.new_tokens)))
        speeds.append(sample.new_tokens / runtime.time_generation([prompt], sample.new_tokens)[1])
    return Measurement(tuple(map(tuple, losses)), tuple(texts), statistics.median(speeds))


def check_tokens(runtime: Runtime, tokenizer: object, sample: Sample) -> None:
    """Compare the tokens of a runtime that has its own tokenizer with the folder's.

    Raises:
        ExportError: A text has other tokens; the message shows where.
    """
    for text in (*TOKENIZER_PROBES, *sample.texts):
        theirs = runtime.encode(text)
        if theirs is None:
            return
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
        if ours != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ExportError(
                f"The runtime splits a text into other tokens than the tokenizer of the folder: after "
                f"{tokenizer.decode(ours[:place])[-40:]!r} it has {theirs[place : place + 4]}, where the "  # type: ignore[attr-defined]
                f"folder has {ours[place : place + 4]}. Nothing was put in place. Export to another format."
            )


def compare(
    before: Measurement,
    after: Measurement,
    reference: TorchRuntime,
    sample: Sample,
    tolerance: Tolerance,
    *,
    bytes_before: int,
    bytes_after: int,
) -> Verification:
    """Compare two measurements on one sample; `reference` scores the texts of the artefact."""
    old, new = ([loss for window in m.losses for loss in window] for m in (before, after))
    gaps = [
        max(reference.gaps(prompt, text), default=0.0) for prompt, text in zip(sample.prompts, after.texts, strict=True)
    ]
    means = [math.fsum(losses) / len(losses) for losses in (old, new)]
    bits = [
        None if sample.num_bytes is None else float(bits_per_byte(losses, sample.num_bytes)) for losses in (old, new)
    ]
    return Verification(
        text=sample.description,
        num_tokens=sample.num_tokens,
        before=means[0],
        after=means[1],
        bits_per_byte_before=bits[0],
        bits_per_byte_after=bits[1],
        perplexity_change=math.exp(min(means[1] - means[0], 700.0)) - 1,
        largest_difference=max(abs(a - b) for a, b in zip(old, new, strict=True)),
        prompts=len(sample.prompts),
        new_tokens=sample.new_tokens,
        equal_texts=sum(a == b for a, b in zip(before.texts, after.texts, strict=True)),
        largest_gap=max(gaps),
        tokens_per_second_before=before.tokens_per_second,
        tokens_per_second_after=after.tokens_per_second,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        tolerance=tolerance,
    )


def check(found: Verification) -> None:
    """Check a verification against its tolerance.

    Raises:
        ExportError: The artefact differs by more, or its losses are not finite.
    """
    limit = found.tolerance
    if not (math.isfinite(found.after) and abs(found.perplexity_change) <= limit.perplexity):
        raise ExportError(
            f"The artefact's perplexity on {found.text} differs by {found.perplexity_change:+.2%} from the folder's "
            f"({found.after:.4f} against {found.before:.4f} nats per token); allowed are {limit.perplexity:.2%}. "
            f"Nothing was put in place. Choose a wider --dtype, or allow more with --tolerance."
        )
    if limit.gap is not None and not found.largest_gap <= limit.gap:
        raise ExportError(
            f"The artefact's greedy text has a token to which the folder's model prefers another by "
            f"{found.largest_gap:.3f} nats; at most {limit.gap} is a tie. {found.equal_texts} of {found.prompts} texts "
            f"are equal. Nothing was put in place. Export to another format."
        )
