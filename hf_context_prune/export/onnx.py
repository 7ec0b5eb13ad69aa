"""ONNX: one graph with a KV cache that reads a prompt (empty cache) and decodes, for ONNX Runtime.

The exporter of transformers makes the graph. All its sizes are dynamic: sequences, tokens per step, and length of the
cache; widths and KV heads may vary from layer to layer. `OnnxRuntime` runs it with onnxruntime and numpy alone.
"""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.generation import get_end_token_ids, with_plain_generation
from hf_context_prune.modeling.runtimes import GGUF_FAMILIES, has_expert_tensors, why_not_onnx
from hf_context_prune.modeling.specs import base_model_type
from hf_context_prune.storage.loading import LoadedModel

from .arrays import as_file_array
from .onnx_attention import grouped_attention
from .onnx_int8 import quantise

GRAPH_NAME = "model.onnx"
_CACHE = "cache.layers."


def check(loaded: LoadedModel, dtype: str) -> None:
    """Refuse layers without attention, and sliding windows.

    The cache of a window drops tokens outside of it, which a traced graph can't do.

    Raises:
        ExportError: A layer has no attention, or a window that is shorter than the model's positions.
    """
    config = loaded.model.config
    family = base_model_type(config.model_type)
    others = ["gguf"] if family in GGUF_FAMILIES else []
    others += [] if has_expert_tensors(config) else ["quanto or torchao"]
    elsewhere = f"Export to {', '.join(others)}."
    if (why := why_not_onnx(config)) is not None:
        raise ExportError(f"{loaded.name} is a {family} model, which can't be exported to ONNX: {why}. {elsewhere}")
    cache = DynamicCache(config=config)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise ExportError(
            f"{loaded.name} has layers with a sliding window of {config.sliding_window} tokens, which the ONNX graph "
            f"can't hold. {elsewhere} Or, if your texts are not longer "
            f"than the window, let all layers see all tokens in config.json (sliding_window null, or layer_types with "
            f"full_attention alone) and prune the model again."
        )


