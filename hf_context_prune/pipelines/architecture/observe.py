"""What a layer does, seen by hooks in one forward of a tiny model: which module gets what from which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.modeling.architectures import output_weight
from hf_context_prune.modeling.modeling_context_pruned import is_transposed

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
"""Token ids, [texts, length]."""
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_SILENT = ("Dropout", "Identity")


@dataclass(frozen=True)
class Shape:
    """A projection of a layer.

    Attributes:
        path: Its path in the layer.
        inputs: Input features.
        outputs: Output features.
    """

    path: str
    inputs: int
    outputs: int

    @property
    def parent(self) -> str:
        """Path of the module that holds it."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Its name in that module."""
        return self.path.rpartition(".")[2]


@dataclass
class Calls:
    """What went into a module and came out, call by call."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Observed:
    """One forward of a layer.

    Attributes:
        layer: The layer.
        shapes: Its projections, in the order in which they ran.
        calls: Tensors by path of the module, of modules that take a tensor first.
    """

    layer: nn.Module
    shapes: tuple[Shape, ...]
    calls: dict[str, Calls]

    def reads(self, path: str, tensor: torch.Tensor) -> bool:
        """Return whether a module got exactly this tensor."""
        called = self.calls.get(path)
        return called is not None and any(torch.equal(one, tensor) for one in called.inputs)

    def output(self, path: str) -> torch.Tensor:
        """Return what a module gave in its last call."""
        return self.calls[path].outputs[-1]

    def norms(self) -> list[str]:
        """Return the norms that the layer itself holds."""
        return [name for name, module in self.layer.named_children() if "Norm" in type(module).__name__]

    def functions(self) -> list[str]:
        """Return the modules without projections that ran, such as activation functions."""
        return [
            path
            for path, module in self.layer.named_modules()
            if path in self.calls
            and not is_projection(module)
            and not any(map(is_projection, module.modules()))
            and not any(word in type(module).__name__ for word in ("Norm", "Rotary", *_SILENT))
        ]


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is a linear map of features."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_in_attention(layer: nn.Module, path: str) -> bool:
    """Return whether a path of a layer leads through an attention module, by name or class."""
    parts = path.split(".")
    starts = [".".join(parts[: index + 1]) for index in range(len(parts) - 1)]
    return any(
        _ATTENTION.search(start.rpartition(".")[2]) or _ATTENTION.search(type(layer.get_submodule(start)).__name__)
        for start in starts
    )


def find_layers(model: PreTrainedModel) -> str | None:
    """Return the path of the list of decoder layers: as long as the config says, with projections, not inside another.

    None where there is no such list.
    """
    count = model.config.num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(map(is_projection, one.modules())) for one in module)
    ]
    return min(found, key=lambda name: name.count("."), default=None)


def observe(model: PreTrainedModel, layer: nn.Module) -> Observed:
    """Run a model once, and note the tensors of one of its layers."""
    calls: dict[str, Calls] = {}
    order: list[str] = []

    def note(path: str) -> Any:  # noqa: ANN401 - a hook
        def hook(module: nn.Module, args: Sequence[Any], output: Any) -> None:  # noqa: ANN401
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                called = calls.setdefault(path, Calls())
                called.inputs.append(args[0].clone())
                called.outputs.append(output.clone())
                if is_projection(module):
                    order.append(path)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in layer.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(note(path)).remove)
        model(input_ids=IDS, use_cache=False)
    shapes = []
    for path in dict.fromkeys(order):
        outputs, inputs = output_weight(layer.get_submodule(path)).shape
        shapes.append(Shape(path, inputs, outputs))
    return Observed(layer, tuple(shapes), calls)


def is_fed_by_attention(model: PreTrainedModel, layer: nn.Module, attention_output: str, mlp_input: str) -> bool:
    """Return whether what the MLP gets changes when the attention adds nothing: not where the two are parallel."""
    projection = layer.get_submodule(attention_output)
    seen: list[torch.Tensor] = []
    keep = layer.get_submodule(mlp_input).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        silence = projection.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        try:
            model(input_ids=IDS, use_cache=False)
        finally:
            silence.remove()
            keep.remove()
    return not torch.equal(seen[0], seen[-1])
