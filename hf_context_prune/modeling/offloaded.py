"""Models that were loaded with a `device_map`: weights that accelerate left on the disk are mapped from there."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import UnsupportedArchitectureError

from .buffers import fill_buffers


def map_offloaded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose offloaded weights are mapped from their files; the given model where none is offloaded.

    Mapped weights take no memory that the system can't take back, so nothing has to move them in and out, and each
    layer can be read by itself. Weights in memory are shared with the given model, which stays as it is.

    Args:
        model: A model with the hooks of accelerate, or without.

    Raises:
        UnsupportedArchitectureError: Its layers move to another device when they run.
    """
    if not any(parameter.is_meta and _hook_of(module) is not None for module, parameter in _own_parameters(model)):
        return model
    state = {}
    for path, module in model.named_modules():
        hook = _hook_of(module)
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            if tensor.is_meta and hook is not None:
                if torch.device(hook.execution_device or "cpu").type != "cpu":
                    raise UnsupportedArchitectureError(
                        f"{path}.{name} is offloaded, and runs on {hook.execution_device}. Load the model on the CPU "
                        f"(device_map='cpu', or dtype='auto' without a device_map): its file is mapped there, and "
                        f"takes no memory of its own size."
                    )
                tensor = hook.weights_map[name]
            state[f"{path}.{name}"] = tensor.detach()
    with torch.device("meta"):
        mapped: PreTrainedModel = type(model)(model.config)
    mapped.load_state_dict(state, strict=False, assign=True)
    mapped.tie_weights()
    fill_buffers(model, mapped)
    mapped.generation_config = copy.deepcopy(model.generation_config)
    return mapped.train(model.training)


def _own_parameters(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    return [(module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]


def _hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """Return the hook that brings a module's offloaded weights, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)
