"""Models that were loaded with a `device_map`: weights that accelerate left on the disk are mapped from there."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.utils.memory import free_memory

from .buffers import fill_buffers
from .layer_device import run_layers_on


def map_offloaded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose offloaded weights are mapped from their files; the given model where none is offloaded.

    Mapped weights take no memory that the system can't take back, so nothing has to move them in and out, and each
    layer can be read by itself. Weights in memory are shared with the given model, which stays as it is. Where its
    layers run on an accelerator, those of the returned one do, one at a time; weights that lie there are copied.

    Args:
        model: A model with the hooks of accelerate, or without.

    Raises:
        UnsupportedArchitectureError: The weights that lie on an accelerator don't fit into memory.
    """
    if not any(parameter.is_meta and _hook_of(module) is not None for module, parameter in _own_parameters(model)):
        return model
    state, devices, elsewhere = {}, set(), 0
    for path, module in model.named_modules():
        hook = _hook_of(module)
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            if tensor.is_meta and hook is not None:
                tensor, device = hook.weights_map[name], torch.device(hook.execution_device or "cpu")
                devices |= {device} - {torch.device("cpu")}
            elsewhere += 0 if tensor.device.type == "cpu" else tensor.nbytes
            state[f"{path}.{name}"] = tensor.detach()
    if elsewhere > free_memory():
        raise UnsupportedArchitectureError(
            f"{elsewhere / 2**30:.1f} GiB of this model lie on an accelerator, the rest was offloaded, and they don't "
            f"fit into the free memory ({free_memory() / 2**30:.1f} GiB). Load it without a device_map (dtype='auto'): "
            f"its file is mapped, which takes no memory of its own size, and name the accelerator as device "
            f"(load_model(..., device=)): its layers run there one at a time."
        )
    state = {name: tensor.cpu() for name, tensor in state.items()}
    with torch.device("meta"):
        mapped: PreTrainedModel = type(model)(model.config)
    mapped.load_state_dict(state, strict=False, assign=True)
    mapped.tie_weights()
    fill_buffers(model, mapped)
    if devices:
        run_layers_on(mapped, min(devices, key=str))
    mapped.generation_config = copy.deepcopy(model.generation_config)
    return mapped.train(model.training)


def _own_parameters(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    return [(module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]


def _hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """Return the hook that brings a module's offloaded weights, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)
