"""The paper's grid of thresholds on one domain: what can be removed, what is only zeroed, and what it costs."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import ThresholdConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.evaluation.options import MAX_TEST_TOKENS, QuestionOptions
from hf_context_prune.evaluation.reports.files import check_report_folder, write_run
from hf_context_prune.evaluation.reports.report import Environment
from hf_context_prune.evaluation.scores import ROW_LAYOUT, HeldOut, Scores, choose_held_out, score
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.modeling.plan import fingerprint
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.thresholds.magnitudes import Magnitudes, measure_sample_magnitudes
from hf_context_prune.pruning.thresholds.prune import count_zeros_of_paper, prune_below_thresholds
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel, prune_vocabulary_for
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded
from hf_context_prune.storage.results_log import open_results_log
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import recover
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.version import __version__

from .sweep_report import Sweep, SweepRow, Thresholds, format_threshold

GRID: tuple[float | None, ...] = (1e-5, 1e-3, 1e-1)
"""The paper's thresholds for linear layers, and for activations."""
ROWS_NAME = "sweep.jsonl"


@dataclass(frozen=True)
class SweepOptions:
    """Which thresholds, and how the results are measured.

    Attributes:
        linear: Of linear layers; None: off.
        activation: Of activations.
        embedding: Of the embedding.
        recovery: Training after the pruning; None: none.
        num_calibration_samples: Blocks of calibration text.
        max_seq_length: Tokens a block, and a window of held-out text.
        max_tokens: Largest number of held-out tokens, in passages of many documents.
        seed: Of everything random.
    """

    linear: tuple[float | None, ...] = GRID
    activation: tuple[float | None, ...] = GRID
    embedding: tuple[float | None, ...] = (None, 0.0)
    recovery: RecoveryConfig | None = None
    num_calibration_samples: int = 128
    max_seq_length: int = 512
    max_tokens: int | None = MAX_TEST_TOKENS
    seed: int = 0

    @property
    def points(self) -> list[Thresholds]:
        """Points of the grid, without the one where nothing is pruned."""
        grid = itertools.product(self.linear, self.activation, self.embedding)
        return [point for point in grid if any(threshold is not None for threshold in point)]

    def configs(self) -> list[ThresholdConfig]:
        """Return the config of every point.

        Raises:
            ConfigError: There is no point, or a threshold is out of range or given twice.
        """
        if not self.points:
            raise ConfigError("Every threshold of the grid is off, so nothing would be pruned. Give one or more.")
        for name in ("linear", "activation", "embedding"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"{name} is {', '.join(map(format_threshold, given))}; give each threshold once.")
        return [
            ThresholdConfig(
                linear_threshold=linear,
                activation_threshold=activation,
                embedding_threshold=embedding,
                num_calibration_samples=self.num_calibration_samples,
                max_seq_length=self.max_seq_length,
                pruning_seed=self.seed,
            )
            for linear, activation, embedding in self.points
        ]


