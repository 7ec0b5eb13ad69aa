"""GGUF files for llama.cpp: native architectures for uniform widths, ``deci`` for Llama widths that vary."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from hf_context_prune.errors import ExportError, PruningWarning
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.geometry import Geometry, read_geometry
from hf_context_prune.modeling.runtimes import GGUF_VARIABLE
from hf_context_prune.modeling.specs import base_model_type
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.provenance import read_base_card
from hf_context_prune.utils.memory import fits_in_memory

from .arrays import as_file_array
from .formats import Importance
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
_Q8_BLOCK = 32
_NEURONS = {"f16": 64, "bf16": 64, "q8_0": _Q8_BLOCK}
"""MLP widths are filled up to a multiple of this with neurons that are zero. llama.cpp takes 64 16-bit inputs at a time
(AVX-512; 32 with AVX2 and NEON) and the rest of a row one by one, which is several times as slow."""
_K_BLOCKS = (256, 32)
"""The same for k-quants: the multiple that makes the smaller file."""


@dataclass(frozen=True)
class _Family:
    """Name and conventions of an architecture in llama.cpp.

    transformers rotates feature i of a query or key head with i + half; llama.cpp's older architectures rotate
    neighbours (`interleaved`). A norm multiplies by its weight plus `norm_offset`, which is then added to the weight.
    """

    arch: MODEL_ARCH
    interleaved: bool
    activation: tuple[str, ...] = ("silu",)
    norm_offset: float = 0.0


_FAMILIES = {
    "llama": _Family(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": _Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": _Family(MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": _Family(MODEL_ARCH.QWEN3, interleaved=False),
    "smollm3": _Family(MODEL_ARCH.SMOLLM3, interleaved=True),
    "granite": _Family(MODEL_ARCH.GRANITE, interleaved=True),
    "gemma": _Family(MODEL_ARCH.GEMMA, interleaved=False, activation=("gelu_pytorch_tanh", "gelu"), norm_offset=1.0),
}


def check(loaded: LoadedModel, dtype: str) -> None:
    """Refuse a model that llama.cpp has no architecture for.

    Raises:
        ExportError: The family, its variable widths, rope, activation, biases or tokenizer can't be written.
    """
    config = loaded.model.config
    family = base_model_type(config.model_type)
    if family not in _FAMILIES:
        raise ExportError(
            f"GGUF is written for {', '.join(_FAMILIES)}, but this is a {family} model. Export to another format, "
            f"such as onnx."
        )
    variable = _is_variable(_geometry(loaded, dtype))
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
    if config.hidden_act not in _FAMILIES[family].activation:
        raise ExportError(
            f"llama.cpp computes {family} with {_FAMILIES[family].activation[0]}, but hidden_act is "
            f"{config.hidden_act!r}. Export to another format."
        )
    if family == "smollm3" and any(bool(use) != bool((i + 1) % 4) for i, use in enumerate(config.no_rope_layers)):
        raise ExportError(
            f"llama.cpp rotates all layers of smollm3 except every fourth, but no_rope_layers is "
            f"{config.no_rope_layers}. Export to another format."
        )
    kind, kinds = _rope_kind(config), ("default", "linear", "llama3") if family in GGUF_VARIABLE else ("default",)
    if kind not in kinds:
        raise ExportError(
            f"The rope type {kind!r} of a {family} model can't be written to GGUF; allowed are {', '.join(kinds)}. "
            f"Export to another format."
        )
    check_tokenizer(loaded.tokenizer)


def write(loaded: LoadedModel, folder: Path, dtype: str, importance: Importance | None = None) -> None:
    """Write the GGUF file, and a Modelfile for Ollama.

    Args:
        loaded: The model.
        folder: An empty folder.
        dtype: Data type of the weights.
        importance: Mean square of each input, by the name of the weight that reads it; for k-quants.
    """
    geometry, family = _geometry(loaded, dtype), _FAMILIES[base_model_type(loaded.model.config.model_type)]
    arch = MODEL_ARCH.DECI if _is_variable(geometry) else family.arch
    file_type = _TYPES[dtype][1]
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    spools = not fits_in_memory(weights)  # the writer holds all tensors, else in a temporary file
    writer = GGUFWriter(folder / FILE_NAME, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=spools)
    try:
        _write_sizes(writer, loaded, geometry)
        _write_licence(writer, read_base_card(loaded))
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        write_tokenizer(writer, loaded.model, loaded.tokenizer, rows)
        blocks = _Blocks(loaded, dtype, importance or {})
        for source, name, values in _tensors(loaded, geometry, arch, family):
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
        if self._mixture is None:
            kind = _type_of(values, _TYPES[self._dtype][0])
            return kind, gguf.quants.quantize(values, kind)
        kind, packed = type_of(name, values.shape, self._mixture, layers=self._layers, tied=self._tied)
        if values.ndim == 1 or kind is GGMLQuantizationType.F16:
            data: NDArray[np.generic] = gguf.quants.quantize(values, kind)
        else:
            data = quantize(values, kind, _filled(self._importance.get(source), values.shape[-1]))
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


def _is_variable(geometry: Geometry) -> bool:
    return len(set(geometry.layers)) > 1


def _rope_kind(config: Any) -> str:  # noqa: ANN401
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def _write_sizes(writer: GGUFWriter, loaded: LoadedModel, geometry: Geometry) -> None:
    config = loaded.model.config
    neurons = [widths.neurons for widths in geometry.layers]
    kv_heads = [widths.kv_groups for widths in geometry.layers]
    heads = [count * geometry.queries_per_group for count in kv_heads]
    if not _is_variable(geometry):
        neurons, kv_heads, heads = neurons[0], kv_heads[0], heads[0]  # type: ignore[assignment]
    writer.add_name(loaded.name)
    writer.add_block_count(len(geometry.layers))
    # A sliding window is not written: beyond it, the file would give other results than the model.
    window = getattr(config, "sliding_window", None) if _slides(config) else None
    writer.add_context_length(min(filter(None, (config.max_position_embeddings, window))))
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_attention_scale(config.attention_multiplier)
    writer.add_vocab_size(loaded.model.get_input_embeddings().weight.shape[0])


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


def _tensors(
    loaded: LoadedModel, geometry: Geometry, arch: MODEL_ARCH, family: _Family
) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """Yield the names of llama.cpp's tensors, in the model and in the file, and their float32 values."""
    names = gguf.get_tensor_name_map(arch, len(geometry.layers))
    tied = has_tied_head(loaded.model)
    neurons = dict(_neuron_axes(loaded.model, geometry))
    for name, parameter in loaded.model.state_dict().items():
        if tied and name.startswith("lm_head."):
            continue  # llama.cpp uses the embedding where the head is missing
        values = parameter.float()
        if family.interleaved and any(f".{role}_proj." in name for role in "qk"):
            values = _neighbours(values, geometry.head_dim)
        if name.endswith("norm.weight"):
            values = values + family.norm_offset
        if name in neurons:
            axis, width = neurons[name]
            missing = (0, width - values.shape[axis])
            values = torch.nn.functional.pad(values, missing if axis == values.ndim - 1 else (0, 0, *missing))
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ExportError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]} has no tensor for {name}.")
        yield name, new, values.numpy()
    if _rope_kind(loaded.model.config) != "default":
        yield "", "rope_freqs.weight", _rope_factors(loaded.model, geometry.head_dim)


