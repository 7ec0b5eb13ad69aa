"""What a text routes to the experts of every layer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import DataError, NumericsError
from hf_context_prune.modeling.experts import experts_spec
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.expert_criteria import ExpertStatistics
from hf_context_prune.utils.distributed import all_reduce_, fail_together, shard
from hf_context_prune.utils.precision import overflow_remedy

from .calibrate import check_weights_finite
from .samples import Batch, prepare_batch

_NAME = "hf_context_prune.experts"


class _Collector:
    """Sums of one layer; `hook` is a forward pre-hook of the module that computes the experts."""

    def __init__(self, experts: int, where: str, dtype: torch.dtype) -> None:
        self.where, self._dtype = where, dtype
        self.mask: torch.Tensor | None = None
        self.statistics = ExpertStatistics(0, *(torch.zeros(experts, dtype=torch.float64) for _ in range(3)))
        self._inside = False

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add what one call routes; the module is called once per slot of the routing, so that outputs stay apart."""
        if self._inside:
            return
        hidden, indices, gates = args
        self._inside = True
        try:
            for slot in range(indices.shape[1]):
                chosen = indices[:, slot : slot + 1]
                output = module(hidden, chosen, torch.ones_like(gates[:, :1]))
                norms = torch.linalg.vector_norm(output.float(), dim=-1) * gates[:, slot].float()
                self._add(chosen[:, 0], norms, first=slot == 0)
        finally:
            self._inside = False

    def _add(self, chosen: torch.Tensor, norms: torch.Tensor, *, first: bool) -> None:
        if self.mask is not None:
            chosen, norms = chosen[self.mask], norms[self.mask]
        places, values = chosen.cpu(), norms.double().cpu()
        self.statistics.routed.index_add_(0, places, torch.ones_like(values))
        self.statistics.added.index_add_(0, places, values)
        self.statistics.squared.index_add_(0, places, values.square())
        self.statistics.num_tokens += len(places) if first else 0

    def finish(self) -> ExpertStatistics:
        """Return the sums over all processes.

        Raises:
            NumericsError: A gate or an output is NaN or Inf.
        """
        found = self.statistics
        count = torch.tensor(found.num_tokens, dtype=torch.float64)
        all_reduce_([count, found.routed, found.added, found.squared])
        found.num_tokens = int(count)
        if not bool(torch.isfinite(found.added).all()):
            raise NumericsError(f"NaN or Inf in the experts of {self.where}. {overflow_remedy(self._dtype)}")
        return found


@fail_together()
@torch.no_grad()
def measure_routing(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[int, ExpertStatistics]:
    """Run a model over text and sum up what is routed to its experts.

    Under ``accelerate launch`` every process has to call it, with the same batches, as for [`calibrate`][].

    Args:
        model: A model with experts; runs in evaluation mode.
        batches: As for [`calibrate`][].

    Returns:
        The sums by the number of the layer, for layers with experts.

    Raises:
        DataError: Nothing but padding.
        NumericsError: NaN or Inf in weights or activations.
        UnsupportedArchitectureError: The family has no experts.
    """
    view = ModelView.of(model)
    experts = experts_spec(view.spec)
    check_weights_finite(model)
    rows = model.get_input_embeddings().weight.shape[0]
    collectors = {
        index: _Collector(widths.experts, f"layer {index}", model.dtype)
        for index, widths in enumerate(view.widths)
        if widths.experts
    }
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for index, collector in collectors.items():
            module = view.layers[index].get_submodule(experts.prefix)
            stack.callback(module.register_forward_pre_hook(collector.hook).remove)
        for index, batch in tqdm(shard(batches), desc="Choosing experts", unit="batch", name=_NAME):
            inputs, mask = prepare_batch(batch, index, rows)
            for collector in collectors.values():
                collector.mask = None if mask is None else mask.to(model.device)
            model.base_model(**{name: one.to(model.device) for name, one in inputs.items()}, use_cache=False)
    found = {index: collector.finish() for index, collector in collectors.items()}
    if not all(one.num_tokens for one in found.values()):
        raise DataError("The text holds nothing but padding, so no expert is used. Give another text.")
    return found
