"""What tokens, neurons and KV groups cost, each measured once: enough to spend a budget of any size on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.balance import identify_sources, split_by_source
from hf_context_prune.data.documents import TextSource
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import Curve, ParameterBudget
from hf_context_prune.pruning.allocation.sizes import TOKENS, UnitCurves
from hf_context_prune.pruning.allocation.widths import layer_curves, with_tokens
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner, build_vocabulary_pruner
from hf_context_prune.pruning.vocabulary.selection import VocabularySize, count_tokens
from hf_context_prune.storage.kept_tensors import read_kept_tensors, write_kept_tensors
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import on_main_process

from .depth import Depth
from .measurements import LayerMeasurements
from .planner import Planner

SHARES = (0.5, 0.25, 0.125)
"""Sizes of the vocabulary that are measured, as shares of its rows; the curve is a power law between them."""
_TOO_MUCH = 0.15
"""Loss increase, as a share of the base model's loss, beyond which no smaller vocabulary is measured without need."""
_MOST_SCALE = 3.0
"""Most that a measured loss is scaled by: beyond it, too few tokens decide."""


@dataclass(frozen=True)
class ProbeText:
    """Documents that are withheld from the choice of tokens.

    Attributes:
        withheld: All of them.
        measured: The passages of some of them that the loss is measured on.
        weight: Share of this text in the loss.
        balance_sources: Its sources count equally.
    """

    withheld: TextSource
    measured: TextSource
    weight: float
    balance_sources: bool = False


