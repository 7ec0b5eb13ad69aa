"""How much the inputs of each weight matter on a text: their mean squares, by which a quantiser weighs its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.storage.loading import LoadedModel

_SAMPLES, _LENGTH, _TOGETHER = 64, 512, 4


def measure_importance(
    loaded: LoadedModel,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    text_column: str | None,
    *,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """Return the mean square of each input, [inputs], by the name of the weight that reads it.

    Args:
        loaded: The model.
        data: Text of the domain; at most 32,768 tokens are read.
        text_column: Column with the text.
        seed: Seed of the choice of documents.

    Raises:
        DataError: There is too little text.
    """
    model = loaded.model
    samples = tokenize_samples(
        load_documents(data, text_column=text_column),
        loaded.tokenizer,
        num_samples=_SAMPLES,
        max_seq_length=_LENGTH,
        seed=seed,
        warn_if_short=False,
    )
    sums: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            squares = given[0].detach().float().flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [
        module.register_forward_pre_hook(note(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with evaluation_mode(model):
            for part in samples.split(_TOGETHER):
                model(input_ids=part.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: (total / samples.numel()).float().cpu().numpy() for name, total in sums.items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    if has_tied_head(model) and names[id(head)] in found:  # the file has one tensor for both
        found[names[id(embedding)]] = found[names[id(head)]]
    return found
