"""GGUF files for llama.cpp: native architectures for uniform widths, ``deci`` for Llama widths that vary."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from hf_context_prune.errors import ExportError, PruningWarning
from hf_context_prune.modeling.architectures import layers_of, spec_of
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.geometry import Geometry, read_geometry, widths_vary
from hf_context_prune.modeling.runtimes import GGUF_INTERVALS, GGUF_PERIODS, GGUF_VARIABLE
from hf_context_prune.modeling.specs import base_model_type
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.provenance import read_base_card
from hf_context_prune.utils.memory import fits_in_memory

from .arrays import as_file_array
from .formats import Importance
from .gguf_experts import check_experts, write_experts
from .gguf_families import FAMILIES, check_conventions
from .gguf_family import GgufFamily
from .gguf_rope import check_rope, write_rope
from .gguf_tensors import Tensors, full_groups, key_value_heads
from .gguf_tokenizer import check_tokenizer, write_tokenizer
from .k_quants import MIXTURES, bytes_of, quantize, type_of
from .llama_cpp import LlamaCppRuntime
from .modelfile import write_modelfile

FILE_NAME = "model.gguf"

_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_TYPES |= {name: (mixture.kind, mixture.file_type) for name, mixture in MIXTURES.items()}
_EXACT = (
    *("conv1d.weight", "shortconv.conv.weight", "ssm_a", "ssm_d", "ssm_norm.weight", "ssm_dt.bias"),
    *("ffn_gate_inp.weight", "ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias"),
)
"""Ends of the names of tensors that llama.cpp takes in float32 alone."""
_Q8_BLOCK = 32
_NEURONS = {"f16": 64, "bf16": 64, "q8_0": _Q8_BLOCK}
"""MLP widths are filled up to a multiple of this with neurons that are zero. llama.cpp takes 64 16-bit inputs at a time
(AVX-512; 32 with AVX2 and NEON) and the rest of a row one by one, which is several times as slow."""
_K_BLOCKS = (256, 32)
"""The same for k-quants: the multiple that makes the smaller file."""


def check(loaded: LoadedModel, dtype: str) -> None:
    """Refuse a model that llama.cpp has no architecture for.

    Raises:
        ExportError: The family, its variable widths, rope, activation, biases or tokenizer can't be written.
    """
    config = loaded.model.config
    family = base_model_type(config.model_type)
    if family not in FAMILIES:
        raise ExportError(
            f"GGUF is written for {', '.join(FAMILIES)}, but this is a {family} model. Export to another format; "
            f"docs/families.md says which are written for it."
        )
    geometry = _geometry(loaded, dtype)
    variable = widths_vary(geometry.layers)
    if variable and family not in GGUF_VARIABLE:
        raise ExportError(
            f"llama.cpp has no {family} architecture with widths that vary from layer to layer (only for "
            f"{', '.join(GGUF_VARIABLE)}). Prune to uniform widths (prune --native-architecture), or export to another "
            f"format."
        )
    biases = sorted(
        {name.rpartition(".")[0].rpartition(".")[2] for name in loaded.model.state_dict() if ".bias" in name}
    )
    if variable and biases:
        raise ExportError(
            f"llama.cpp's architecture for variable widths has no biases, but {', '.join(biases)} have biases. Prune "
            f"to uniform widths (prune --native-architecture), or export to another format."
        )
    conventions = FAMILIES[family]
    check_conventions(config, family)
    check_experts(config, spec_of(config), conventions)
    check_rope(config, family, conventions)
    if conventions.full_heads:
        full_groups(geometry)
    for _ in Tensors(loaded.model, geometry, conventions.arch, conventions).sources():
        pass  # all have a name
    check_tokenizer(loaded.tokenizer)


def write(loaded: LoadedModel, folder: Path, dtype: str, importance: Importance | None = None) -> None:
    """Write the GGUF file, and a Modelfile for Ollama.

    Args:
        loaded: The model.
        folder: An empty folder.
        dtype: Data type of the weights.
        importance: Mean square of each input, by the name of the weight that reads it; for k-quants.
    """
    geometry, family = _geometry(loaded, dtype), FAMILIES[base_model_type(loaded.model.config.model_type)]
    arch = MODEL_ARCH.DECI if widths_vary(geometry.layers) else family.arch
    file_type = _TYPES[dtype][1]
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    spools = not fits_in_memory(weights)  # the writer holds all tensors, else in a temporary file
    writer = GGUFWriter(folder / FILE_NAME, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=spools)
    try:
        _write_sizes(writer, loaded, geometry, family)
        _write_licence(writer, read_base_card(loaded))
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        write_tokenizer(writer, loaded.model, loaded.tokenizer, rows)
        blocks = _Blocks(loaded, dtype, importance or {})
        for source, name, values in Tensors(loaded.model, geometry, arch, family):
            chosen, data = blocks.of(source, name, values)
            # The writer can't tell the type of a quantised array; it can tell numpy's types.
            raw = None if chosen in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) else chosen
            writer.add_tensor(name, as_file_array(data), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    blocks.warn_of_fallback()
    write_modelfile(folder, FILE_NAME, loaded.tokenizer)


def load(folder: Path) -> LlamaCppRuntime:
    """Open the file in llama.cpp, with as many threads as torch has."""
    return LlamaCppRuntime(folder / FILE_NAME, threads=torch.get_num_threads())


class _Blocks:
    """The data of each tensor, in the type of the file."""

    def __init__(self, loaded: LoadedModel, dtype: str, importance: Importance) -> None:
        self._dtype, self._mixture, self._importance = dtype, MIXTURES.get(dtype), importance
        self._layers, self._tied = loaded.model.config.num_hidden_layers, has_tied_head(loaded.model)
        self._all, self._other = 0, Counter[str]()

    def of(
        self, source: str, name: str, values: NDArray[np.float32]
    ) -> tuple[GGMLQuantizationType, NDArray[np.generic]]:
        """Return type and data of a tensor.

        Args:
            source: Its name in the model.
            name: Its name in llama.cpp.
            values: Its values.
        """
        if name.endswith(_EXACT):
            return GGMLQuantizationType.F32, values
        if self._mixture is None:
            kind = _type_of(values, _TYPES[self._dtype][0])
            return kind, gguf.quants.quantize(values, kind)
        kind, packed = type_of(name, values.shape, self._mixture, layers=self._layers, tied=self._tied)
        if values.ndim == 1 or kind is GGMLQuantizationType.F16:
            data: NDArray[np.generic] = gguf.quants.quantize(values, kind)
        else:
            rows = values.reshape(-1, values.shape[-1])  # of experts, all one after the other
            data = quantize(rows, kind, _filled(self._importance.get(source), values.shape[-1]))
            data = data.reshape(*values.shape[:-1], -1)
        self._all += data.nbytes
        self._other[kind.name] += 0 if packed else data.nbytes
        return kind, data

    def warn_of_fallback(self) -> None:
        """Say how much is in other types because blocks of a k-quant don't divide its rows."""
        if total := sum(self._other.values()):
            types = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in self._other.most_common() if size)
            warnings.warn(
                f"{total / 1e6:,.1f} of {self._all / 1e6:,.1f} MB of weights have rows that blocks of 256 don't "
                f"divide, so they have more bits than {self._dtype} says ({types} MB). Prune with --round-to 256 for "
                f"the MLP; a hidden size that 256 does not divide can't be helped.",
                PruningWarning,
                stacklevel=2,
            )


