"""Int8 weights by torchao, in a folder that `AutoModelForCausalLM` opens wherever torchao is installed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_context_prune.storage.loading import LoadedModel

from .quanto import check_projections
from .runtime import TorchRuntime


def check(loaded: LoadedModel, dtype: str) -> None:
    """Refuse a model that would not get smaller.

    Raises:
        ExportError: Its projections, or those of its experts, are not ``nn.Linear`` modules.
    """
    check_projections(loaded, "torchao")


def write(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Quantise the projections and save them with the tokenizer."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    with tempfile.TemporaryDirectory() as place:
        source = loaded.folder
        if loaded.wrapper is not None:  # its folder holds more than the text part
            source = Path(place)
            loaded.model.save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            dtype=loaded.model.dtype,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
            device_map="cpu",
            trust_remote_code=False,
        )
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def load(folder: Path) -> TorchRuntime:
    """Open the quantised model on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,  # a manifest can also list a pickle
        trust_remote_code=False,
        device_map="cpu",
    )
    return TorchRuntime(model.eval())
