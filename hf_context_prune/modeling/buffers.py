"""Buffers of a model, which pruning does not change."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.utils.compat import computed_buffers, fill_computed_buffers


def fill_buffers(
    source: nn.Module, target: PreTrainedModel, new_name: Callable[[str], str | None] = lambda path: path
) -> None:
    """Copy the buffers of a model. They depend on head_dim and hidden size alone, so pruning does not change them.

    Buffers that are computed and never saved (rotary tables) are computed again, in float32, as `from_pretrained` does:
    `.to(bfloat16)` rounds them in the source, so a copy would differ from the reloaded folder.

    Args:
        source: The model.
        target: A model with the same modules, or fewer layers.
        new_name: Returns the path that a module of the source has in the target; None where it has none.
    """
    modules = dict(target.named_modules())
    models = [path for path, module in modules.items() if isinstance(module, PreTrainedModel)]
    for path, module in source.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers:
            continue
        if (new := new_name(path)) is None:
            continue
        mirror, computed = modules[new], computed_buffers(module)
        rounded = any(buffer.is_floating_point() for buffer in buffers.values())
        # Whole numbers are copied: what computes them may also draw the weights beside them (Siglip's positions).
        if rounded and set(buffers) <= computed and not list(module.parameters(recurse=False)):
            mirror.to_empty(device=next(iter(buffers.values())).device, recurse=False)
            # A vision tower computes its own. The root, whose path is empty, holds every module.
            owner = max((name for name in models if f"{new}.".startswith(f"{name}." if name else "")), key=len)
            fill_computed_buffers(modules[owner], mirror)  # type: ignore[arg-type]
            continue
        for name, buffer in buffers.items():
            if name not in computed and not getattr(mirror, name).is_meta:
                continue  # it was saved, and loaded: of fewer experts, perhaps
            mirror.register_buffer(name, buffer.clone(), persistent=name not in computed)
