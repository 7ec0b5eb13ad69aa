"""Quantised weights by Optimum's Quanto: int8 or int4, in a folder that `QuantizedModelForCausalLM` opens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.runtimes import has_expert_tensors
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.compat import unwrap_quanto

from .runtime import TorchRuntime

_SMALLEST_GROUP = 32  # inputs that share a scale; Quanto takes the largest of 128, 96, 64, 32 that divides


def check(loaded: LoadedModel, dtype: str) -> None:
    """Refuse a model that would not get smaller.

    Raises:
        ExportError: Its projections, or those of its experts, are not ``nn.Linear`` modules.
    """
    check_projections(loaded, "Quanto")


def check_projections(loaded: LoadedModel, quantiser: str) -> None:
    """Refuse projections that a quantiser would leave as they are.

    Args:
        loaded: The model.
        quantiser: Name of the quantiser, for the message.

    Raises:
        ExportError: The projections, or those of experts, are not ``nn.Linear`` modules.
    """
    if has_expert_tensors(loaded.model.config):
        raise ExportError(
            f"The experts of a {loaded.model.config.model_type} model are one tensor for all, which {quantiser} leaves "
            f"as it is, so the model would hardly get smaller. Export to gguf; with --dtype q8_0 it gets smaller."
        )
    if any(isinstance(module, Conv1D) for module in loaded.model.modules()):
        raise ExportError(
            f"The projections of a {loaded.model.config.model_type} model are Conv1D modules, which {quantiser} does "
            f"not quantise. Export to onnx; with --dtype int8 it gets smaller."
        )


def write(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Quantise the projections **in place** and save them with the tokenizer.

    The head is not quantised: where it is tied to the embedding, two copies would make the folder larger. With int4,
    projections whose inputs can't be divided into groups become int8, because a single scale for a whole row of int4
    weights loses far more. Widths at multiples of 32 (``--round-to 32``) have groups everywhere.
    """
    from optimum.quanto import QuantizedModelForCausalLM, freeze, qint4, qint8, quantize

    model, done = loaded.model, ["lm_head"]
    if dtype == "int4" and (wide := _ungrouped(model)):
        quantize(model, weights=qint8, include=wide, exclude="lm_head")
        done += wide
    quantize(model, weights={"int8": qint8, "int4": qint4}[dtype], exclude=done)
    freeze(model)
    # Quanto reads tensors back by the names of the modules; transformers would save GPT-NeoX's head under an older one.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    QuantizedModelForCausalLM(model).save_pretrained(folder)
    (folder / "README.md").unlink()  # the Hub client's placeholder for a model card
    loaded.tokenizer.save_pretrained(folder)


def load(folder: Path) -> TorchRuntime:
    """Open the quantised model on the CPU."""
    from optimum.quanto import QuantizedModelForCausalLM

    # Without trust_remote_code=False, transformers would ask on the terminal whether to run a folder's code.
    wrapped = QuantizedModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return TorchRuntime(unwrap_quanto(wrapped))


def _ungrouped(model: Any) -> list[str]:  # noqa: ANN401
    """Return the projections whose number of input features is not a multiple of the smallest group."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and module.in_features % _SMALLEST_GROUP]
