"""How much the inputs of each weight matter on a text: their mean squares, by which a quantiser weighs its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from torch import nn

from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import DataError
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.modeling_context_pruned import is_transposed
from hf_context_prune.storage.loading import LoadedModel

_SAMPLES, _LENGTH, _TOGETHER = 64, 512, 4
_FEWEST_TOKENS = 1024


def measure_importance(
    loaded: LoadedModel, source: TextSource, *, seed: int, test_text: TextSource | None = None
) -> dict[str, NDArray[np.float32]]:
    """Return the mean square of each input, [inputs], by the name of the weight that reads it.

    Args:
        loaded: The model.
        source: Text of the domain; at most 32,768 tokens are read.
        seed: Seed of the choice of documents.
        test_text: Text that the result is measured on: documents that it contains are left out.

    Raises:
        DataError: There is too little text, or only the test text.
    """
    model = loaded.model
    if test_text is not None:
        kept, dropped = drop_overlapping(source, test_text)
        if not kept.documents:
            raise DataError(
                f"The {dropped} documents of {source.name} are in the test text, and what is measured there would say "
                f"nothing of other text. Give other text as importance data."
            )
        source = kept
    samples = tokenize_samples(
        source,
        loaded.tokenizer,
        num_samples=_SAMPLES,
        max_seq_length=min(_LENGTH, model.config.max_position_embeddings),
        seed=seed,
        warn_if_short=False,
    )
    if samples.numel() < _FEWEST_TOKENS:
        raise DataError(
            f"{source.name}: {samples.numel():,} tokens of text say too little of the importance of inputs; give at "
            f"least {_FEWEST_TOKENS:,}, better {_SAMPLES * _LENGTH:,}, or leave it out."
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
        if isinstance(module, nn.Linear) or is_transposed(module)
    ]
    try:
        with evaluation_mode(model):
            parts = samples.split(_TOGETHER)
            for part in tqdm(parts, desc="Measuring importance", unit="batch", name="hf_context_prune.importance"):
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