@dataclass(frozen=True)
class TokenProbe:
    """Text that vocabularies are compared on, and the loss there. The caller measures: pruning knows no evaluation.

    Attributes:
        counted: The calibration text without the probe's documents: tokens are chosen on it.
        loss: Loss of a model with its tokenizer on the probe's documents, in nats per token of the base tokenizer.
        base_loss: The same of the base model.
        texts: The withheld documents of each text.
        general: General text that counts too, without the probe's documents.
    """

    counted: TextSource
    loss: Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]
    base_loss: float
    texts: tuple[ProbeText, ...] = ()
    general: TextSource | None = None

    def against(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenProbe:
        """Return the probe that compares with another model than the base model, and measure that."""
        return replace(self, base_loss=on_main_process(lambda: self.loss(model, tokenizer)))


@dataclass(frozen=True)
class MeasuredUnits:
    """The curves of a model, and what was measured for them that later stages use again.

    Attributes:
        curves: What every kind of unit costs.
        layers: What was measured of the layers; None where they all stay.
        expected: The model's mean probability of each token, [rows] float64; None where nothing is ranked by it.
    """

    curves: UnitCurves
    layers: LayerMeasurements | None
    expected: torch.Tensor | None


def measure_units(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: PrunerConfig,
    probe: TokenProbe | None,
    resume_dir: Path | None = None,
    depth: Depth | None = None,
    *,
    known: MeasuredUnits | None = None,
) -> MeasuredUnits:
    """Measure what the units of a config cost in loss.

    The loss of a vocabulary is measured on documents that its tokens were not counted on, and before the refit of its
    rows, as that of the layers is. A few thousand tokens hold few of the rare ones, so the loss is scaled by how often
    removed tokens occur in all withheld documents (a ratio estimate). The loss of neurons and KV groups is what
    adaptive allocation measures. Negative changes count as zero.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        calibration: Calibration text.
        config: With a budget that is shared.
        probe: Text to compare vocabularies on; None where tokens have no part in the budget.
        resume_dir: Folder where the measured widths are kept, to resume from; None keeps nothing.
        depth: Layers that are removed as a whole, whose parameters count in the budget: neurons and KV groups are
            measured without them. None: none are.
        known: What was measured with all layers: what tokens cost there holds for fewer layers, too.
    """
    shorter = model if depth is None else depth.shorten(model)
    layers: LayerMeasurements | None = None
    measured: Mapping[tuple[int, str], Curve] = {}
    if config.prunes_layers:
        layers = Planner(shorter, calibration.samples(tokenizer), config, resume_dir=resume_dir).measured
        assert layers is not None
        assert layers.curves is not None
        measured = layers.curves
    curves = layer_curves(ModelView.of(shorter), measured, config, base_loss=probe.base_loss if probe else None)
    if not config.searches_tokens or probe is None:
        return MeasuredUnits(curves, layers, None)
    if known is not None:
        tokens, padding = known.curves.curves[TOKENS], known.curves.padding
        return MeasuredUnits(with_tokens(curves, model, tokens, config, padding=padding), layers, known.expected)
    remove = ParameterBudget.of(config, model.num_parameters()).remove_params or 0
    remove -= 0 if depth is None else depth.count_parameters(model)
    missing = remove - curves.most_removable  # what tokens have to give

    pruner = build_vocabulary_pruner(model, tokenizer, probe.counted, config, general=probe.general)
    tokens, expected = on_main_process(lambda: _load_or_measure(pruner, config, probe, missing, resume_dir))
    ranks = config.vocab_criterion == "expected"
    padding = num_rows(model) - len(pruner.table)
    return MeasuredUnits(
        with_tokens(curves, model, tokens, config, padding=padding), layers, expected if ranks else None
    )


def _load_or_measure(
    pruner: VocabularyPruner, config: PrunerConfig, probe: TokenProbe, missing: int, resume_dir: Path | None
) -> tuple[Curve, torch.Tensor]:
    """Return the curve of the tokens and the model's expectation of each, as an earlier run left them or measured."""

    def measure() -> tuple[Curve, torch.Tensor]:
        curve = _measure_tokens(pruner, config, probe, missing)
        return curve, pruner.expected if config.vocab_criterion == "expected" else torch.zeros(0)

    if resume_dir is None:
        return measure()
    texts = [None if text is None else text.fingerprint for text in (probe.counted, probe.general)]
    if pruner.balance_sources:
        texts.append(identify_sources(probe.counted))
    options = config.vocab_criterion, config.pad_to_multiple_of, SHARES
    sampling = sorted(pruner.sampling.items()), pruner.general_share, probe.base_loss, pruner.balance_sources
    key = resume_key(pruner.model, [], "tokens", texts, options, sampling, max(0, missing))
    path = resume_dir / f"tokens-{key[:16]}.safetensors"
    if (kept := read_kept_tensors(path, key, remedy="the vocabularies are measured again")) is not None:
        rows, losses, expected = (kept[0][name] for name in ("rows", "losses", "expected"))
        return tuple(zip(rows.tolist(), losses.tolist(), strict=True)), expected
    curve, expected = measure()
    rows, losses = (torch.tensor(values, dtype=torch.float64) for values in zip(*curve, strict=True))
    tensors = {"rows": rows.long(), "losses": losses, "expected": expected}
    write_kept_tensors(path, tensors, key, what="finished measurement")
    return curve, expected


def _measure_tokens(pruner: VocabularyPruner, config: PrunerConfig, probe: TokenProbe, missing: int) -> Curve:
    """Return (tokens, loss increase in nats per token of the base tokenizer), from all tokens on downwards."""
    rows = num_rows(pruner.model)
    curve = [(rows, 0.0)]
    if len(pruner.table) < rows:  # removing padding costs nothing
        curve.append((len(pruner.table), 0.0))
    withheld = [part for text in probe.texts for part in _count_withheld(pruner.tokenizer, text)]
    measured = [(text.weight, count_tokens(pruner.tokenizer, text.measured).occurrences) for text in probe.texts]
    enough = rows - math.ceil(max(0, missing) / token_cost(pruner.model))
    sizes = list(_sizes(pruner, config, rows))
    with tqdm(total=len(sizes), desc="Measuring vocabularies", unit="size", name="hf_context_prune.vocabulary") as bar:
        for size in sizes:
            trimmed = pruner.trim(VocabularySize(size, pad_to_multiple_of=config.pad_to_multiple_of), refit=False)
            assert trimmed.plan.vocabulary is not None
            excess = probe.loss(trimmed.model, trimmed.tokenizer) - probe.base_loss
            gone = [_removed_share(texts, trimmed.plan.vocabulary.kept) for texts in (withheld, measured)]
            excess *= min(max(gone[0] / gone[1], 1 / _MOST_SCALE), _MOST_SCALE) if all(gone) else 1.0
            bar.update()
            if num_rows(trimmed.model) < curve[-1][0]:
                curve.append((num_rows(trimmed.model), max(0.0, excess)))
            if excess > _TOO_MUCH * probe.base_loss and curve[-1][0] <= enough:
                break
    return tuple(curve)


def _count_withheld(tokenizer: PreTrainedTokenizerBase, text: ProbeText) -> list[tuple[float, Counter[int]]]:
    """Return (weight, token occurrences) of a text's documents, or of each of its sources where they count equally."""
    parts = split_by_source(text.withheld) if text.balance_sources else [text.withheld]
    return [(text.weight / len(parts), count_tokens(tokenizer, part).occurrences) for part in parts]


def _removed_share(texts: Sequence[tuple[float, Counter[int]]], kept: Collection[int]) -> float:
    """Return the share of the token occurrences in texts, (weight, occurrences) each, that is none of the kept."""
    return sum(weight * (1 - sum(counts[index] for index in kept) / counts.total()) for weight, counts in texts)


def _sizes(pruner: VocabularyPruner, config: PrunerConfig, rows: int) -> Iterator[int]:
    """Yield the sizes to measure, largest first: `SHARES` of the rows, and the fewest tokens that may stay."""
    multiple = config.pad_to_multiple_of
    rounded = VocabularySize(pad_to_multiple_of=multiple)
    least, most = pruner.fewest_tokens(multiple), min(len(pruner.table), rows - 1)
    sizes = {rounded.round_up(int(rows * share)) for share in SHARES}
    yield from sorted({size for size in (*sizes, least) if least <= size <= most}, reverse=True)
