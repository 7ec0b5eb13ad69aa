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
