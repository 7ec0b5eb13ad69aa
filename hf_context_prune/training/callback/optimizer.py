"""Keep the optimizer of a model whose weights get narrower: the same groups, and its state mapped along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from hf_context_prune.errors import ConfigError, LoadError

FULL, ROWS, COLUMNS = "full", "rows", "columns"

# What each state tensor of an optimizer carries: every entry of its weight, or one value per row or per column.
_ADAM = {"exp_avg": FULL, "exp_avg_sq": FULL, "max_exp_avg_sq": FULL}
STATES: dict[type[Optimizer], dict[str, str]] = {
    torch.optim.AdamW: _ADAM,
    torch.optim.Adam: _ADAM,
    torch.optim.SGD: {"momentum_buffer": FULL},
    torch.optim.Adafactor: {"variance": FULL, "row_var": ROWS, "col_var": COLUMNS},
    Adafactor: {"exp_avg": FULL, "exp_avg_sq": FULL, "exp_avg_sq_row": ROWS, "exp_avg_sq_col": COLUMNS},
}


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer without accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Optimizer | None, model: nn.Module, num_processes: int = 1) -> None:
    """Refuse an optimizer whose state can't be mapped to narrower weights.

    Args:
        optimizer: The Trainer's.
        model: The model that it trains.
        num_processes: With several, weights are zeroed and not narrowed, which states by rows and columns can't follow.

    Raises:
        ConfigError: Its class is not in the table or can't be used with several processes, its state holds a tensor
            that the table does not know, or it trains weights that the model does not have.
    """
    if optimizer is None:
        raise ConfigError("The Trainer has no optimizer when training begins, so its state can't be kept. Give it one.")
    inner = unwrap_optimizer(optimizer)
    if type(inner) not in STATES:
        known = ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in STATES)
        raise ConfigError(
            f"The state of the optimizer {type(inner).__module__}.{type(inner).__qualname__} can't be mapped to "
            f"narrower weights; supported are {known}. Use one of them: TrainingArguments(optim='adamw_torch')."
        )
    if num_processes > 1 and ROWS in STATES[type(inner)].values():
        raise ConfigError(
            f"With several processes, {type(inner).__qualname__} would keep the moments of whole rows and columns, "
            f"those of removed units among them: not the result of one process. Use one process, or AdamW "
            f"(TrainingArguments(optim='adamw_torch'))."
        )
    check_state(inner)
    own = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(parameter) not in own for group in inner.param_groups for parameter in group["params"])
    if strangers:
        raise ConfigError(
            f"The optimizer trains {strangers} tensors that are not weights of the model (any more). Make the "
            f"optimizer from model.parameters() of this very model, or let the Trainer make it."
        )


def check_state(optimizer: Optimizer) -> None:
    """Refuse a state that holds tensors of unknown shape, such as a hook's moving average.

    Raises:
        ConfigError: A tensor of the state is not in the table.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0 and name not in STATES[type(optimizer)]:
                raise ConfigError(
                    f"The state of {type(optimizer).__qualname__} holds {name!r} of shape {list(value.shape)} for a "
                    f"weight of shape {list(parameter.shape)}. The optimizer itself keeps no such tensor, and nothing "
                    f"says how to narrow it. Keep it elsewhere, or prune() before the training."
                )


def check_state_loaded(optimizer: Optimizer, scheduler: LRScheduler | None, step: int) -> None:
    """Refuse to resume without the states of optimizer and scheduler: a Trainer passes over missing files in silence.

    Args:
        optimizer: The Trainer's, with what it loaded from the checkpoint.
        scheduler: The Trainer's.
        step: Step of the checkpoint.

    Raises:
        LoadError: Neither has a state.
    """
    if scheduler is not None and not unwrap_optimizer(optimizer).state and not scheduler.state_dict().get("last_epoch"):
        raise LoadError(
            f"The checkpoint of step {step} gave no state of optimizer and learning rate, so training would not go on "
            f"as it was: optimizer.pt or scheduler.pt is missing, as with save_only_model=True. Resume from a whole "
            f"checkpoint, or start a new training from the weights, without resume_from_checkpoint."
        )


def _map_tensor(value: torch.Tensor, carries: str, shape: torch.Size, places: torch.Tensor) -> torch.Tensor:
    """Return a state tensor of a narrower weight.

    Args:
        value: The state of the wide weight.
        carries: `FULL`, `ROWS` or `COLUMNS`.
        shape: The shape of the wide weight.
        places: Flat indices into the wide weight, int64 in the shape of the narrow weight.
    """
    places = places.to(value.device)
    if carries == FULL:
        return value.reshape(-1)[places]
    index = places[:, 0] // shape[1] if carries == ROWS else places[0] % shape[1]
    kept = value.reshape(-1)[index]
    if value.ndim == 1:
        return kept
    return kept[:, None] if carries == ROWS else kept[None, :]


def map_state(optimizer: Optimizer, places: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Narrow the state of weights that get narrower.

    Args:
        optimizer: An optimizer that passed `check_optimizer`.
        places: (wide weight, flat indices into it in the shape of the narrow weight).
    """
    inner = unwrap_optimizer(optimizer)
    carries = STATES[type(inner)]
    check_state(inner)
    for parameter, index in places:
        state = inner.state.get(parameter, {})
        for name, value in list(state.items()):
            if name in carries and isinstance(value, torch.Tensor):
                state[name] = _map_tensor(value, carries[name], parameter.shape, index)


def replace_parameters(optimizer: Optimizer, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Let an optimizer train the new weights in place of the old ones; groups and schedulers stay."""
    inner = unwrap_optimizer(optimizer)
    for group in inner.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    for old, replacement in new.items():
        if old in inner.state:
            inner.state[replacement] = inner.state.pop(old)


def clear_entries(optimizer: Optimizer, parameter: nn.Parameter, places: torch.Tensor) -> None:
    """Set the state of all entries but those at `places` (flat indices) to zero."""
    inner = unwrap_optimizer(optimizer)
    carries = STATES[type(inner)]
    for name, value in inner.state.get(parameter, {}).items():
        if carries.get(name) == FULL and isinstance(value, torch.Tensor):
            kept = value.reshape(-1)[places.to(value.device)].clone()
            value.zero_().view(-1)[places.to(value.device)] = kept
