"""Tiny saved models to export: uniform widths, or widths and KV heads that vary; the vocabulary whole or pruned."""

from __future__ import annotations

import random

from hf_context_prune import prune_vocabulary
from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

VARIABLE = (
    LayerPlan(tuple(range(32)), (0, 2)),
    LayerPlan(tuple(range(8, 40)), (1,)),
    LayerPlan((5, 6, 30), (0, 1, 2)),
)
UNIFORM = tuple(LayerPlan(tuple(range(index, index + 32)), (0, 1, 2)) for index in range(3))


def save(folder, *, variable=False, fewer_tokens=False, family="llama", tokenizer=None, **overrides):
    """A pruned tiny model with its tokenizer."""
    model, tokenizer = tiny_model(family, **overrides), tokenizer or tiny_tokenizer()
    geometry = read_geometry(model.config, spec_of(model.config))
    layers = (VARIABLE if variable else UNIFORM)[: len(geometry.layers)]
    plan = PruningPlan(family, geometry.layers, layers, fingerprint(model))
    model = apply_plan(model, plan)
    if fewer_tokens:
        smaller = prune_vocabulary(
            model, tokenizer, _words(), vocab_min_count=1, pad_to_multiple_of=8, criterion="frequency", refit=False
        )
        assert len(smaller.tokenizer) < len(tokenizer)
        return save_pruned(smaller.model, folder, tokenizer=smaller.tokenizer)
    return save_pruned(model, folder, tokenizer=tokenizer, plan=plan)


def _words():
    """Text that needs a part of the tiny tokenizer's merges."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(TEXT.split()[:5], k=400)) for _ in range(200)]
    return TextSource.from_documents([TextDocument(text, str(i), "s") for i, text in enumerate(texts)], name="words")
