"""Models of any size from one base model: tokens go first, then neurons and KV groups, then the rows are refitted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget, removed_params
from hf_context_prune.pruning.allocation.sizes import plain_curves
from hf_context_prune.pruning.allocation.widths import (
    check_units_budget,
    native_groups,
    plan_widths_beside_vocabulary,
)
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel, prune_vocabulary_for
from hf_context_prune.pruning.vocabulary.refit import KnownStates, num_refit_samples, refit_rows_in_all_processes
from hf_context_prune.storage.layer_shards import SHARD_BYTES, LayerShards
from hf_context_prune.utils.distributed import is_main_process
from hf_context_prune.utils.memory import fits_in_memory
from hf_context_prune.utils.version import versions

from .depth import Depth, rest_of_budget
from .planner import Planner
from .surgery import apply_plan
from .unit_curves import MeasuredUnits


class PrunedModel(NamedTuple):
    """A smaller model with its tokenizer and the plan that describes it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan


@dataclass(frozen=True)
class ModelSize:
    """The size of a smaller model.

    Attributes:
        tokens: Tokens that stay.
        widths: Widths, one per layer that stays; None where the layers are measured for it once the tokens are gone.
        predicted: Predicted loss increase, in nats per token of the base tokenizer; None where nothing was measured.
        num_removed: Layers that are removed as a whole, where the budget decides on their number.
    """

    tokens: int
    widths: tuple[LayerWidths, ...] | None
    predicted: float | None = None
    num_removed: int = 0


