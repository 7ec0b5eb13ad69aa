"""Two models -> their speed, memory and size, measured in turns."""

from __future__ import annotations

from pathlib import Path

from hf_context_prune.evaluation.bench import bench as measure
from hf_context_prune.evaluation.reports.run_report import RunReport
from hf_context_prune.storage.gguf import explain_gguf_sizes
from hf_context_prune.storage.loading import load_model

_MEMORY_ROUNDS = 3


def bench(
    base: str | Path,
    model: str | Path,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    dtype: str = "auto",
    device: str | None = None,
) -> RunReport:
    """Measure a base and a pruned model in turns: load time, prefill, decoding, peak memory, bytes on disk.

    Args:
        base: What [`load_model`][] reads.
        model: The pruned model.
        new_tokens: Tokens to decode.
        repeats: Rounds of prefill and decoding; models are loaded in fresh processes at most 3 times.
        dtype: Floating-point type to load the weights in.
        device: As for [`load_model`][].

    Returns:
        The report: a table of base, pruned model and their ratio with quartiles.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    first, second = (load_model(place, dtype=dtype, device=device) for place in (base, model))
    found = measure(
        first.model,
        second.model,
        base_folder=first.folder,
        pruned_folder=second.folder,
        new_tokens=new_tokens,
        repeats=repeats,
        memory_repeats=min(repeats, _MEMORY_ROUNDS),
    )
    return found.run_report(first.name, second.name, notes=explain_gguf_sizes(first, second))
