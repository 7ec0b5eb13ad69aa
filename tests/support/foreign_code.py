"""A base whose tokenizer names code of another repository, which leaves a mark when it runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.tiny import tiny_model, tiny_tokenizer

CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({mark!r}).write_text("ran")
class EvilTok(PreTrainedTokenizerFast):
    pass
"""


def name_foreign_code(folder: Path, reference: str) -> None:
    """Let the tokenizer of a folder name a class of others, as many on the Hub do."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, reference]}}
    file.write_text(json.dumps(values))


def make_base(place: Path) -> Path:
    """``base``, its foreign code in ``evil``; the file ``mark`` is there once that code has run."""
    (place / "evil").mkdir()
    (place / "evil/evil.py").write_text(CODE.format(mark=str(place / "mark")))
    tiny_model("llama").save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    name_foreign_code(place / "base", f"{place / 'evil'}--evil.EvilTok")
    return place / "base"