@reserves("output")
def sweep(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    output: str | Path,
    options: SweepOptions | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    eval_data: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    questions: QuestionOptions | None = None,
) -> Sweep:
    """Run the grid, and write the results to a folder; a run that was killed resumes from there.

    Writes ``eval_report.json``, ``sweep.md`` with its picture, and ``sweep.jsonl``.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        data: Text of the domain.
        output: Folder of the rows and the table.
        options: Which thresholds, and how the results are measured.
        tokenizer: As for [`prune`][].
        eval_data: Test text; None holds out a tenth of `data`, by document.
        text_column: Column with the text.
        questions: Multiple-choice questions, if any.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`. Rows that were finished stay.
    """
    options, folder = options or SweepOptions(), resolve_path(output, SaveError)
    points, configs = options.points, options.configs()
    check_report_folder(folder, "sweep")
    base = ensure_loaded(model, tokenizer)
    for config in {config.embedding_threshold: config for config in configs}.values():
        check_budget(base.model, base.tokenizer, config)
    split = TextSplit.of(data, eval_data, tokenizer=base.tokenizer, text_column=text_column, seed=options.seed)
    text = split.calibration
    held_out = choose_held_out(
        split.test,
        base.tokenizer,
        max_tokens=options.max_tokens,
        max_seq_length=options.max_seq_length,
        questions=questions,
    )
    setting = {
        "version": __version__,
        "row_layout": ROW_LAYOUT,
        "model": [base.name, fingerprint(base.model), str(base.model.dtype)],
        "data": text.fingerprint,
        "held_out": held_out.setting(),
        "recovery": None if options.recovery is None else options.recovery.to_dict(),
        **{name: getattr(options, name) for name in ("num_calibration_samples", "max_seq_length", "seed")},
    }
    with open_results_log(folder / ROWS_NAME, setting) as rows:
        dense = rows.get_or_measure(["base"], lambda: score(base.model, base.tokenizer, held_out).to_row(held_out))
        measured, seen, pruner = [], dict[str, dict[str, Any]](), _Pruner(base, text)
        grid = tqdm(configs, desc="Grid", unit="point", name="hf_context_prune.sweep")
        for point, config in zip(points, grid, strict=True):
            row = rows.get_or_measure(list(point), lambda c=config: _measure(pruner, held_out, c, options, seen))  # type: ignore[misc]
            seen.setdefault(row["weights"], row)
            tuned = None if row["tuned"] is None else Scores.from_row(row["tuned"], held_out)
            pruned = Scores.from_row(row["pruned"], held_out)
            measured.append(SweepRow(point, row["zeroed"], row["zeros"], pruned, tuned))
        found = Scores.from_row(dense, held_out)
        result = Sweep(base.name, split.how, held_out, found, tuple(measured), options.seed)
        environment = Environment.current(dtype_name(base.model))
        write_run(result.run_report(environment), folder)
    return result


class _Pruner:
    """The base model with its text. What several points share is measured once, when it is first needed."""

    def __init__(self, base: LoadedModel, text: TextSource) -> None:
        self.base, self.text = base, text
        self._magnitudes: Magnitudes | None = None
        self._trimmed: dict[float | None, TrimmedModel | None] = {None: None}

    def prune(self, config: ThresholdConfig) -> PrunedModel:
        """Prune at a point of the grid."""
        whole, calibration = (self.base.model, self.base.tokenizer), CalibrationSet(self.text, config)
        if not config.prunes_layers:
            return prune_model(*whole, calibration, config)
        if self._magnitudes is None:
            self._magnitudes = measure_sample_magnitudes(self.base.model, calibration.samples(self.base.tokenizer))
        threshold = config.embedding_threshold
        if threshold not in self._trimmed:
            self._trimmed[threshold] = prune_vocabulary_for(*whole, self.text, config)
        return PrunedModel(*prune_below_thresholds(*whole, config, self._magnitudes, self._trimmed[threshold]))

    def zeros_of_paper(self, config: ThresholdConfig) -> int:
        """Return how many parameters the paper's code zeroes at a point that was pruned."""
        threshold, dense = config.embedding_threshold, self.base.model
        if threshold not in self._trimmed:
            self._trimmed[threshold] = prune_vocabulary_for(dense, self.base.tokenizer, self.text, config)
        trimmed, magnitudes = self._trimmed[threshold], self._magnitudes if config.prunes_layers else None
        return count_zeros_of_paper(dense, magnitudes, config, trimmed.zeroed_by_paper if trimmed else ())


def _measure(
    pruner: _Pruner,
    held_out: HeldOut,
    config: ThresholdConfig,
    options: SweepOptions,
    seen: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Prune at one point and score the model; weights that an earlier point left are not scored again."""
    base = pruner.base
    smaller, tokenizer, plan = pruner.prune(config)
    dense = base.model.num_parameters()
    counts = plan.provenance.get("zeroed", {"zeroed_not_removed": 0})
    weights = _digest(smaller)
    facts = {
        "weights": weights,
        "zeroed": counts["zeroed_not_removed"] / dense,
        "zeros": pruner.zeros_of_paper(config) / dense,
    }
    if weights in seen:
        return {**facts, "pruned": seen[weights]["pruned"], "tuned": seen[weights]["tuned"]}
    tuned = None
    pruned = score(smaller, tokenizer, held_out).to_row(held_out)
    if options.recovery is not None:
        result = recover(smaller, pruner.text, options.recovery, tokenizer=tokenizer)
        tuned = score(result.model, tokenizer, held_out).to_row(held_out)
    return {**facts, "pruned": pruned, "tuned": tuned}


def _digest(model: PreTrainedModel) -> str:
    """Return the sha256 of all weights, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sha.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()
