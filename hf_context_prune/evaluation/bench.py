"""Benchmark of a pruned model beside its base: load time, prefill, decoding, memory and disk, measured in turns."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.reports.formatting import format_speedup
from hf_context_prune.evaluation.reports.report import Environment
from hf_context_prune.evaluation.reports.run_report import ReportTable, RunReport
from hf_context_prune.storage.saving import count_weight_bytes

from .speed import MemoryMeasurement, SpeedMeasurement, measure_peak_memory, measure_speed, speed_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (128, 512, 2048)
BATCHES = (1, 4)


@dataclass(frozen=True)
class Pair:
    """One setting, measured on both models in turns."""

    base: SpeedMeasurement
    pruned: SpeedMeasurement


@dataclass(frozen=True)
class Bench:
    """All measurements of two models.

    Attributes:
        prefill: One measurement per length of the prompt.
        decode: One measurement per batch size.
        base_memory: Fresh processes that load and use the base; empty where the base has no folder.
        pruned_memory: The same for the pruned model.
        base_bytes: Bytes of the safetensors files; None without a folder.
        pruned_bytes: The same for the pruned model.
    """

    prefill: tuple[Pair, ...]
    decode: tuple[Pair, ...]
    base_memory: tuple[MemoryMeasurement, ...]
    pruned_memory: tuple[MemoryMeasurement, ...]
    base_bytes: int | None
    pruned_bytes: int | None

    def table_rows(self) -> list[tuple[str, ...]]:
        """Return (measure, base, pruned, pruned / base with quartiles) for every measurement."""
        rows = [
            *(_speed_row(f"prefill, {p.base.prompt_tokens} tokens (tokens/s)", p, "prefill") for p in self.prefill),
            *(_speed_row(f"decode, batch {p.base.batch_size} (tokens/s)", p, "decode") for p in self.decode),
        ]
        if self.base_memory or self.pruned_memory:
            rows.append(self._memory_row("load time (s)", "load_seconds", 1.0, ".2f"))
            rows.append(self._memory_row("peak RSS (MB)", "peak_rss", 1e-6, ",.0f"))
        if self.base_bytes or self.pruned_bytes:
            sizes = ["-" if size is None else f"{size / 1e6:,.1f}" for size in (self.base_bytes, self.pruned_bytes)]
            ratio = f"x{self.pruned_bytes / self.base_bytes:.2f}" if self.base_bytes and self.pruned_bytes else ""
            rows.append(("weights on disk (MB)", *sizes, ratio))
        return rows

    def _memory_row(self, label: str, name: str, scale: float, pattern: str) -> tuple[str, ...]:
        values = [[scale * getattr(one, name) for one in rounds] for rounds in (self.base_memory, self.pruned_memory)]
        cells = [format(statistics.median(some), pattern) if some else "-" for some in values]
        ratio = ""
        if all(values):
            ratios = [pruned / base for base, pruned in zip(*values, strict=True)]
            ratio = f"x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        return label, *cells, ratio

    def run_report(self, base: str, pruned: str, *, notes: tuple[str, ...] = ()) -> RunReport:
        """Return all measurements as a report.

        Args:
            base: Name of the base.
            pruned: Name of the pruned model.
            notes: Sentences that a reader of the figures must know.
        """
        header = ("measure", "base", "pruned", "pruned / base")
        table = ReportTable(
            f"{pruned} beside {base}, in turns", header, tuple(self.table_rows()), " ".join([self.caption(), *notes])
        )
        title = f"Speed of {pruned} beside {base}"
        environment = Environment.current((self.prefill or self.decode)[0].pruned.dtype)
        return RunReport("bench", base, title, (table,), {"pruned": pruned, **dataclasses.asdict(self)}, environment)

    def caption(self) -> str:
        """Return a sentence on machine, threads, dtypes and rounds."""
        one = (self.prefill or self.decode)[0]
        dtypes = " and ".join(dict.fromkeys((one.base.dtype, one.pruned.dtype)))
        rounds = len(one.base.prefill_rounds)
        return (
            f"{one.base.hardware} ({one.base.device}), {one.base.threads} threads, {dtypes}; base and pruned in turns, "
            f"medians of {rounds} rounds, ratios round by round with quartiles (memory: range)."
        )


def _speed_row(label: str, pair: Pair, name: str) -> tuple[str, ...]:
    medians = [getattr(one, name).median for one in (pair.base, pair.pruned)]
    ratio = getattr(speed_ratio(pair.base, pair.pruned), name)
    return label, *(f"{median:,.1f}" for median in medians), format_speedup(ratio)


def bench(
    base: "PreTrainedModel",
    pruned: "PreTrainedModel",
    *,
    base_folder: Path | None = None,
    pruned_folder: Path | None = None,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
    new_tokens: int = 32,
    repeats: int = 5,
    memory_repeats: int = 3,
) -> Bench:
    """Measure two models in turns.

    Args:
        base: The base, on the device of `pruned`.
        pruned: The pruned model.
        base_folder: Folder of the base, for load time, memory and disk; None leaves these out.
        pruned_folder: The same for the pruned model.
        prompts: Lengths of the prompts, cut to the models' positions; lengths that then are equal count once.
        batches: Batch sizes of the decoding, after 128 tokens each.
        new_tokens: Decode steps.
        repeats: Rounds of prefill and decoding.
        memory_repeats: Fresh processes per model.

    Raises:
        ConfigError: The models are on different devices, or a number is below 1.
    """
    if base.device.type != pruned.device.type:
        raise ConfigError(
            f"The base is on {base.device}, the pruned model on {pruned.device}; load both on the same device."
        )
    models = {"base": base, "pruned": pruned}
    prefill: dict[int, Pair] = {}
    for length in prompts:
        found = measure_speed(models, prompt_tokens=length, new_tokens=1, repeats=repeats)
        prefill[found["base"].prompt_tokens] = Pair(found["base"], found["pruned"])
    decode = []
    for size in batches:
        found = measure_speed(models, prompt_tokens=128, new_tokens=new_tokens, repeats=repeats, batch_size=size)
        decode.append(Pair(found["base"], found["pruned"]))
    folders = {"base": base_folder, "pruned": pruned_folder}
    memory: dict[str, list[MemoryMeasurement]] = {name: [] for name in folders}
    if memory_repeats and (first := base_folder or pruned_folder) is not None:
        measure_peak_memory(first)  # the first process is slower: the disk cache does not hold the libraries yet
    for turn in range(memory_repeats):
        for name in list(folders) if turn % 2 == 0 else reversed(list(folders)):
            folder = folders[name]
            if folder is not None:
                memory[name].append(measure_peak_memory(folder))
    sizes = [None if folder is None else count_weight_bytes(folder) for folder in folders.values()]
    return Bench(tuple(prefill.values()), tuple(decode), tuple(memory["base"]), tuple(memory["pruned"]), *sizes)