def write(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Export the graph with the configs and the tokenizer."""
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    model = loaded.model
    ids = torch.arange(12).reshape(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # padded, so that the mask is not traced away
    # Each operator costs microseconds, a large part of a small model's token: fused graphs have half as many.
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    with _quiet(), grouped_attention(model):
        plain = with_plain_generation(model, new_tokens=2)
        stages = decompose_for_generation(plain, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
        exported = OnnxExporter().export(*stages["decode"], config=config)
    _tidy(exported.program)
    ExportedModel(
        exported.components, exported.export_format, config=model.config, generation_config=model.generation_config
    ).save_pretrained(folder)
    if dtype == "int8":
        with _quiet():
            quantise(folder / GRAPH_NAME)
    loaded.tokenizer.save_pretrained(folder)


def load(folder: Path) -> OnnxRuntime:
    """Open the graph in ONNX Runtime on the CPU, with as many threads as torch has."""
    from transformers import GenerationConfig

    class Ends:
        generation_config = GenerationConfig.from_pretrained(folder)
        config = None

    return OnnxRuntime(folder, threads=torch.get_num_threads(), ends=get_end_token_ids(Ends))


class OnnxRuntime:
    """A graph in ONNX Runtime.

    Args:
        folder: Folder of the graph.
        threads: Threads of one operator; 0 takes the default of ONNX Runtime.
        ends: Token ids that end a text.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, ends: Sequence[int] = ()) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = Path(folder) / GRAPH_NAME
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._empty = {
            spec.name: np.zeros((spec.shape[1], 0, spec.shape[3]), dtype=np.float32)
            for spec in self._session.get_inputs()
            if _CACHE in spec.name
        }
        self._ends = set(ends)

    def step(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: dict[str, NDArray[np.float32]] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Run the graph on the next tokens.

        Args:
            ids: [sequence, token].
            mask: 1 for a token and 0 for padding [sequence, cached and new tokens].
            cache: The cache that the last step returned; None before the first step.

        Returns:
            Logits [sequence, token, vocabulary], and the cache including these tokens.
        """
        positions = np.maximum(mask.cumsum(axis=-1) - 1, 0)[:, -ids.shape[1] :]
        if cache is None:
            cache = {name: np.repeat(empty[None], len(ids), axis=0) for name, empty in self._empty.items()}
        logits, *new = self._session.run(
            None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        )
        names = [spec.name.replace("output.", "input.", 1) for spec in self._session.get_outputs()[1:]]
        return logits, dict(zip(names, new, strict=True))

    def generate_batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Return greedy continuations of several prompts; shorter prompts are padded on the left."""
        width = max(map(len, prompts))
        ids = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=np.int64)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
        texts: list[list[int]] = [[] for _ in prompts]
        running, cache = [True] * len(prompts), None
        for _ in range(new_tokens):
            logits, cache = self.step(ids, mask, cache)
            ids = logits[:, -1:].argmax(axis=-1)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            for row, token in enumerate(ids[:, 0].tolist()):
                running[row] = running[row] and token not in self._ends
                if running[row]:
                    texts[row].append(token)
            if not any(running):
                break
        return texts

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Continue a text as [`Runtime`][] does."""
        return self.generate_batch([ids], new_tokens)[0]

    def time_generation(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Time a generation as [`Runtime`][] does."""
        ids = np.array([list(prompt) for prompt in prompts], dtype=np.int64)
        mask = np.ones((len(ids), ids.shape[1] + new_tokens), dtype=np.int64)
        times, cache = [time.perf_counter()], None
        for end in range(ids.shape[1], ids.shape[1] + new_tokens + 1):
            logits, cache = self.step(ids, mask[:, :end], cache)
            ids = logits[:, -1:].argmax(axis=-1)
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """Return losses as [`Runtime`][] does: the first half of the tokens as a prompt, the rest in one step."""
        tokens = np.array([list(ids)], dtype=np.int64)
        half = max(tokens.shape[1] // 2, 1)
        first, cache = self.step(tokens[:, :half], np.ones_like(tokens[:, :half]))
        parts = [first]
        if half < tokens.shape[1]:
            parts.append(self.step(tokens[:, half:], np.ones_like(tokens), cache)[0])
        scores = torch.log_softmax(torch.from_numpy(np.concatenate(parts, axis=1)[0, :-1]), dim=-1)
        return [-value for value in scores.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1).tolist()]

    def encode(self, text: str) -> list[int] | None:
        """Return None: the tokenizer is the one of transformers."""
        return None

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _tidy(program: Any) -> None:  # noqa: ANN401
    """Name the axes, size the inputs of the cache, drop source locations, and have arrays written with every error."""
    import onnx_ir

    graph = program.graph
    sizes = {value.name.partition(".")[2]: value.shape for value in graph.outputs}
    axes = {"input_ids": ["batch", "tokens"], "position_ids": ["batch", "tokens"], "attention_mask": ["batch", "total"]}
    for value in graph.inputs:
        if value.name in axes:
            value.shape = onnx_ir.Shape(axes[value.name])
        elif _CACHE in value.name:
            size = sizes[value.name.partition(".")[2]]
            value.shape = onnx_ir.Shape(["batch", size[1], "cached", size[3]])
    for value in graph.outputs:
        if _CACHE in value.name:
            value.shape = onnx_ir.Shape(["batch", value.shape[1], "total", value.shape[3]])
        else:
            value.shape = onnx_ir.Shape(["batch", "tokens", value.shape[2]])
    for node in graph:
        node.metadata_props.clear()
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(getattr(tensor, "raw", None), torch.Tensor):  # those are written through the file object
            value.const_value = onnx_ir.Tensor(as_file_array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' own messages (deprecations inside torch, progress on stdout)."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "onnxruntime", "root")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
