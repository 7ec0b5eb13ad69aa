"""Private parts of other libraries that this package uses, one function or class each.

A new release of `transformers`, `torch` or `optimum-quanto` may change any of them: ``tests/unit/test_compat.py`` has
one test for each, which says what breaks then. The modeling files that travel with a saved model can't import this
module; the same file tests their hooks.
"""

from __future__ import annotations

import ctypes
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_context_prune.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerState, TrainingArguments


def silence_import_warnings() -> None:
    """Show no warnings of torchao's kernels for other processors, which come whenever transformers finds torchao."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def register_on_demand(auto: ModuleType, *, prefix: str, register: Callable[[], object]) -> None:
    """Call `register` once, when an auto class first asks for a model type that begins with `prefix`.

    Args:
        auto: The module `transformers.models.auto.configuration_auto`.
        prefix: Of the model types.
        register: Registers them, with the classes of their models.
    """

    class OnDemand(dict[str, type]):
        asked = False

        def __contains__(self, key: object) -> bool:
            if not self.asked and isinstance(key, str) and key.startswith(prefix):
                self.asked = True
                register()
            return super().__contains__(key)

    auto.CONFIG_MAPPING._extra_content = OnDemand(auto.CONFIG_MAPPING._extra_content)


def quantize_rows(kind: int, values: Any, blocks: Any, importance: Any = None) -> None:  # noqa: ANN401 - numpy arrays
    """Write rows in a type of llama.cpp, by the kernels in xllamacpp's library, which its Python side has no name for.

    Args:
        kind: Number of the type.
        values: float32, [rows, inputs], contiguous.
        blocks: Room for the blocks, uint8, [rows, bytes]; written.
        importance: float32, [inputs]: the weight of each input's errors; None: all alike.

    Raises:
        ExportError: The installed library has no such function.
    """
    rows, inputs = values.shape
    weights = None if importance is None else importance.ctypes.data
    written = _ggml_quantize_chunk()(kind, values.ctypes.data, blocks.ctypes.data, 0, rows, inputs, weights)
    if written != blocks.nbytes:
        raise ExportError(f"llama.cpp's quantiser wrote {written:,} bytes in place of {blocks.nbytes:,}.")


@cache
def _ggml_quantize_chunk() -> Any:  # noqa: ANN401 - a foreign function
    import xllamacpp.xllamacpp as library

    try:
        quantize = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (AttributeError, OSError) as error:
        raise ExportError(
            f"xllamacpp has no quantiser that this package can call ({error}). Install another version of it, or "
            f"export with --dtype q8_0."
        ) from error
    pointer = ctypes.c_void_p
    quantize.argtypes = (ctypes.c_int, pointer, pointer, *(3 * [ctypes.c_int64]), pointer)
    quantize.restype = ctypes.c_size_t
    return quantize


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the attention that a model of this config runs, such as ``"sdpa"``; None before it is chosen."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def copy_attention_implementation(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Let a model that will be built from `target` run the attention of `source`.

    The public `set_attn_implementation` needs a model, and ``attn_implementation=`` a `from_pretrained`.
    """
    target._attn_implementation = source._attn_implementation


def fill_computed_buffers(model: PreTrainedModel, module: nn.Module) -> None:
    """Compute the buffers of a module (rotary tables) in place, as `from_pretrained` does."""
    model._init_weights(module)


def computed_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that are computed, and never saved."""
    return module._non_persistent_buffers_set


@contextmanager
def class_forward(model: PreTrainedModel) -> Iterator[None]:
    """Run a model by the forward of its class inside the context.

    With ``bf16`` or ``fp16``, accelerate sets another `forward` on the model itself, which computes under autocast.
    """
    own = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if own is not None:
            model.forward = own


def apply_expert_gate(module: nn.Module, both: torch.Tensor) -> torch.Tensor:
    """Return the neurons of an expert, from what its gate reads and multiplies, as the family computes them."""
    neurons: torch.Tensor = module._apply_gate(both)  # type: ignore[operator]
    return neurons


def limit_to_one_gpu(arguments: TrainingArguments) -> None:
    """Let a Trainer train on the first GPU: it would wrap the model in a DataParallel where several are visible."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def claim_training(state: TrainerState, owner: object) -> object | None:
    """Note on a training's state which callback prunes in it, and return the callback that had claimed it before.

    A Trainer makes a new state for each training, and hands the same object to every callback.
    """
    before: object | None = getattr(state, "_context_prune", None)
    if before is None:
        state._context_prune = owner  # type: ignore[attr-defined]
    return before


def save_for_push(trainer: Trainer) -> None:
    """Save a Trainer's model to ``output_dir``, without the push that `Trainer.save_model` begins by itself."""
    trainer.save_model(_internal_call=True)


def finish_push(trainer: Trainer) -> None:
    """Wait for the pushes that a Trainer began in the background."""
    trainer._finish_current_push()


def track_push(trainer: Any, job: Future[Any]) -> None:  # noqa: ANN401 - a Trainer; a mixin is none to mypy
    """Let a Trainer wait for a push in the background when its training ends."""
    from transformers.utils.hub import PushInProgress

    trainer.push_in_progress = PushInProgress([job])


class CheckpointPushHook(ABC):
    """Let a Trainer call `push_checkpoint` where it would upload a checkpoint of ``hub_strategy="every_save"``."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.push_checkpoint()

    @abstractmethod
    def push_checkpoint(self) -> None:
        """Upload the model at a checkpoint."""


def unwrap_quanto(wrapped: Any) -> PreTrainedModel:  # noqa: ANN401 - optimum-quanto may not be installed
    """Return the `transformers` model inside of a `QuantizedModelForCausalLM`."""
    model: PreTrainedModel = wrapped._wrapped
    return model
