"""Write a fast tokenizer to the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

from hf_context_prune.data.samples import leading_token
from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.generation import get_end_token_ids

_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names in llama.cpp of the regex that splits a text before merging. Qwen 2 differs from Llama 3 in single digits.
_BY_REGEX = {_LLAMA3_SPLIT: "llama-bpe", _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def check_tokenizer(tokenizer: Any) -> None:  # noqa: ANN401
    """Refuse a tokenizer that GGUF has no name for.

    Raises:
        ExportError: Tokenizers of this kind can't be written.
    """
    state = _state(tokenizer)
    if not _is_sentencepiece(state):
        _pre_tokenizer(state)


def write_tokenizer(writer: GGUFWriter, loaded_model: Any, tokenizer: Any, rows: int) -> None:  # noqa: ANN401
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: Writer of the file.
        loaded_model: The model, for the tokens that end a text.
        tokenizer: A fast tokenizer.
        rows: Number of embedding rows of the model; ids without a token get a placeholder.
    """
    state = _state(tokenizer)
    vocab = {int(index): token for token, index in tokenizer.get_vocab().items()}
    added = {int(entry["id"]): entry for entry in state.get("added_tokens") or ()}
    tokens = [vocab.get(index, f"[PAD{index}]") for index in range(rows)]
    spelled = _is_sentencepiece(state)
    unknown = state["model"].get("unk_token")
    types = [
        TokenType.UNUSED
        if index not in vocab
        else TokenType.UNKNOWN
        if spelled and token == unknown
        else (TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        if index in added
        else TokenType.BYTE
        if spelled and _is_byte(token)
        else TokenType.NORMAL
        for index, token in enumerate(tokens)
    ]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in state["model"]["merges"]]
    if spelled:
        writer.add_tokenizer_model("llama")
        ranks: dict[str, int] = {}
        for rank, (first, second) in enumerate(merges):
            ranks.setdefault(first + second, rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_prepends_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(state))
        writer.add_token_merges([f"{first} {second}" for first, second in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_specials(writer, loaded_model, tokenizer)


def _write_specials(writer: GGUFWriter, model: Any, tokenizer: Any) -> None:  # noqa: ANN401
    ends = get_end_token_ids(model)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, end),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, next((index for index in ends if index != end), None)),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(leading_token(tokenizer) is not None)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and tokenizer.encode("a")[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _state(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    if state["model"]["type"] != "BPE":
        raise ExportError(
            f"GGUF is written for BPE tokenizers, but this one is of type {state['model']['type']}. Export to another "
            f"format."
        )
    return state


def _is_sentencepiece(state: Mapping[str, Any]) -> bool:
    """Return whether bytes are spelled as ``<0x41>`` and spaces as U+2581 (Llama 2, Mistral)."""
    return bool(state["model"].get("byte_fallback"))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _prepends_space(state: Mapping[str, Any]) -> bool:
    normalizer, splitter = state.get("normalizer") or {}, state.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", ())]
    return any(step.get("type") == "Prepend" for step in steps) or splitter.get("prepend_scheme") in ("first", "always")


def _pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits a text into words.

    Raises:
        ExportError: No name is known.
    """
    whole = state.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer in (None, "NFC"):
        if len(steps) == 1 and _has(steps[0], _GPT2_SPLIT):
            return "gpt-2"
        if len(steps) == 2 and _has(steps[0], _DIGITS) and _has(steps[1], _GPT2_SPLIT):
            return "smollm"
        if len(steps) == 2 and _has(steps[1], {**_GPT2_SPLIT, "use_regex": False}):
            regex = (steps[0].get("pattern") or {}).get("Regex")
            if steps[0].get("behavior") == "Isolated" and regex in _BY_REGEX:
                return _BY_REGEX[regex]
    raise ExportError(
        f"The tokenizer splits text in a way that GGUF export does not know: pre-tokenizer {json.dumps(whole)[:300]}, "
        f"normalizer {normalizer}. Known are the ways of GPT-2, SmolLM2, Llama 3 and Qwen 2, and SentencePiece with "
        f"byte fallback. Export to another format."
    )


def _has(step: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(step.get(name) == value for name, value in expected.items())