def _filled(importance: NDArray[np.float32] | None, inputs: int) -> NDArray[np.float32] | None:
    """Return the importance of all inputs: of neurons that are zero in the file, the mean of the others."""
    if importance is None:
        return None
    return np.pad(importance, (0, inputs - len(importance)), constant_values=importance.mean()).astype(np.float32)


def _geometry(loaded: LoadedModel, dtype: str) -> Geometry:
    """Return the sizes of the file: those of the model, with MLP widths filled up."""
    config = loaded.model.config
    geometry = read_geometry(config, spec_of(config))
    layers = (
        replace(layer, neurons=_filled_up(layer.neurons, geometry.hidden_size, dtype)) for layer in geometry.layers
    )
    return replace(geometry, layers=tuple(layers))


def _filled_up(neurons: int, hidden: int, dtype: str) -> int:
    """Return the neurons that a layer has in the file."""
    if (mixture := MIXTURES.get(dtype)) is None:
        multiple = _NEURONS[dtype]
        return -(-neurons // multiple) * multiple
    widths = [-(-neurons // multiple) * multiple for multiple in _K_BLOCKS]
    return min(widths, key=lambda width: bytes_of(((width, hidden), (width, hidden), (hidden, width)), mixture.kind))


def _write_sizes(writer: GGUFWriter, loaded: LoadedModel, geometry: Geometry, family: GgufFamily) -> None:
    config = loaded.model.config
    name = base_model_type(config.model_type)
    neurons: Any = [widths.neurons for widths in geometry.layers]
    kv_heads: Any = key_value_heads(config, spec_of(config))
    if family.full_heads:
        kv_heads = [count and full_groups(geometry) for count in kv_heads]
    heads: Any = [count * geometry.queries_per_group for count in kv_heads]
    if not widths_vary(geometry.layers):
        neurons, heads = max(neurons), max(heads)
        kv_heads = max(kv_heads) if name in GGUF_INTERVALS or len(set(kv_heads)) == 1 else kv_heads
    writer.add_name(loaded.name)
    writer.add_block_count(len(geometry.layers))
    # A sliding window that llama.cpp does not have: beyond it, the file would give other results than the model.
    window = getattr(config, "sliding_window", None) if _slides(config) and name not in GGUF_PERIODS else None
    writer.add_context_length(min(filter(None, (config.max_position_embeddings, window))))
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_feed_forward_length(neurons or config.intermediate_size)
    write_experts(writer, config, spec_of(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    write_rope(writer, loaded.model, geometry, family)
    if name in GGUF_INTERVALS:
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    for method, source in family.numbers:
        values = [getattr(config, name) for name in source.split("*")] if isinstance(source, str) else [source]
        if None not in values:
            getattr(writer, f"add_{method}")(math.prod(values) if len(values) > 1 else values[0])
    if family.activation == ("xielu",):
        _write_xielu(writer, loaded.model)
    writer.add_vocab_size(loaded.model.get_input_embeddings().weight.shape[0])


def _write_xielu(writer: GGUFWriter, model: Any) -> None:  # noqa: ANN401
    """Write the numbers of the activation of every layer, which transformers keeps as tensors."""
    spec = spec_of(model.config)
    functions = [layer.get_submodule(spec.activation) for layer in layers_of(model, spec)]
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        getattr(writer, f"add_xielu_{name}")([getattr(function, name).item() for function in functions])


def _write_licence(writer: GGUFWriter, card: Mapping[str, Any]) -> None:
    """Write the licence and languages that the card of the model states."""
    add = {"license": writer.add_license, "license_name": writer.add_license_name}
    add["license_link"] = writer.add_license_link
    for field, write_field in add.items():
        if isinstance(card.get(field), str):
            write_field(card[field])
    if (languages := card.get("language")) is not None:
        writer.add_languages([languages] if isinstance(languages, str) else languages)


def _slides(config: Any) -> bool:  # noqa: ANN401
    return bool(getattr(config, "use_sliding_window", True))


def _type_of(values: NDArray[np.float32], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type of a tensor: float32 for vectors, and F16 for rows that don't divide into Q8_0 blocks."""
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return kind
