"""Experts that are removed from every layer, and neurons inside those that stay: how many, which, and what is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.expert_neurons import ExpertNeurons, inner_widths, narrow_config
from hf_context_prune.modeling.experts import experts_spec, num_groups, why_not_kept
from hf_context_prune.modeling.native_fit import build_empty_model
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.tying import config_as_tied
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.uniform import keep_neurons
from hf_context_prune.pruning.calibration.routing import measure_routing
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.storage.kept_tensors import read_kept_tensors, write_kept_tensors
from hf_context_prune.storage.layer_shards import LayerShards
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import is_main_process
from hf_context_prune.utils.expert_options import EXPERT_SIZES
from hf_context_prune.utils.memory import fits_in_memory

from .expert_criteria import ExpertStatistics, get_expert_criterion
from .sequential.expert_repair import ExpertWidths
from .sequential.experts import LayerOfExperts, repair_experts
from .surgery import KeepFn, apply_plan

_ALIGNED = 8  # neurons of an expert: PyTorch multiplies experts together where a row has a multiple of 16 bytes
_REPAIRING = ("least_squares", "sequential")  # with these, what stays is refitted
_SUMS = ("routed", "added", "squared")


def count_experts(model: PreTrainedModel, config: PrunerConfig) -> int:
    """Return how many experts a config leaves every layer that has them, from shapes alone.

    Args:
        model: The base model; its weights may be on the meta device.
        config: With `num_experts` or `experts_ratio`; of one without, all stay.

    Raises:
        BudgetError: No expert would go, or more than may; the message has what is allowed.
        UnsupportedArchitectureError: The model has no experts.
    """
    view = ModelView.of_shapes(model)
    if not config.removes_experts:
        return max(widths.experts for widths in view.widths)
    name = "num_experts" if config.num_experts is not None else "experts_ratio"
    asked = f"{name} is {getattr(config, name)}"
    experts = experts_spec(view.spec, asked)
    totals = {widths.experts for widths in view.widths if widths.experts}
    if len(totals) != 1:
        have = f"from {min(totals)} to {max(totals)} of them" if totals else "none"
        raise BudgetError(
            f"{asked}, but the layers of this model have {have}. As many experts are removed from every layer, so all "
            f"must have the same number; a plan of your own (apply_plan) may say which stay in which layer."
        )
    total, groups = totals.pop(), num_groups(model.config, experts)
    if config.num_experts is not None:
        kept = config.num_experts
    else:
        assert config.experts_ratio is not None
        kept = total - int(total * config.experts_ratio + 0.5 + 1e-9) // groups * groups
    if kept >= total:
        least = math.ceil(1e3 * (groups - 0.5) / total) / 1e3
        raise BudgetError(
            f"{asked}, but every layer has {total} experts, so none would be removed. "
            + (f"Ask for at least {least}" if config.num_experts is None else "Ask for fewer")
            + (f", a multiple of {groups}." if groups > 1 and config.num_experts is not None else ".")
        )
    sizes = [kept // groups + (group < kept % groups) for group in range(groups)]
    spread = [group * (total // groups) + index for group, size in enumerate(sizes) for index in range(size)]
    if (why := why_not_kept(model.config, experts, spread, total)) is not None:
        raise BudgetError(f"{asked}: {why}")
    return kept


@contextmanager
def name_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let a refused budget of a mixture say that experts can give more.

    Args:
        model: The model; its weights may be on the meta device.
    """
    try:
        yield
    except BudgetError as error:
        if not any(widths.experts for widths in ModelView.of_shapes(model).widths):
            raise
        raise BudgetError(
            f"{error} Most parameters of this model are in its experts: ask for fewer of them (experts_ratio), or for "
            f"fewer neurons inside (expert_neurons_ratio)."
        ) from error