class ModelBuilder:
    """Builds smaller forms of a model.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        calibration: Calibration text.
        config: All choices.
        facts: For the plan's provenance.
        resume_dir: As for `prune_model`.
        measured: The curves of a budget that is shared; None for any other.
        depth: The layers that are removed as a whole; None: none are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: CalibrationSet,
        config: PrunerConfig,
        facts: dict[str, Any],
        resume_dir: Path | None,
        measured: MeasuredUnits | None,
        depth: Depth | None,
    ) -> None:
        self.model, self.tokenizer, self.calibration, self.config = model, tokenizer, calibration, config
        self.facts, self.resume_dir = facts, resume_dir
        self.total, self.rows = model.num_parameters(), num_rows(model)
        self._trimmed: tuple[int, TrimmedModel] | None = None
        self.remove_layers(depth, measured)
        self.fixed = self.rows  # tokens, where no budget decides on them
        if config.fixes_tokens:
            trimmed = self._trim(None)
            self.fixed = num_rows(trimmed.model)
            self._trimmed = self.fixed, trimmed

    def remove_layers(self, depth: Depth | None, measured: MeasuredUnits | None) -> None:
        """Set the layers that are removed as a whole, and what was measured without them."""
        self.depth, self.measured = depth, measured
        self.shorter = self.model if depth is None else depth.shorten(self.model)
        self.view = ModelView.of(self.shorter)
        native = self.config.shares_budget and self.config.native_architecture is not False
        self.groups = native_groups(self.view) if native else []
        self._planner: tuple[int, Planner] | None = None

    def without(self, depth: Depth, measured: MeasuredUnits) -> ModelBuilder:
        """Return a builder of forms without these layers, too, for which units were measured without them."""
        other = copy.copy(self)
        other.remove_layers(depth, measured)
        return other

    @property
    def base_loss(self) -> float | None:
        """Loss of the base model on the text of the curves; None where it is not known or there are no curves."""
        return None if self.measured is None else self.measured.curves.base_loss

    def predicted(self, config: PrunerConfig) -> float:
        """Return the predicted loss increase of the budget that a config names."""
        return self.size(config)[0].predicted or 0.0

    @property
    def fixed_params(self) -> int:
        """Parameters that go with the tokens that the config fixes, and with whole layers."""
        tokens = (self.rows - self.fixed) * token_cost(self.model)
        return tokens + self.total - self.shorter.num_parameters()

    @property
    def most_removable(self) -> int:
        """Parameters that can be removed at most."""
        if self.measured is not None:
            curves, native = self.measured.curves, bool(self.config.native_architecture)
            return self.fixed_params + (curves.most_removable_native(self.groups) if native else curves.most_removable)
        narrowest = [replace(w, neurons=min(self.config.round_to, w.neurons)) for w in self.view.widths]
        return self.fixed_params + removed_params(self.view.widths, narrowest, self.view.costs)

    def size(self, config: PrunerConfig) -> tuple[ModelSize, dict[str, Any]]:
        """Return the size of the budget that a config names, and facts on the choice.

        Raises:
            BudgetError: It can't be reached.
        """
        if not config.prunes_layers and not config.searches_tokens:
            return ModelSize(self.fixed, self.view.widths), {}
        if self.measured is not None:
            curves, remove = self.measured.curves, ParameterBudget.of(config, self.total).remove_params or 0
            if config.fixes_tokens:
                check_units_budget(self.shorter, self._for_layers(config), self.fixed)
            remove = max(0, remove - self.fixed_params)
            found, facts = curves.choose(remove, config.native_architecture, self.groups)
            tokens = self.fixed if config.fixes_tokens else found.tokens
            return ModelSize(tokens, found.widths, found.loss), {"predicted_losses": facts}
        config = self._for_layers(config)
        check_units_budget(self.shorter, config, self.fixed)
        if config.allocation == "adaptive":
            return ModelSize(self.fixed, None), {}
        return ModelSize(self.fixed, plan_widths_beside_vocabulary(self.shorter, config, self.fixed)), {}

    def _for_layers(self, config: PrunerConfig) -> PrunerConfig:
        """Return the config for what is left of its budget once whole layers are gone."""
        return config if self.depth is None else rest_of_budget(config, self.model, self.depth)

    def build(self, size: ModelSize, chosen: Mapping[str, Any], *, to_files: bool = False) -> PrunedModel:
        """Build the model of a size: remove tokens, then neurons and KV groups, then refit the rows of the head.

        Args:
            size: The size.
            chosen: Facts on its choice.
            to_files: Hold the layers of a large model in files of the resume folder, which the saved model links to.
                Else files without a name hold them, where they don't fit into memory.
        """
        trimmed = self._trimmed_to(size.tokens)
        model, tokenizer = (self.model, self.tokenizer) if trimmed is None else (trimmed.model, trimmed.tokenizer)
        facts = {**self.facts, **chosen, **({} if trimmed is None else trimmed.plan.provenance)}
        if self.depth is not None:
            facts["removed_layers"] = self.depth.facts(self.model)
        states, reconstruct = None, None
        if trimmed is not None and self.depth is None and size.widths == self.view.widths:
            layers = PruningPlan.identity(model.config.model_type, self.view.geometry, fingerprint(model))
            plan = vocabulary_only_plan(trimmed, facts, self.config)
        else:
            planner = self._planner_for(size.tokens, model, tokenizer)
            plan, reconstruct, states = planner.plan(self._rest_of_budget(model), size.widths)
            layers = plan
        shards = self._open_shards(model, layers, self.resume_dir if to_files else None)
        smaller = apply_plan(
            model, layers, reconstruct=reconstruct, keep=None if shards is None else shards.keep
        ).eval()
        if shards is not None:
            shards.belong_to(smaller)
        added: dict[str, Any] = {"config": self.config.to_dict()}
        if self.measured is not None:
            added["sensitivity"] = plain_curves(
                self.measured.curves.curves, None if self.depth is None else self.depth.kept
            )
            added["predicted_loss_increase"] = size.predicted
        if self.config.refit_lm_head or (self.config.refits_lm_head and smaller.num_parameters() < self.total):
            added["refit"] = self._refit(smaller, tokenizer, states)
        plan = replace(
            plan,
            vocabulary=None if trimmed is None else trimmed.plan.vocabulary,
            model_fingerprint=fingerprint(self.model),
            provenance={**facts, **plan.provenance, **added},
        )
        return PrunedModel(smaller, tokenizer, plan)

    def _open_shards(self, model: PreTrainedModel, plan: PruningPlan, folder: Path | None) -> LayerShards | None:
        """Return the files where the layers of a large model go; None: into memory, or where the model lies."""
        if model.device.type != "cpu":
            return None
        whole = 0 if self.depth is None else self.depth.count_parameters(model)
        dense = [plan.dense[index] for index in plan.kept_layers]
        removed = whole + removed_params(dense, plan.kept_widths, self.view.costs)
        size = model.dtype.itemsize * (model.num_parameters() - removed)
        if folder is not None and is_main_process() and size > SHARD_BYTES:
            return LayerShards(folder)
        return None if fits_in_memory(size) else LayerShards(None)

    def _trim(self, tokens: int | None) -> TrimmedModel:
        """Return the model with fewer tokens: as many, or as many as the config says."""
        expected = None if self.measured is None else self.measured.expected
        general = self.calibration.general
        return prune_vocabulary_for(
            self.model,
            self.tokenizer,
            self.calibration.domain,
            self.config,
            tokens,
            general=general,
            expected=expected,
        )

    def _trimmed_to(self, tokens: int) -> TrimmedModel | None:
        """Return the model with so many tokens, the last one again where it has as many; None where all stay."""
        if tokens == self.rows and not self.config.fixes_tokens:
            return None
        if self._trimmed is None or self._trimmed[0] != tokens:
            self._trimmed = tokens, self._trim(None if self.config.fixes_tokens else tokens)
        return self._trimmed[1]

    def _planner_for(self, tokens: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Planner:
        """Return the planner of a model with so many tokens, the last one again where it has as many."""
        if self._planner is None or self._planner[0] != tokens:
            self._planner = None  # frees its statistics
            layers = None if self.measured is None else self.measured.layers
            samples = self.calibration.samples(tokenizer)
            self._planner = (
                tokens,
                Planner(model, samples, self.config, resume_dir=self.resume_dir, measured=layers, depth=self.depth),
            )
        return self._planner[1]

    def _rest_of_budget(self, trimmed: PreTrainedModel) -> PrunerConfig:
        """Return the config for what the layers of a model with fewer tokens have to give."""
        remove = ParameterBudget.of(self.config, self.total).remove_params
        if remove is None:
            return self.config
        gone = 0 if self.depth is None else self.depth.count_parameters(trimmed)
        left = min(self.total - remove, trimmed.num_parameters() - gone)
        return replace(self.config, pruning_ratio=None, target_params=left)

    def _refit(
        self, smaller: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, states: torch.Tensor | None
    ) -> dict[str, float] | None:
        count = num_refit_samples(smaller, self.config.num_calibration_samples, self.config.max_seq_length)
        known = None if states is None else KnownStates(self.calibration.samples(tokenizer), states)
        return refit_rows_in_all_processes(smaller, self.calibration.samples(tokenizer, count), known)


def vocabulary_only_plan(trimmed: TrimmedModel, facts: Mapping[str, Any], config: CalibrationConfig) -> PruningPlan:
    """Return the plan of a run that removes tokens alone.

    Args:
        trimmed: The model without the other tokens.
        facts: Go into its provenance.
        config: All choices.
    """
    counted = trimmed.plan.provenance["vocabulary"]["tokens_counted"]
    own = {"config": config.to_dict(), "num_calibration_tokens": counted, "versions": versions()}
    return replace(trimmed.plan, provenance={**facts, **own})
