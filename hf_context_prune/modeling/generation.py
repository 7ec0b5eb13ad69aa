"""Plain and timed generation, its KV cache and end tokens, and the name of the hardware that it runs on."""

from __future__ import annotations

import copy
import inspect
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig

from hf_context_prune.errors import ConfigError, LoadError, UnsupportedArchitectureError

from .inference import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_prompt(limits: Iterable[int | None], prompt_tokens: int, new_tokens: int) -> int:
    """Return `prompt_tokens`, cut so that prompt and new tokens fit the smallest of `limits` (None: no limit).

    Raises:
        ConfigError: A length is below 1, or no prompt fits.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise ConfigError(f"prompt_tokens is {prompt_tokens} and new_tokens {new_tokens}; both must be at least 1.")
    room = min((limit for limit in limits if limit is not None), default=prompt_tokens + new_tokens)
    if room <= new_tokens:
        raise ConfigError(f"new_tokens is {new_tokens}, but the model has {room} positions. Use at most {room - 1}.")
    return min(prompt_tokens, room - new_tokens)


def draw_prompt(vocabulary: int, batch_size: int, length: int, seed: int) -> torch.Tensor:
    """Return random token ids [batch_size, length], int64, below `vocabulary`."""
    return torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def build_cache_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of `forward` for decoding one token per step: an empty KV cache, and the last logits only.

    Raises:
        UnsupportedArchitectureError: The model's `forward` takes no KV cache.
    """
    accepted = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed the argument; versions that know the new name warn about the old one.
    name = next((name for name in ("cache", "past_key_values") if name in accepted), None)
    if name is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}.forward takes neither `cache` nor `past_key_values`, so decoding with a KV cache "
            "can't be measured. Measure this model without speed and memory."
        )
    arguments: dict[str, Any] = {name: DynamicCache(config=model.config), "use_cache": True}
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    return arguments


def get_end_token_ids(model: PreTrainedModel) -> list[int]:
    """Return the token ids that end a text: those of the generation config, else those of the config.

    Raises:
        LoadError: They are no whole numbers.
    """
    for config in (model.generation_config, model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            ids = list(found) if isinstance(found, list | tuple) else [found]
            if not all(isinstance(index, int) and abs(index) < 2**31 for index in ids):
                raise LoadError(
                    f"The {type(config).__name__} of the model gives {found!r:.80} as eos_token_id. Give the id of "
                    f"the token that ends a text, or a list of ids, in generation_config.json or config.json."
                )
            return ids
    return []


def with_plain_generation(model: PreTrainedModel, *, new_tokens: int, **options: Any) -> Any:  # noqa: ANN401
    """Return a shallow copy that shares all weights and modules, and whose `generate` decodes greedily.

    `generate` fills every option that its caller leaves out from the model's own generation config. That comes with
    the folder: thousands of beams would exhaust the memory, and some of its options need a tokenizer or more.

    Args:
        model: The model; it is left as it is.
        new_tokens: Largest number of new tokens.
        options: Other options of `GenerationConfig`, which win.
    """
    ends = get_end_token_ids(model)
    plain = copy.copy(model)
    plain.generation_config = GenerationConfig(
        **{
            "do_sample": False,
            "max_new_tokens": new_tokens,
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if ends else 0,
        }
        | options
    )
    return plain


def generate_completion(model: PreTrainedModel, tokenizer: Any, prompt: str, *, new_tokens: int = 40) -> str:  # noqa: ANN401
    """Return the greedy continuation of a prompt, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.inference_mode():
        output = with_plain_generation(model, new_tokens=new_tokens).generate(**inputs)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def time_generation(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, *, inference: bool = True
) -> tuple[float, float]:
    """Read `prompt` [batch, length] in one forward pass, then decode greedily, one token per step, with the KV cache.

    `generate` is not used, because its time can't be split into prefill and decoding.

    Args:
        model: The model.
        prompt: Token ids [batch, length].
        new_tokens: Decode steps.
        inference: Whether to enter `inference_mode`; False (Quanto's int4 weights need it) keeps the caller's mode.

    Returns:
        Seconds of the prefill and of the `new_tokens` decode steps.

    Raises:
        UnsupportedArchitectureError: The model's `forward` takes no KV cache.
    """
    arguments = build_cache_arguments(model)
    synchronize = _synchronizer(model.device)
    tokens = prompt.to(model.device)
    with evaluation_mode(model, inference=inference):
        synchronize()
        start = time.perf_counter()
        tokens = model(input_ids=tokens, **arguments).logits[:, -1:].argmax(dim=-1)
        synchronize()
        middle = time.perf_counter()
        for _ in range(new_tokens):
            tokens = model(input_ids=tokens, **arguments).logits[:, -1:].argmax(dim=-1)
        synchronize()
        end = time.perf_counter()
    return middle - start, end - middle


def _synchronizer(device: torch.device) -> Callable[[], object]:
    """Return a function that waits until `device` has done its work: accelerators return from a call earlier."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def hardware_name(device: torch.device) -> str:
    """Return the name of the CUDA device or, for others, of the processor, as precisely as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
