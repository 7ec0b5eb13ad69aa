"""A tiny model for a tiny tokenizer, and text of a domain that needs few of its tokens."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache

from transformers import PreTrainedTokenizerFast

from hf_context_prune.data.documents import TextDocument, TextSource
from tests.support.tiny import case
from tests.support.tiny_tokenizers import WORDS, qwen2_class, tokenizer_of

DOMAIN = WORDS[:13]
ALL = {"vocab_min_count": 1, "pad_to_multiple_of": 8}
"""Every token of the text stays."""


@cache
def shared_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One tokenizer for many tests: nothing may change it."""
    return qwen2_class() if kind == "qwen2-class" else tokenizer_of(kind)


def documents(words=DOMAIN, *, count: int = 40, length: int = 60) -> TextSource:
    """Documents of random words."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=length)) for _ in range(count)]
    return TextSource.from_documents([TextDocument(text, str(i), "s") for i, text in enumerate(texts)], name="domain")


def write_domains(folder, names) -> None:
    """Folders as in shared/data, with train and validation text of random words."""
    draw = random.Random(0)
    for name in names:
        (folder / name).mkdir()
        for split, count in (("train", 80), ("validation", 6)):
            texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(count)]
            records = [{"text": text, "doc": f"{split}-{i}", "source": "made up"} for i, text in enumerate(texts)]
            with gzip.open(folder / name / f"corpus.{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(map(json.dumps, records)))


def model_for(name: str, tokenizer, *, spare_rows: int = 0, **overrides):
    """The tiny model of a family or variant, with a row for every token, and the tokenizer's ids in its configs."""
    eos = tokenizer.eos_token_id
    ids = {
        "bos_token_id": eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    sizes = {"vocab_size": len(tokenizer) + spare_rows, "max_position_embeddings": 512}
    return case(name, **(sizes | ids | overrides))