def _neuron_axes(model: Any, geometry: Geometry) -> Iterator[tuple[str, tuple[int, int]]]:  # noqa: ANN401
    """Yield the name of each tensor that has neurons, with their axis and their number in the file."""
    spec = spec_of(model.config)
    for index, layer in enumerate(geometry.layers):
        for path in spec.mlp_inputs:
            yield f"{spec.layers}.{index}.{path}.weight", (0, layer.neurons)
            yield f"{spec.layers}.{index}.{path}.bias", (0, layer.neurons)
        yield f"{spec.layers}.{index}.{spec.mlp_output}.weight", (1, layer.neurons)


def _neighbours(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the features of every head so that features rotated together, i and i + half, are neighbours."""
    halves = values.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(values.shape)


def _rope_factors(model: Any, head_dim: int) -> NDArray[np.float32]:  # noqa: ANN401
    """Return the divisor of each plain frequency: the form in which linear and Llama 3 scaling are written."""
    used = model.get_decoder().rotary_emb.inv_freq.double()
    theta = float(model.config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors: NDArray[np.float32] = (plain / used.cpu()).float().numpy()
    return factors


def _type_of(values: NDArray[np.float32], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type of a tensor: float32 for vectors, and F16 for rows that don't divide into Q8_0 blocks."""
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return kind
