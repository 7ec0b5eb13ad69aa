"""docs/families.md: the table of the families, from the tables of the package and the tiny models of the tests.

Write it again with ``python -m tests.support.families_page``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from hf_context_prune.modeling.geometry import WITHOUT_ATTENTION
from hf_context_prune.modeling.left_out import LEFT_OUT
from hf_context_prune.modeling.runtimes import GGUF_FAMILIES, GGUF_VARIABLE, VLLM_TESTED, why_not_onnx
from hf_context_prune.modeling.specs import BUILT_IN, SPECS, ArchSpec
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/families.md"
MODELS = {
    "llama": "Llama 3.2 1B",
    "mistral": "Mistral 7B v0.3",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3 3B",
    "qwen2": "Qwen2.5 0.5B",
    "qwen3": "Qwen3 0.6B",
    "smollm3": "SmolLM3 3B",
    "gemma": "Gemma 2B",
    "vaultgemma": "VaultGemma 1B",
    "olmo": "OLMo 1B",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "hunyuan_v1_dense": "Hunyuan 0.5B",
    "seed_oss": "Seed-OSS 36B",
    "helium": "Helium 1 2B",
    "cwm": "Code World Model 32B",
    "gemma2": "Gemma 2 2B",
    "gemma3_text": "Gemma 3 1B",
    "gemma4_text": "Gemma 4, text",
    "exaone4": "EXAONE 4.0 1.2B",
    "olmo2": "OLMo 2 1B",
    "olmo3": "Olmo 3 7B",
    "olmo_hybrid": "Olmo Hybrid 7B",
    "granite": "Granite 3.3 2B",
    "granite_swa": "Granite with sliding windows",
    "granitemoehybrid": "Granite 4.0 H 1B",
    "hyperclovax": "HyperCLOVA X SEED",
    "cohere": "Aya 23 8B",
    "cohere2": "Command R7B",
    "stablelm": "StableLM 2 1.6B",
    "arcee": "AFM 4.5B",
    "apertus": "Apertus 8B",
    "nemotron": "Minitron 4B",
    "jais2": "Jais 2 8B",
    "nanochat": "nanochat",
    "starcoder2": "StarCoder2 3B",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4 9B 0414",
    "phi3": "Phi-3.5 mini, Phi-4 mini",
    "qwen3_5_text": "Qwen3.5, text",
    "lfm2": "LFM2 1.2B",
    "phi": "Phi-2",
    "gpt_neox": "Pythia 160M",
    "falcon": "Falcon 7B",
    "opt": "OPT 125M",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neo": "GPT-Neo 125M",
    "gptj": "GPT-J 6B",
    "mixtral": "Mixtral 8x7B",
    "qwen2_moe": "Qwen1.5 MoE A2.7B",
    "qwen3_moe": "Qwen3 30B A3B",
    "olmoe": "OLMoE 1B 7B",
    "granitemoe": "Granite 3.1 3B A800M",
    "gpt_oss": "gpt-oss 20B",
    "glm4_moe": "GLM-4.5 Air",
    "qwen3_5_moe_text": "Qwen3.5 35B A3B, text",
    "ernie4_5_moe": "ERNIE 4.5 21B A3B",
    "lfm2_moe": "LFM2 8B A1B",
}
"""A model of each family that many know."""
_TESTED = ("transformers", "torch")
_INTRODUCTION = """# Families

Every family has a tiny random model in the tests. Pruning it equals masking it, and a saved model reloads bit by bit.
[CONTRIBUTING](../CONTRIBUTING.md#add-an-architecture) says how to add one. This page is the output of
`python -m tests.support.families_page`, and a test compares it with the tables of the package.

- Neurons, tokens and whole layers can be removed everywhere, but no whole layer of a Gemma 4 with shared keys or
  embeddings by layer, and none of a GPT-2 with `scale_attn_by_inverse_layer_idx`. **KV groups** (a key/value head with
  its query heads) can be removed where the table says yes.
- **Experts**: whole experts of a mixture can be removed where the table says yes (`prune --num-experts`), and neurons
  inside them (`--expert-neurons-ratio`); layers of these families with a plain MLP lose neurons like any other.
- **GGUF**: *uniform* needs the same widths in all layers (`prune --native-architecture`), *yes* takes any. The file is
  run in llama.cpp, and its losses on the tiny model are those of transformers. Settings that llama.cpp computes in
  another way (a bias, an activation, an order of windows) are refused by name before any work.
- **ONNX**: the losses in ONNX Runtime are those of transformers, with any widths. A model with a sliding window is
  refused until its config lets all layers see all tokens.
- **vLLM**: whether `serve --engine vllm` has served widths that differ by layer (*untried*: nobody has tried). With the
  same widths in all layers, a folder is a plain model of its family.
- Tested with transformers {transformers} and torch {torch}.
"""


def families_page() -> str:
    """Return the page as it has to be."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    versions = {name: next(one.removeprefix(name) for one in needed if one.startswith(f"{name}>")) for name in _TESTED}
    header = ("family", "such as", "KV groups", "experts", "GGUF", "ONNX", "vLLM")
    rows = [header, ("---",) * len(header), *(_row(spec) for spec in SPECS.values() if spec.model_type in BUILT_IN)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    left_out = "\n".join(f"- `{name}`: {why}." for name, why in LEFT_OUT.items())
    return f"{_INTRODUCTION.format(**versions)}\n{table}\n\n## Left out\n\n{left_out}\n"


def _row(spec: ArchSpec) -> tuple[str, ...]:
    name = spec.model_type
    gguf = "yes" if name in GGUF_VARIABLE else "uniform" if name in GGUF_FAMILIES else "no"
    why = why_not_onnx(tiny_config(name))
    onnx = "yes" if why is None else f"no: {why}"
    return (
        f"`{name}`",
        MODELS[name],
        _kv_groups(spec),
        _experts(spec),
        gguf,
        onnx,
        "yes" if name in VLLM_TESTED else "no" if spec.transposed else "untried",
    )


def _kv_groups(spec: ArchSpec) -> str:
    if (fixed := dict(spec.fixed_heads).get(None)) is not None:
        return f"no: {fixed}"
    kinds = sorted(set(getattr(tiny_config(spec.model_type), "layer_types", None) or ()) & set(WITHOUT_ATTENTION))
    where = f"yes, in layers with attention (not `{'`, `'.join(kinds)}`)" if kinds else "yes"
    return "; ".join([where, *(f"not where `{attribute}` is true: {why}" for attribute, why in spec.fixed_heads)])


def _experts(spec: ArchSpec) -> str:
    if spec.experts is None:
        return "-"
    return "yes, as many of every group" if spec.experts.groups else "yes"


if __name__ == "__main__":
    PAGE.write_text(families_page(), encoding="utf-8")
