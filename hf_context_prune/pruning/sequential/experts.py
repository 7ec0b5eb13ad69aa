"""Repair of experts: one pass over the decoder layers, with the stream of all that experts compute and of what stays.

As in `prune`, the target at every layer is the base model's residual stream, so the refit absorbs the error made
upstream, too. `expert_repair` has the equations of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.errors import error_context
from hf_context_prune.modeling.expert_neurons import SHARED_OUTPUT, shared_expert
from hf_context_prune.modeling.experts import experts_spec
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY, Batch
from hf_context_prune.storage.kept_tensors import KeptLayers
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import broadcast_object, fail_together, is_main_process, shard

from .expert_repair import ExpertRepair, ExpertWidths, RepairedExperts
from .hidden_states import StreamStorage, capture_streams, choose_validation, count_positions

_TENSORS = ("weight", "bias", "shared", "neurons", "shared_neurons")


@fail_together()
@torch.no_grad()
def repair_experts(
    model: PreTrainedModel,
    fewer: PreTrainedModel,
    kept: Mapping[int, Sequence[int]],
    batches: Sequence[Batch],
    widths: ExpertWidths = ExpertWidths(),  # noqa: B008 - frozen
    *,
    state_dir: Path | None = None,
    memory_limit: int | None = None,
) -> dict[int, LayerOfExperts]:
    """Refit the output projections of the experts that stay, layer by layer, to what the base model computes.

    Under ``accelerate launch`` every process has to call it, with the same batches, as for `prune_sequentially`.

    Args:
        model: The base model; unchanged.
        fewer: The model without some experts, and with everything else; its experts' output projections are changed in
            place, in layers that lose experts or neurons, and get memory of their own where the base model has them.
        kept: Numbers of the experts that stay, by the number of the layer.
        batches: As for `calibrate`.
        widths: Neurons that stay in every expert: the columns of the others become zero.
        state_dir: Where finished layers are kept; a run over the same inputs resumes from there, to the same bits.
        memory_limit: As for `prune_sequentially`.

    Returns:
        What became of each layer that loses experts or neurons, by its number.

    Raises:
        NumericsError: NaN or Inf, with the layer.
        SaveError: A finished layer can't be written.
    """
    view, slim, batches = ModelView.of(model), ModelView.of(fewer), list(batches)
    check_weights_finite(model)
    _own_outputs(fewer, model)
    checkpoint = _Checkpoint(state_dir, model, batches, kept, widths)
    narrows = widths.neurons is not None or widths.shared is not None
    done: dict[int, LayerOfExperts] = {}
    device, diverged = layer_device(model), False
    with evaluation_mode(model, inference=False), evaluation_mode(fewer, inference=False):
        mine = shard(batches)
        storage = StreamStorage(count_positions(mine), limit=memory_limit, device=device)
        streams = capture_streams(view, mine, storage, validation=choose_validation(len(batches), VALIDATION_EVERY))
        for index in tqdm(
            range(len(view.layers)), desc="Repairing experts", unit="layer", name="hf_context_prune.experts"
        ):
            base, layer = view.layers[index], slim.layers[index]
            own = slim.widths[index].experts
            loses = own < view.widths[index].experts or (narrows and bool(own))
            with error_context(f"layer {index}"), in_hand(base, device):
                for stream in streams:
                    stream.base.copy_(stream.call(index, base, stream.base))
            if loses:
                found = broadcast_object(checkpoint.load(index))
                if found is None:
                    with error_context(f"layer {index}"), in_hand(layer, device):
                        found = ExpertRepair(slim, index, streams, storage, widths).solve()
                    checkpoint.save(index, found)
                found.install(layer, experts_spec(slim.spec))
                done[index], diverged = LayerOfExperts.of(found), True
            with in_hand(layer, device):
                for stream in streams:
                    after = stream.call(index, layer, stream.pruned, pruned=True) if diverged else stream.base
                    stream.pruned.copy_(after)
    return done


@dataclass(frozen=True)
class LayerOfExperts:
    """What became of the experts of one layer.

    Attributes:
        left: Share of the squared error that is left, on text that was never fitted; None where there is too little
            text to withhold any.
        neurons: The neurons that stay in each expert, ascending; empty where all do.
        shared: The same of the shared expert.
    """

    left: float | None
    neurons: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, found: RepairedExperts) -> LayerOfExperts:
        """Take the facts of a repaired layer, without its weights."""
        neurons = () if found.neurons is None else tuple(map(tuple, found.neurons.tolist()))
        return cls(found.left, neurons, () if found.shared_neurons is None else tuple(found.shared_neurons.tolist()))


def _own_outputs(fewer: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give the output projections of a model's experts memory of their own where it shares them with the base model."""
    experts = experts_spec(ModelView.of(fewer).spec)
    shared = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for layer, widths in zip(ModelView.of(fewer).layers, ModelView.of(fewer).widths, strict=True):
        modules = [layer.get_submodule(experts.prefix), shared_expert(layer, experts)] if widths.experts else []
        for module in filter(None, modules):
            for name, parameter in module.named_parameters():
                is_output = name.startswith(("down_proj", SHARED_OUTPUT))
                if is_output and parameter.untyped_storage().data_ptr() in shared:
                    parameter.data = parameter.data.clone()


class _Checkpoint:
    """One file per finished layer, each whole or absent.

    Args:
        folder: Where the files lie; None keeps nothing.
        model: The base model.
        batches: The calibration text.
        kept: Numbers of the experts that stay.
        widths: Neurons that stay in them.
    """

    def __init__(
        self,
        folder: Path | None,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        kept: Mapping[int, Sequence[int]],
        widths: ExpertWidths,
    ) -> None:
        self._kept: KeptLayers | None = None
        if folder is not None:
            chosen = sorted((index, tuple(experts)) for index, experts in kept.items())
            key = resume_key(model, batches, "repair of experts", (chosen, astuple(widths)))
            self._kept = KeptLayers(folder / f"experts-{key[:16]}", key)

    def load(self, index: int) -> RepairedExperts | None:
        """Return a layer that an earlier run over the same inputs finished; None if there is none."""
        if self._kept is None or not is_main_process():
            return None
        found = self._kept.read(index, remedy="its experts are repaired again")
        if found is None:
            return None
        tensors, facts = found
        return RepairedExperts(**{name: tensors.get(name) for name in _TENSORS}, left=json.loads(facts["left"]))  # type: ignore[arg-type]

    def save(self, index: int, done: RepairedExperts) -> None:
        """Write a finished layer; its file appears whole.

        Raises:
            SaveError: The file can't be written.
        """
        if self._kept is None or not is_main_process():
            return
        tensors = {name: tensor for name in _TENSORS if (tensor := getattr(done, name)) is not None}
        self._kept.write(index, tensors, {"left": json.dumps(done.left)})
