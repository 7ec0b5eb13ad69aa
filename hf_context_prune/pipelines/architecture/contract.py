"""The contract of an architecture: what must be true of every model that this package prunes, tested on one.

``tests/contract/test_families.py`` holds every entry of the table to the same and more.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from typing_extensions import override

from hf_context_prune.errors import ContextPruneError
from hf_context_prune.modeling.architectures import output_weight
from hf_context_prune.modeling.experts import experts_spec, fewest_experts, num_groups
from hf_context_prune.modeling.paths import check_paths
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.registry import check_entry, in_the_table
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.surgery import apply_plan, kept_features
from hf_context_prune.storage.model_config import describe
from hf_context_prune.storage.saving import save_pruned

from .observe import IDS

_EXACT, _CLOSE = 1e-5, 1e-4
"""How far two results of the same numbers may differ, of the largest: by another order of one sum, or of many."""
_MATTERS = 1e-2


class BrokenContract(Exception):  # noqa: N818 - what a check found, not an error of the program
    """A check failed; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check of the contract.

    Attributes:
        name: What must be true.
        why: Why it is not; None where it is.
    """

    name: str
    why: str | None = None


def random_plan(model: PreTrainedModel, *, seed: int = 0, variable: bool = True, experts: bool = False) -> PruningPlan:
    """Return a plan that keeps a random part of a model: other widths in every layer, or the same; experts if asked."""
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(seed)

    def choose(total: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    layers = []
    for index, width in enumerate(view.widths):
        step = index if variable else 0
        neurons = width.neurons and max(1, width.neurons * 3 // 4 - step)
        groups = width.kv_groups and max(1, width.kv_groups - 1 - step % 2)
        chosen = choose(width.neurons, neurons), choose(width.kv_groups, groups)
        layers.append(LayerPlan(*chosen, tuple(range(width.experts))))
        if experts and width.experts:
            layers[-1] = replace(layers[-1], experts=_fewer_experts(view, width.experts, 1 + step % 2))
    return PruningPlan(view.spec.model_type, view.widths, tuple(layers), fingerprint(model))


def _fewer_experts(view: ModelView, total: int, fewer: int) -> tuple[int, ...]:
    """Return the experts without the last ones of every group, or all where so few may not stay."""
    experts = experts_spec(view.spec)
    groups = num_groups(view.model.config, experts)
    if total - groups * fewer < fewest_experts(view.model.config, experts):
        return tuple(range(total))
    size = total // groups
    return tuple(expert for expert in range(total) if expert % size < size - fewer)


def masked(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Return a copy of a model in which what a plan removes is silent: zero columns, routers without experts."""
    silenced = copy.deepcopy(model)
    view = ModelView.of(silenced)
    for index, target in view.places():
        weight = output_weight(view.output_projection(index, target))
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[kept_features(view.geometry, target, plan.layers[index].kept(target))] = False
        weight[:, gone] = 0
    return without_experts(silenced, plan) if view.spec.experts is not None else silenced