def count_neurons(model: PreTrainedModel, config: PrunerConfig) -> tuple[int, int]:
    """Return how many neurons a config leaves every expert, and a shared expert (0: there is none), from shapes alone.

    Args:
        model: The base model; its weights may be on the meta device.
        config: With `expert_neurons_ratio` or `shared_expert_ratio`; of one without, all stay.

    Raises:
        BudgetError: No neuron would go, or the config of the model can't hold the widths.
        UnsupportedArchitectureError: The model has no experts.
    """
    view = ModelView.of_shapes(model)
    ratios = {name: getattr(config, name) for name in ("expert_neurons_ratio", "shared_expert_ratio")}
    name, ratio = next((pair for pair in ratios.items() if pair[1]), ("", 0.0))
    experts = experts_spec(view.spec, f"{name} is {ratio}")
    if not any(widths.experts for widths in view.widths):
        raise BudgetError(f"{name} is {ratio}, but no layer of this model has experts. Leave {name} out.")
    width, shared = inner_widths(model.config, experts)
    multiple = math.lcm(_ALIGNED, config.round_to)
    kept = keep_neurons(width, config.expert_neurons_ratio or 0, multiple)
    kept_shared = shared if experts.shared_width is not None or not shared else kept * (shared // width)
    if (own := config.shared_expert_ratio) and experts.shared_width is None:
        raise BudgetError(
            f"shared_expert_ratio is {own}, but "
            + (
                f"the config of this model has one width for its experts and the shared one ({experts.width}), so "
                f"expert_neurons_ratio narrows both. Use that alone."
                if shared
                else f"a {view.spec.model_type} model has no shared experts. Leave it out."
            )
        )
    if own:
        kept_shared = keep_neurons(shared, own, config.round_to)
    for name, asked, stay, total, least in (
        ("expert_neurons_ratio", config.expert_neurons_ratio, kept, width, multiple),
        ("shared_expert_ratio", own, kept_shared, shared, config.round_to),
    ):
        if asked and stay == total:
            raise BudgetError(
                f"{name} is {asked}, which removes no neuron: there are {total}, and a multiple of {least} stays. Ask "
                f"for more."
            )
    return kept, kept_shared


@dataclass(frozen=True)
class ExpertChoice:
    """The experts that every layer keeps, and their neurons.

    Attributes:
        kept: Numbers of the kept experts, ascending, by the number of the layer.
        facts: How they were chosen, for a plan's provenance.
        neurons: The neurons that stay inside them, for a plan of the base model; None: all do.
        gone: Parameters that every layer loses.
    """

    kept: Mapping[int, tuple[int, ...]]
    facts: Mapping[str, Any]
    neurons: ExpertNeurons | None = None
    gone: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def all_of(cls, model: PreTrainedModel) -> ExpertChoice:
        """Keep all experts."""
        widths = ModelView.of_shapes(model).widths
        return cls({index: tuple(range(one.experts)) for index, one in enumerate(widths) if one.experts}, {})

    def narrowed(self, model: PreTrainedModel, done: Mapping[int, LayerOfExperts]) -> ExpertChoice:
        """Return the same experts with the neurons that stay inside them.

        Args:
            model: The base model.
            done: What became of every layer with experts.
        """
        view = ModelView.of_shapes(model)
        dense, shared = inner_widths(model.config, experts_spec(view.spec))
        layers = range(len(view.widths))
        inside = tuple(done[index].neurons if index in done else () for index in layers)
        in_shared = tuple(done[index].shared if index in done else () for index in layers)
        neurons = ExpertNeurons(dense, inside if any(inside) else (), shared, in_shared if any(in_shared) else ())
        facts = {"neurons": [neurons.width, dense], "shared_neurons": [neurons.shared_width, shared]}
        return replace(self, neurons=neurons, facts={**self.facts, **facts})

    def plan(self, model: PreTrainedModel) -> PruningPlan:
        """Return the plan that removes the other experts and nothing else."""
        view = ModelView.of_shapes(model)
        whole = PruningPlan.identity(view.spec.model_type, view.geometry)
        layers = tuple(
            replace(layer, experts=self.kept.get(index, layer.experts)) for index, layer in enumerate(whole.layers)
        )
        return replace(whole, layers=layers)

    def in_base(self, model: PreTrainedModel, plan: PruningPlan, config: PrunerConfig) -> PruningPlan:
        """Return a plan for the model without the other experts as one for the base model.

        Args:
            model: The base model.
            plan: A plan for the model that keeps these experts.
            config: The config of the whole run.
        """
        view = ModelView.of_shapes(model)

        def with_experts(index: int, layer: LayerPlan) -> LayerPlan:
            kept = self.kept.get(index, ())
            return replace(layer, experts=tuple(kept[expert] for expert in layer.experts))

        provenance = {**plan.provenance, "config": config.to_dict(), "experts": dict(self.facts)}
        if (gone := provenance.get("removed_layers")) is not None:  # their parameters in the base model
            more = sum(self.gone.get(index, 0) for index in plan.removed_layers)
            provenance["removed_layers"] = {**gone, "parameters": gone["parameters"] + more}
        return replace(
            plan,
            expert_neurons=None if self.neurons is None else self.neurons.without(plan.removed_layers),
            dense=view.widths,
            layers=tuple(with_experts(index, layer) for index, layer in enumerate(plan.layers)),
            model_fingerprint=fingerprint(model),
            provenance=provenance,
        )


def choose_experts(
    model: PreTrainedModel, samples: torch.Tensor, config: PrunerConfig, *, state_dir: Path | None = None
) -> ExpertChoice:
    """Choose the experts that every layer keeps, by the criterion of a config; of groups, each keeps as many.

    Args:
        model: The base model.
        samples: Calibration samples, [samples, length], int64.
        config: With `num_experts` or `experts_ratio`, and `expert_criterion`.
        state_dir: Where the finished measurement is kept, to resume from; None keeps nothing.

    Raises:
        BudgetError: See [`count_experts`][].
        ContextPruneError: See [`measure_routing`][].
    """
    count, view = count_experts(model, config), ModelView.of(model)
    criterion = get_expert_criterion(config.expert_criterion)
    groups = num_groups(model.config, experts_spec(view.spec))
    kept, routed = {}, {}
    for index, statistics in _measure_or_load(model, samples, state_dir).items():
        scores = criterion(statistics).view(groups, -1)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : count // groups].sort(dim=1).values
        chosen = (best + torch.arange(groups)[:, None] * scores.shape[1]).flatten()
        kept[index] = tuple(chosen.tolist())
        routed[index] = float(statistics.routed[chosen].sum() / statistics.routed.sum())
    facts = {
        "kept": count,
        "of": view.widths[min(kept)].experts,
        "criterion": config.expert_criterion,
        "routed_share": {str(index): float(f"{share:.4g}") for index, share in routed.items()},
    }
    return ExpertChoice(kept, facts)


def _measure_or_load(
    model: PreTrainedModel, samples: torch.Tensor, state_dir: Path | None
) -> dict[int, ExpertStatistics]:
    batches = batches_of(samples)
    if state_dir is None:
        return measure_routing(model, batches)
    key = resume_key(model, batches, "routing")
    path = state_dir / f"experts-{key[:16]}.safetensors"
    if (known := read_kept_tensors(path, key, remedy="the experts are measured again")) is not None:
        layers = sorted({int(name.partition(".")[0]) for name in known[0]})
        sums = {index: [known[0][f"{index}.{name}"] for name in _SUMS] for index in layers}
        return {index: ExpertStatistics(int(known[0][f"{index}.tokens"]), *sums[index]) for index in layers}
    found = measure_routing(model, batches)
    if is_main_process():
        tensors = {f"{index}.{name}": getattr(one, name) for index, one in found.items() for name in _SUMS}
        counts = {f"{index}.tokens": torch.tensor(one.num_tokens) for index, one in found.items()}
        write_kept_tensors(path, tensors | counts, key, what="finished measurement")
    return found


def remove_experts(
    model: PreTrainedModel, samples: torch.Tensor, config: PrunerConfig, resume_dir: Path | None
) -> tuple[ExpertChoice, PreTrainedModel, PrunerConfig]:
    """Choose the experts and their neurons that stay, remove the others, and refit what stays if the config says so.

    Args:
        model: The base model; unchanged.
        samples: Calibration samples.
        config: One that prunes experts.
        resume_dir: As for [`choose_experts`][]; finished layers of the refit are kept there, too.

    Returns:
        (the choice, the model without the others, which shares all other tensors, the config for what is left).
    """
    choice, widths = ExpertChoice.all_of(model), _widths(model, config)
    if config.removes_experts:
        choice = choose_experts(model, samples, config, state_dir=resume_dir)
    keep = _keep_outside_memory(model, choice)
    fewer = apply_plan(model, choice.plan(model), share=True, keep=keep)
    if repairs(config):
        done = repair_experts(model, fewer, choice.kept, batches_of(samples), widths, state_dir=resume_dir)
        if config.narrows_experts:
            choice = choice.narrowed(model, done)
            whole = PruningPlan.identity(fewer.config.model_type, ModelView.of(fewer).geometry)
            fewer = apply_plan(fewer, replace(whole, expert_neurons=choice.neurons), share=True, keep=keep)
        if widths.refits:
            left = {str(index): None if one.left is None else float(f"{one.left:.4g}") for index, one in done.items()}
            choice = replace(choice, facts={**choice.facts, "error_left": left})
    before, after = (ModelView.of_shapes(one).layers for one in (model, fewer))
    gone = {index: _size(one) - _size(other) for index, (one, other) in enumerate(zip(before, after, strict=True))}
    return replace(choice, gone=gone), fewer, rest_of_experts_budget(config, model, fewer)


def repairs(config: PrunerConfig) -> bool:
    """Return whether a config that prunes experts goes through the layers once more: to refit, or to choose neurons."""
    return config.reconstruction in _REPAIRING or config.narrows_experts


def _widths(model: PreTrainedModel, config: PrunerConfig) -> ExpertWidths:
    refits = config.reconstruction in _REPAIRING
    if not config.narrows_experts:
        return ExpertWidths(refits=refits)
    kept, dense = count_neurons(model, config), inner_widths(model.config, experts_spec(ModelView.of(model).spec))
    neurons, shared = (None if one == other else one for one, other in zip(kept, dense, strict=True))
    return ExpertWidths(neurons, shared, config.ridge, refits)


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _keep_outside_memory(model: PreTrainedModel, choice: ExpertChoice) -> KeepFn | None:
    """Return what lays layers into files without a name, where the experts that stay do not fit into memory."""
    view = ModelView.of_shapes(model)
    size = model.dtype.itemsize * view.costs["experts"] * sum(map(len, choice.kept.values()))
    return None if model.device.type != "cpu" or fits_in_memory(size) else LayerShards(None).keep


def without_experts_shape(model: PreTrainedModel, config: PrunerConfig) -> PreTrainedModel:
    """Return the model that a config leaves once experts are gone, on the meta device, before it is known which."""
    count, view, as_tied = count_experts(model, config), ModelView.of_shapes(model), config_as_tied(model)
    widths = [replace(one, experts=min(one.experts, count)) for one in view.widths]
    if config.narrows_experts:
        inside = count_neurons(model, config)
        as_tied = narrow_config(as_tied, experts_spec(view.spec), inside)
    return build_empty_model(as_tied, view.spec, widths)


def rest_of_experts_budget(config: PrunerConfig, model: PreTrainedModel, fewer: PreTrainedModel) -> PrunerConfig:
    """Return the config for the model without the removed experts: what they leave of a budget for all parameters.

    Args:
        config: The config for the whole model.
        model: The whole model; its weights may be on the meta device.
        fewer: The model without these experts.
    """
    changes: dict[str, Any] = dict.fromkeys(EXPERT_SIZES)
    total, left = model.num_parameters(), fewer.num_parameters()
    remove = ParameterBudget.of(config, total).remove_params
    if remove is not None and left > total - remove:
        changes |= {"pruning_ratio": None, "target_params": total - remove}
    elif remove is not None:  # experts gave it all
        changes |= {"pruning_ratio": 0.0, "target_params": None, "units": None, "allocation": "uniform"}
    elif not (config.prunes_layers or config.prunes_vocabulary or config.removes_layers):  # experts were all
        changes |= {"pruning_ratio": 0.0, "allocation": "uniform"}
    if config.refits_lm_head:
        changes["refit_lm_head"] = True  # it may be all that is left to do
    return replace(config, **changes)
