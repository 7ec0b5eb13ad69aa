"""Repair of experts: one pass over the decoder layers with the stream of all experts and the stream of those that stay.

As in `prune`, the target at every layer is the base model's residual stream, so the refit absorbs the error made
upstream, too. `expert_repair` has the equations of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.errors import error_context
from hf_context_prune.modeling.experts import experts_spec
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY, Batch
from hf_context_prune.storage.kept_tensors import KeptLayers
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import broadcast_object, fail_together, is_main_process, shard

from .expert_repair import ExpertRepair, RepairedExperts
from .hidden_states import StreamStorage, capture_streams, choose_validation, count_positions


@fail_together()
@torch.no_grad()
def repair_experts(
    model: PreTrainedModel,
    fewer: PreTrainedModel,
    kept: Mapping[int, Sequence[int]],
    batches: Sequence[Batch],
    *,
    state_dir: Path | None = None,
    memory_limit: int | None = None,
) -> dict[int, float | None]:
    """Refit the output projections of the experts that stay, layer by layer, to what the base model computes.

    Under ``accelerate launch`` every process has to call it, with the same batches, as for `prune_sequentially`.

    Args:
        model: The base model; unchanged.
        fewer: The model without some experts, and with everything else; its experts' output projections are changed in
            place, in layers that lost experts. They must have memory of their own.
        kept: Numbers of the experts that stay, by the number of the layer.
        batches: As for `calibrate`.
        state_dir: Where finished layers are kept; a run over the same inputs resumes from there, to the same bits.
        memory_limit: As for `prune_sequentially`.

    Returns:
        The share of the squared error that is left in each layer, on text that was never fitted; None where there is
        too little text to withhold any.

    Raises:
        NumericsError: NaN or Inf, with the layer.
        SaveError: A finished layer can't be written.
    """
    view, slim, batches = ModelView.of(model), ModelView.of(fewer), list(batches)
    check_weights_finite(model)
    checkpoint = _Checkpoint(state_dir, model, batches, kept)
    left: dict[int, float | None] = {}
    device, diverged = layer_device(model), False
    with evaluation_mode(model, inference=False), evaluation_mode(fewer, inference=False):
        mine = shard(batches)
        storage = StreamStorage(count_positions(mine), limit=memory_limit, device=device)
        streams = capture_streams(view, mine, storage, validation=choose_validation(len(batches), VALIDATION_EVERY))
        for index in tqdm(
            range(len(view.layers)), desc="Repairing experts", unit="layer", name="hf_context_prune.experts"
        ):
            base, layer = view.layers[index], slim.layers[index]
            loses = slim.widths[index].experts < view.widths[index].experts
            with error_context(f"layer {index}"), in_hand(base, device):
                for stream in streams:
                    stream.base.copy_(stream.call(index, base, stream.base))
            if loses:
                found = broadcast_object(checkpoint.load(index))
                if found is None:
                    with error_context(f"layer {index}"), in_hand(layer, device):
                        found = ExpertRepair(slim, index, streams, storage).solve()
                    checkpoint.save(index, found)
                found.install(layer.get_submodule(experts_spec(slim.spec).prefix))
                left[index], diverged = found.left, True
            with in_hand(layer, device):
                for stream in streams:
                    after = stream.call(index, layer, stream.pruned, pruned=True) if diverged else stream.base
                    stream.pruned.copy_(after)
    return left


class _Checkpoint:
    """One file per finished layer, each whole or absent.

    Args:
        folder: Where the files lie; None keeps nothing.
        model: The base model.
        batches: The calibration text.
        kept: Numbers of the experts that stay.
    """

    def __init__(
        self, folder: Path | None, model: PreTrainedModel, batches: Sequence[Batch], kept: Mapping[int, Sequence[int]]
    ) -> None:
        self._kept: KeptLayers | None = None
        if folder is not None:
            key = resume_key(model, batches, "repair of experts", sorted((k, tuple(v)) for k, v in kept.items()))
            self._kept = KeptLayers(folder / f"experts-{key[:16]}", key)

    def load(self, index: int) -> RepairedExperts | None:
        """Return a layer that an earlier run over the same inputs finished; None if there is none."""
        if self._kept is None or not is_main_process():
            return None
        found = self._kept.read(index, remedy="its experts are repaired again")
        if found is None:
            return None
        tensors, facts = found
        return RepairedExperts(tensors["weight"], tensors.get("bias"), json.loads(facts["left"]))

    def save(self, index: int, done: RepairedExperts) -> None:
        """Write a finished layer; its file appears whole.

        Raises:
            SaveError: The file can't be written.
        """
        if self._kept is None or not is_main_process():
            return
        tensors = {"weight": done.weight} | ({} if done.bias is None else {"bias": done.bias})
        self._kept.write(index, tensors, {"left": json.dumps(done.left)})