def without_experts(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Return a copy of a model whose routers give the experts that a plan removes minus infinity."""
    silenced = copy.deepcopy(model)
    view = ModelView.of(silenced)
    experts = experts_spec(view.spec)
    for layer, kept, widths in zip(view.layers, plan.layers, view.widths, strict=True):
        if not widths.experts:
            continue
        gone = torch.ones(widths.experts, dtype=torch.bool)
        gone[list(kept.experts)] = False
        block = layer.get_submodule(experts.block)
        for name, bias in (*block.named_parameters(), *block.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):  # added to scores that are never below 0
                bias.data[..., gone] = -torch.inf
        router = block.get_submodule(experts.router)
        router.forward = partial(_call_silenced, router.forward, gone)
    return silenced


def _call_silenced(forward: Callable[..., Any], gone: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    with _MinusInfinity(gone):
        return forward(*args, **kwargs)


class _MinusInfinity(TorchFunctionMode):
    """Within it, linear layers give some outputs minus infinity."""

    def __init__(self, gone: torch.Tensor) -> None:
        super().__init__()
        self._gone = gone

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output.masked_fill(self._gone, -torch.inf) if func is functional.linear else output


def run_contract(
    model: PreTrainedModel, spec: ArchSpec, *, report: Callable[[Check], object] = lambda check: None
) -> tuple[Check, ...]:
    """Test an entry on a model, up to the first check that fails.

    Args:
        model: A small model of the architecture, in float32 and evaluation mode; unchanged.
        spec: The entry.
        report: Called with every check when it is done.

    Returns:
        The checks in order; all but the last hold, and all where the entry is right.
    """
    done: list[Check] = []
    for name, check in _CHECKS.items():
        done.append(Check(name, _why_not(check, model, spec)))
        report(done[-1])
        if done[-1].why is not None:
            break
    return tuple(done)


def _why_not(check: Callable[[PreTrainedModel, ArchSpec], None], model: PreTrainedModel, spec: ArchSpec) -> str | None:
    try:
        if check is _well_formed:
            check(model, spec)  # before its classes are made
        else:
            with in_the_table(spec):
                check(model, spec)
    except (BrokenContract, ContextPruneError) as error:
        return str(error)
    except Exception as error:  # a wrong entry breaks the code of the family anywhere
        return f"the model does not run: {describe(error)}"
    return None


def can_be_sliced(checks: Iterable[Check]) -> bool:
    """Return whether removing units does what it must, whatever else fails."""
    return not any(check.why is not None and check.name in _OF_SLICES for check in checks)


def holds(checks: Iterable[Check]) -> bool:
    """Return whether no check failed."""
    return all(check.why is None for check in checks)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


def _same(found: torch.Tensor, expected: torch.Tensor, most: float, what: str) -> None:
    """Compare two tensors, as closely as the largest number of them allows."""
    difference = (found - expected).abs().max().item()
    allowed = most * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # NaN is not
        raise BrokenContract(f"{what} differ by up to {difference:.2g}; {allowed:.2g} is allowed")


def _well_formed(model: PreTrainedModel, spec: ArchSpec) -> None:
    check_entry(spec)
    check_paths(model, spec)


def _empty_plan(model: PreTrainedModel, spec: ArchSpec) -> None:
    same = apply_plan(model, PruningPlan.identity(spec.model_type, ModelView.of(model).geometry))
    if type(same) is not type(model):
        raise BrokenContract(f"the model became a {type(same).__name__}")
    _same(_logits(same), _logits(model), 0.0, "logits")


def _sliced(model: PreTrainedModel, *, variable: bool) -> None:
    plan = random_plan(model, variable=variable, experts=True)
    before, expected = _logits(model), _logits(masked(model, plan))
    if (before - expected).abs().max() <= _MATTERS:
        raise BrokenContract("silencing units changes nothing, so the output projections are not those of the units")
    smaller = apply_plan(model, plan)
    if smaller.num_parameters() >= model.num_parameters():
        raise BrokenContract("the pruned model has as many parameters as before")
    _same(_logits(smaller), expected, _EXACT, "logits of the smaller model and of the model with silenced units")


def _sliced_variable(model: PreTrainedModel, spec: ArchSpec) -> None:
    _sliced(model, variable=True)


def _sliced_uniform(model: PreTrainedModel, spec: ArchSpec) -> None:
    _sliced(model, variable=False)


def _cached(model: PreTrainedModel, spec: ArchSpec) -> None:
    smaller = apply_plan(model, random_plan(model, experts=True))
    runs = [
        smaller.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    with_cache, without = (torch.stack(run.logits) for run in runs)
    _same(with_cache, without, _CLOSE, "logits with and without a cache")


def _reloads(model: PreTrainedModel, dtype: torch.dtype) -> None:
    typed = copy.deepcopy(model).to(dtype)
    try:
        _logits(typed)
    except RuntimeError as error:
        raise BrokenContract(
            f"the model itself does not run in {dtype}, before it is pruned: {describe(error)}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        for variable in (True, False):
            plan = random_plan(typed, variable=variable, experts=True)
            smaller = apply_plan(typed, plan)
            place = save_pruned(smaller, Path(folder) / str(variable), plan=plan)
            again = type(smaller).from_pretrained(place, dtype="auto")
            if again.dtype != dtype:
                raise BrokenContract(f"it reloads as {again.dtype}")
            _same(_logits(again.eval()), _logits(smaller), 0.0, "logits before and after saving")


def _reloads_float32(model: PreTrainedModel, spec: ArchSpec) -> None:
    _reloads(model, torch.float32)


def _reloads_bfloat16(model: PreTrainedModel, spec: ArchSpec) -> None:
    _reloads(model, torch.bfloat16)


def _trains(model: PreTrainedModel, spec: ArchSpec) -> None:
    trained, smaller = _gradients(model), apply_plan(model, random_plan(model, experts=True)).train()
    plain = _gradients(smaller)
    # Some weights of experts have no gradient in the whole model either, such as the correction of a router.
    if without := [name for name, _ in smaller.named_parameters() if name in trained and name not in plain]:
        raise BrokenContract(f"{', '.join(without[:3])} get no gradient")
    if not smaller.supports_gradient_checkpointing:
        return
    smaller.gradient_checkpointing_enable()
    again = _gradients(smaller)
    for name, gradient in plain.items():
        _same(again[name], gradient, _CLOSE, f"gradients of {name} with and without checkpointing")


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


_CHECKS: dict[str, Callable[[PreTrainedModel, ArchSpec], None]] = {
    "its classes and paths exist": _well_formed,
    "an empty plan changes nothing": _empty_plan,
    "sliced equals masked, each layer with widths of its own": _sliced_variable,
    "sliced equals masked, all layers alike": _sliced_uniform,
    "with a cache as without": _cached,
    "saved and reloaded bit by bit, float32": _reloads_float32,
    "saved and reloaded bit by bit, bfloat16": _reloads_bfloat16,
    "trains, with gradient checkpointing as without": _trains,
}
_OF_SLICES = tuple(_CHECKS)[:4]
