"""Which projections of a model the quantisers of weights know."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from hf_context_prune.errors import ExportError
from hf_context_prune.storage.loading import LoadedModel


def check_projections(loaded: LoadedModel, quantiser: str) -> None:
    """Refuse projections that a quantiser would leave as they are.

    Raises:
        ExportError: They are no ``nn.Linear``.
    """
    if any(isinstance(module, Conv1D) for module in loaded.model.modules()):
        raise ExportError(
            f"The projections of a {loaded.model.config.model_type} model are Conv1D modules, which {quantiser} does "
            f"not quantise. Export to onnx (--dtype int8 makes it smaller)."
        )
