"""Keep the zeros that thresholds left: whole rows and columns of weights stay zero while a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_context_prune.modeling.modeling_context_pruned import is_transposed


class KeepZeros(TrainerCallback):
    """Hold rows and columns of weights that are zero as a whole at zero, and the zero biases of such rows.

    Thresholds pruned them, and nothing else would hold them. Of a layer with adapters, W + B A, the rows of B and the
    columns of A are held instead.

    Args:
        model: The model to be trained, with its adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.zeros: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.biases: list[tuple[torch.Tensor, torch.Tensor]] = []
        adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if adapted:
            for layer in adapted:
                self._hold_adapters(layer)
            self._apply()  # A begins at random
            return
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim == 2:
                rows, columns = _find_zeros(weight)
                if bool(rows.any()) or bool(columns.any()):
                    self.zeros.append((weight, rows, columns))
        for module in model.modules():
            self._hold_biases(module)

    def _hold_adapters(self, layer: LoraLayer) -> None:
        base = layer.get_base_layer()
        rows, columns = _find_zeros(base.weight.T if is_transposed(base) else base.weight)
        if bool(rows.any()) or bool(columns.any()):
            for name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [rank, in], [out, rank]
                nothing = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
                self.zeros += [(a, nothing, columns), (b, rows, nothing)]

    def _hold_biases(self, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and bias is not None and weight.ndim == 2 and bias.requires_grad:
            rows, columns = _find_zeros(weight)
            silent = (columns if is_transposed(module) else rows) & (bias == 0)
            if bool(silent.any()):
                self.biases.append((bias, silent))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Set the held entries back to zero after the optimizer moved them."""
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for weight, rows, columns in self.zeros:
            weight[rows] = 0
            weight[:, columns] = 0
        for bias, silent in self.biases:
            bias[silent] = 0


def _find_zeros(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows and which columns of a matrix are zero as a whole, bool [rows] and [columns]."""
    zero = weight == 0
    return zero.all(dim=1), zero.all(dim=0)
