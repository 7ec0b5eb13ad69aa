"""A decoder layer that is called again and again on the same streams while its output projections are reconstructed.

What a sub-layer computes before its output projection doesn't change meanwhile, so it is computed once per stream and
recorded, and later calls of the layer begin there. Layers are called as they are, with those modules patched whose
result is known. All calls together cost little more than one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_context_prune.modeling.architectures import Target, output_weight
from hf_context_prune.modeling.patching import Forward, patch_forwards
from hf_context_prune.modeling.view import ModelView

from .checkpoint import Output
from .hidden_states import Stream, StreamStorage
from .sub_layer import SubLayer

ORDER: tuple[Target, ...] = ("attention", "mlp")
"""The sub-layers, in the order in which they are called."""


@dataclass(frozen=True)
class _Record:
    """Inputs of a sub-layer's output projection on a stream, or its output once the projection changes no more."""

    values: torch.Tensor
    is_output: bool


class ReplayedLayer:
    """A layer of which each sub-layer runs once per stream.

    Args:
        index: The layer's number.
        layer: The layer; its output projections may change between the calls.
        view: The model.
        storage: Where records lie; those of the layer before are overwritten.
        open_targets: Sub-layers whose output projection will change.
    """

    def __init__(
        self, index: int, layer: nn.Module, view: ModelView, storage: StreamStorage, open_targets: Sequence[Target]
    ) -> None:
        spec = view.spec
        self.index, self.layer = index, layer
        self._order = [target for target in ORDER if target in view.targets(index)]
        self.sub_layers = {target: SubLayer(layer, spec, target) for target in self._order}
        self._attention = layer.get_submodule(spec.attention) if "attention" in self._order else None
        mlp_inputs = spec.mlp_inputs if "mlp" in self._order else ()  # else a mixture of experts, which runs each time
        self._mlp_inputs = [layer.get_submodule(path) for path in mlp_inputs]
        self._mlp_blocks = spec.mlp_blocks
        self._storage, self._open = storage, set(open_targets)
        self._widths = {target: _widest(view, target) for target in self._order}
        self._records: dict[tuple[int, Target], _Record] = {}
        self._num_attention_outputs: int | None = None  # None: the module returns a tensor, no tuple

    def call(self, stream: Stream, *, record: bool = True, without_mlp: bool = False) -> torch.Tensor:
        """Run the layer on the pruned hidden states of a stream and return its output; the stream stays as it is.

        Args:
            stream: The stream.
            record: Keep what sub-layers compute, for later calls.
            without_mlp: Let the MLP compute nothing and add zero.
        """
        patches: dict[nn.Module, Forward] = {}
        with ExitStack() as stack:
            for target in self._order:
                if target == "mlp" and without_mlp:
                    channels = self.sub_layers[target].gamma.shape[0]
                    patches |= self._mlp_patches(lambda hidden, n=channels: hidden.new_zeros(*hidden.shape[:-1], n))
                    continue
                known = self._records.get((stream.start, target))
                if known is not None:
                    patches |= self._patches(target, stream, known)
                if record:
                    self._record_next(stack, target, stream, known)
            stack.enter_context(patch_forwards(list(patches), list(patches.values())))
            return stream.call(self.index, self.layer, stream.pruned, pruned=True)

    def inputs(self, target: Target, stream: Stream) -> torch.Tensor:
        """Return the recorded inputs of an output projection that will still change."""
        return self._records[stream.start, target].values

    def settle(self, target: Target, features: Sequence[int], output: Output) -> None:
        """Set the final weights of an output projection; see [`SubLayer.install`][]."""
        self.sub_layers[target].install(features, *output)
        self._open.discard(target)

    def _patches(self, target: Target, stream: Stream, known: _Record) -> dict[nn.Module, Forward]:
        """Return forwards with which a sub-layer begins at what is known of it."""
        values, projection = known.values.to(stream.device), self.sub_layers[target].projection
        if target == "mlp":
            own = projection.forward
            return self._mlp_patches(lambda _: values if known.is_output else own(values))

        def attention(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any attention module's arguments and result
            output = values if known.is_output else projection(values)
            count = self._num_attention_outputs
            return output if count is None else (output, *[None] * (count - 1))  # layers use the first alone

        assert self._attention is not None
        return {self._attention: attention}

    def _mlp_patches(self, output: Forward) -> dict[nn.Module, Forward]:
        """Return forwards with which the MLP computes one neuron of no meaning, and then this output."""
        patches: dict[nn.Module, Forward] = {
            module: lambda hidden: hidden[..., : self._mlp_blocks] for module in self._mlp_inputs
        }
        return patches | {self.sub_layers["mlp"].projection: output}

    def _record_next(self, stack: ExitStack, target: Target, stream: Stream, known: _Record | None) -> None:
        """Record a sub-layer in the next call: its inputs while the projection may still change, else its output."""
        is_output = target not in self._open
        if known is not None and known.is_output == is_output:
            return

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:  # noqa: ANN401 - any module's arguments
            values = output if is_output else args[0]
            values = self._storage.keep(target, stream.start, values, width=self._widths[target])
            self._records[stream.start, target] = _Record(values, is_output)

        def keep_structure(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401 - likewise
            self._num_attention_outputs = len(output) if isinstance(output, tuple) else None

        stack.callback(self.sub_layers[target].projection.register_forward_hook(keep).remove)
        if target == "attention" and known is None and self._attention is not None:
            stack.callback(self._attention.register_forward_hook(keep_structure).remove)


def _widest(view: ModelView, target: Target) -> int:
    """Return the most features that any layer records of a sub-layer."""
    widths = (output_weight(view.output_projection(*place)).shape for place in view.places([target]))
    return max(max(shape) for shape in widths)
