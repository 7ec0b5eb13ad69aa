"""The k-quants of llama.cpp: which tensor gets which type, and its own kernels, which write the blocks.

A k-quant holds 256 inputs of a row in one block with two levels of scales. Rows of another length fall back to the
nearest type with blocks of 32, and those to F16, as in llama.cpp's quantiser (``llama_tensor_get_type``, whose mixtures
these are: the tensors that suffer most from few bits get more).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from numpy.typing import NDArray

from hf_context_prune.utils.compat import quantize_rows

_FALLBACK = {
    Kind.Q2_K: Kind.IQ4_NL,
    Kind.Q3_K: Kind.IQ4_NL,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
_SMALL_BLOCK = 32
"""Inputs of a block of the types that k-quants fall back to."""
_ROWS = 256
"""Rows that one thread writes at a time."""


@dataclass(frozen=True)
class Mixture:
    """The types of one data type.

    Attributes:
        file_type: How the file calls itself.
        kind: Type of all tensors that nothing else names.
        better: Type of those parts in the first and last eighth of the layers, and in every third between.
        parts: Names of those parts.
        others: Types of other parts, in all layers.
    """

    file_type: LlamaFileType
    kind: Kind
    better: Kind | None = None
    parts: tuple[str, ...] = ()
    others: Mapping[str, Kind] = field(default_factory=dict)


_VALUES, _DOWN, _ATTENTION = "attn_v.weight", "ffn_down.weight", "attn_output.weight"
MIXTURES = {
    "q6_k": Mixture(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K),
    "q5_k_m": Mixture(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K, Kind.Q6_K, (_VALUES, _DOWN)),
    "q4_k_m": Mixture(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K, (_VALUES, _DOWN)),
    "q3_k_m": Mixture(
        LlamaFileType.MOSTLY_Q3_K_M,
        Kind.Q3_K,
        others={_VALUES: Kind.Q5_K, _DOWN: Kind.Q4_K, _ATTENTION: Kind.Q4_K},
    ),
    "q2_k": Mixture(
        LlamaFileType.MOSTLY_Q2_K,
        Kind.Q2_K,
        others={_VALUES: Kind.Q4_K, _DOWN: Kind.Q3_K, _ATTENTION: Kind.Q3_K},
    ),
}


def type_of(name: str, shape: Sequence[int], mixture: Mixture, *, layers: int, tied: bool) -> tuple[Kind, bool]:
    """Return the type of a tensor, and whether it is the one that the mixture gives it.

    Args:
        name: llama.cpp's name, such as ``blk.3.ffn_down.weight``.
        shape: Of the tensor.
        mixture: The data type.
        layers: Layers of the model.
        tied: Whether the embedding is the LM head, too.
    """
    if len(shape) == 1:
        return Kind.F32, True
    kind = mixture.kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = Kind.Q6_K
    elif name.startswith("blk."):
        _, layer, part = name.replace("_exps", "").replace("_shexp", "").split(".", 2)
        kind = mixture.others.get(part, kind)
        if mixture.better is not None and part in mixture.parts and _has_more_bits(int(layer), layers):
            kind = mixture.better
    chosen = _fitting(kind, shape[-1])
    return chosen, chosen is kind


def bytes_of(shapes: Iterable[tuple[int, int]], kind: Kind) -> int:
    """Return the bytes of matrices, each [rows, inputs], that are to have a type."""
    total = 0
    for rows, inputs in shapes:
        block, size = gguf.GGML_QUANT_SIZES[_fitting(kind, inputs)]
        total += rows * inputs // block * size
    return total


def _fitting(kind: Kind, inputs: int) -> Kind:
    """Return the type, or the one that rows of so many inputs fall back to."""
    if inputs % gguf.GGML_QUANT_SIZES[kind][0]:
        return Kind.F16 if inputs % _SMALL_BLOCK else _FALLBACK[kind]
    return kind


def _has_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def quantize(
    values: NDArray[np.float32], kind: Kind, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return the blocks of a tensor, [rows, bytes].

    Args:
        values: [rows, inputs].
        kind: A type of blocks.
        importance: Mean square of each input on a text, [inputs], by which its errors count; None: all alike.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, inputs = values.shape
    blocks = np.empty((rows, inputs // block * size), np.uint8)
    values = np.ascontiguousarray(values, np.float32)

    def write(start: int) -> None:
        part = slice(start, start + _ROWS)
        quantize_rows(int(kind), values[part], blocks[part], importance)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(write, range(0, rows, _ROWS)))
    return blocks
