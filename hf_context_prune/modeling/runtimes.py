"""Where a model folder opens: one line for each runtime, from its config alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .geometry import WITHOUT_ATTENTION
from .specs import BUILT_IN, PREFIX, SPECS, base_model_type
from .wrapper_specs import WRAPPERS, text_spec

NO_GGUF = (
    *("ministral", "gemma4_text", "vaultgemma", "helium", "cwm", "granite_swa"),
    *("hyperclovax", "nanochat", "olmo_hybrid", "opt", "gpt_neo", "gptj"),
)
"""Families that llama.cpp has no architecture for, or none that is verified."""
GGUF_FAMILIES = tuple(name for name in SPECS if name in BUILT_IN and name not in NO_GGUF)
"""Families that GGUF files are written for."""
GGUF_VARIABLE = ("llama", "mistral")
"""Those of them whose widths may differ by layer, if they have no biases."""
GGUF_PERIODS = {
    "smollm3": ("no_rope_layers", 4),
    **{name: ("layer_types", n) for name, n in (("gemma2", 2), ("gemma3_text", 6), ("olmo3", 4), ("cohere2", 4))},
    "gpt_oss": ("layer_types", 2),
}
"""Those of which llama.cpp treats all layers but every n-th in another way, whatever the config says in this list."""
GGUF_INTERVALS = ("qwen3_5_text", "qwen3_5_moe_text")
"""Those of which it knows layers with attention by their interval; of others by their key/value heads."""
_ORDINALS = {2: "second", 4: "fourth", 6: "sixth"}


VLLM_TESTED = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "granite", "phi", "gpt_neox"),
    "opt",
)
"""Families that vLLM has served with widths that differ by layer. GPT-2 and wrappers it can't; others are untried."""


NO_ONNX = {
    "gemma4_text": "later layers read the keys and values of earlier ones, which the graph can't hand on",
    "helium": "padded prompts come out of its graph as NaN",
}
"""Why a family whose layers all have attention can't be exported to ONNX."""


def why_not_gguf_order(config: Mapping[str, Any], family: str) -> str | None:
    """Return what llama.cpp computes where it would take a layer for one of another kind; None where it does not.

    Args:
        config: The values of the model's config.
        family: The native model type.
    """
    kinds = _listed(config, "layer_types")
    if family in GGUF_INTERVALS:
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        if not every or any((kind == "full_attention") != ((i + 1) % every == 0) for i, kind in enumerate(kinds)):
            return f"llama.cpp computes attention in every n-th layer, but layer_types is {kinds}"
    if family not in GGUF_PERIODS:
        return None
    attribute, period = GGUF_PERIODS[family]
    if attribute == "layer_types":
        if config.get("sliding_window") is None:
            return None
        found, what = [kind == "sliding_attention" for kind in kinds], "slides a window over"
    else:
        kinds = _listed(config, attribute)
        found, what = [bool(kind) for kind in kinds], "rotates"
    if any(use != bool((index + 1) % period) for index, use in enumerate(found)):
        return f"llama.cpp {what} all layers of {family} except every {_ORDINALS[period]}, but {attribute} is {kinds}"
    return None


def _listed(config: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of a config that may have been written by anybody; [] where the value is none."""
    value = config.get(name)
    return list(value) if isinstance(value, list | tuple) else []


def has_expert_tensors(config: Any) -> bool:  # noqa: ANN401
    """Return whether a model's experts are one tensor for all of a layer, as in every family of the table.

    Args:
        config: The config of the model.
    """
    spec = SPECS.get(base_model_type(config.model_type))
    return spec is not None and spec.experts is not None


def why_not_onnx(config: Any) -> str | None:  # noqa: ANN401
    """Return why a model can't be exported to ONNX; None where it can, but for sliding windows.

    Args:
        config: The config of the model.
    """
    if (why := NO_ONNX.get(base_model_type(config.model_type))) is not None:
        return why
    if has_expert_tensors(config):
        return "the graph would hold the experts that its example is routed to, and no others"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) & set(WITHOUT_ATTENTION))
    return f"the graph can't hold the states of layers without attention ({', '.join(kinds)})" if kinds else None


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        name: Name of the runtime.
        how: The command or code that opens the folder there; without one, what keeps it out.
        opens: Whether it opens the folder.
    """

    name: str
    how: str
    opens: bool = True


def runtimes_of(config: Mapping[str, Any], folder: str) -> list[Runtime]:
    """Return how a folder opens in the runtimes that people use.

    Args:
        config: The values of its ``config.json``.
        folder: The folder, as commands name it.
    """
    model_type = str(config.get("model_type"))
    family, variable = base_model_type(model_type), model_type.startswith(PREFIX)
    auto = "AutoModelForImageTextToText" if family in WRAPPERS else "AutoModelForCausalLM"
    load = f"{auto}.from_pretrained({json.dumps(folder, ensure_ascii=False)})"
    place = shlex.quote(folder)
    return [
        Runtime("transformers", f"import hf_context_prune; {load}" if variable else load),
        _llama_cpp(config, family, folder, variable=variable),
        _vllm(family, place, variable=variable),
    ]


def _llama_cpp(config: Mapping[str, Any], family: str, folder: str, *, variable: bool) -> Runtime:
    name = "llama.cpp, Ollama"
    if family in WRAPPERS:
        return _text_in_llama_cpp(name, config, folder, variable=variable)
    if family not in GGUF_FAMILIES:
        return Runtime(name, f"no: GGUF is not written for {family}", opens=False)
    if why_not_gguf_order(config, family) is not None:
        return Runtime(name, "no: it tells layers apart by their number, and these are in another order", opens=False)
    biases = any(config.get(key) for key in ("attention_bias", "mlp_bias"))
    if variable and (family not in GGUF_VARIABLE or biases):
        kind = f"{family} with biases" if family in GGUF_VARIABLE else family
        return Runtime(
            name,
            f"no: it has no {kind} whose layers differ. Prune with --native-architecture",
            opens=False,
        )
    command = f"hf-context-prune export {shlex.quote(folder)} --to gguf --output {shlex.quote(f'{folder}-gguf')}"
    return Runtime(name, command)


def _text_in_llama_cpp(name: str, config: Mapping[str, Any], folder: str, *, variable: bool) -> Runtime:
    """Return how the text part of a model of images and text opens."""
    spec = text_spec(str((config.get("text_config") or {}).get("model_type")))
    if variable or spec is None or not any(SPECS[one].model_class == spec.model_class for one in GGUF_FAMILIES):
        return Runtime(name, "no: GGUF is not written for its text part. Prune with --text-only", opens=False)
    command = f"hf-context-prune export {shlex.quote(folder)} --to gguf --output {shlex.quote(f'{folder}-gguf')}"
    return Runtime(name, f"{command} (its text part)")


def _vllm(family: str, folder: str, *, variable: bool) -> Runtime:
    if not variable:
        return Runtime("vLLM", f"vllm serve {folder}")
    if family in WRAPPERS or SPECS[family].transposed:
        return Runtime(
            "vLLM", f"no: it has no {family} whose layers differ. Prune with --native-architecture", opens=False
        )
    untried = "" if family in VLLM_TESTED else f" (nobody has tried it with {family})"
    return Runtime("vLLM", f"hf-context-prune serve {folder} --engine vllm{untried}")
