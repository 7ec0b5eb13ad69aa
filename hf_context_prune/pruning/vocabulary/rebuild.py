"""Tokenizer + kept tokens -> smaller tokenizer, through the fast tokenizer's own JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_context_prune.errors import VocabularyError
from hf_context_prune.utils.foreign_code import drop_foreign_code
from hf_context_prune.utils.temporary import scratch_folder

from .tokens import TokenTable

_PROBE = (
    "The court held 3.5% of 1,024 patients' \u201cassets\u201d:\n\n\tna\u00efve caf\u00e9 "
    "\u4e2d\u6587 \U0001f680  <s></s>"
)


def read_table(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> TokenTable:
    """Read the vocabulary of a fast tokenizer; `rows` as for [`TokenTable`][].

    Raises:
        VocabularyError: The tokenizer has no fast backend, or is of a kind that can't be pruned.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(
            f"{type(tokenizer).__name__} has no fast backend (tokenizer.json), which vocabulary pruning edits. "
            f"Load it with AutoTokenizer, or prune this model without vocab_* options."
        )
    return TokenTable(json.loads(backend.to_str()), rows)


def order_ids(table: TokenTable, kept: Sequence[int]) -> list[int]:
    """Return kept ids in the order of their new ids: the old order, but added tokens that the model lacks come last.

    `tokenizers` numbers those itself, after the model's own tokens.
    """
    own = set(table.vocab.values())
    return sorted(kept, key=lambda index: (index not in own, index))


def build_state(table: TokenTable, order: Sequence[int]) -> dict[str, Any]:
    """Return the JSON of the smaller tokenizer.

    Args:
        table: Vocabulary of the full tokenizer.
        order: Kept ids; the place of an id is its new id. With all mandatory tokens, and closed under merges.
    """
    beyond = sorted(index for index in table.added.values() if index not in table.contents)
    new_ids = {old: new for new, old in enumerate([*order, *beyond])}
    state = copy.deepcopy({key: value for key, value in table.state.items() if key != "model"})
    model = dict(table.state["model"])
    contents = {content: new_ids[index] for content, index in table.vocab.items() if index in new_ids}
    if table.kind == "Unigram":
        pieces = model["vocab"]
        model["vocab"] = [pieces[index] for index in order if index < len(pieces)]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = dict(sorted(contents.items(), key=lambda item: item[1]))
        model["merges"] = [
            list(pair) for pair in table.merges if all(part in contents for part in (*pair, pair[0] + pair[1]))
        ]
    state["model"] = model
    for token in state.get("added_tokens") or ():
        token["id"] = new_ids[token["id"]]
    if state.get("padding"):
        if state["padding"]["pad_id"] in new_ids:
            state["padding"]["pad_id"] = new_ids[state["padding"]["pad_id"]]
        else:  # the id of no token: a leftover of the padding of one call
            state["padding"] = None
    state["post_processor"] = _renumber(state.get("post_processor"), {**contents, **_ids(state)})
    return state


def _ids(state: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in state.get("added_tokens") or ()}


def _renumber(processor: Any, ids: Mapping[str, int]) -> Any:  # noqa: ANN401
    """Return a post-processor with new ids: templates list ids, BERT's and RoBERTa's have (content, id) pairs."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_renumber(part, ids) for part in processor["processors"]]}
    result = dict(processor)
    for token in ("sep", "cls"):
        if token in result:
            result[token] = [result[token][0], ids[result[token][0]]]
    if result.get("special_tokens"):
        result["special_tokens"] = {
            name: {**entry, "ids": [ids[content] for content in entry["tokens"]]}
            for name, entry in result["special_tokens"].items()
        }
    return result


def rebuild_tokenizer(
    tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], model_type: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `AutoTokenizer` opens from the saved files with another ``tokenizer.json``.

    Args:
        tokenizer: The full tokenizer; unchanged.
        state: From [`build_state`][].
        model_type: Type of the model that the tokenizer is saved beside: for some (qwen2), `AutoTokenizer` takes the
            model's tokenizer class, whatever class was saved.

    Raises:
        VocabularyError: The opened tokenizer differs from the written one: its class builds tokenizers in its own way.
    """
    # An option of LlamaTokenizer (Mistral 7B has it) that transformers reads, but forgets when it saves.
    forgotten = {"legacy": tokenizer.legacy} if hasattr(tokenizer, "legacy") else {}
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        drop_foreign_code(folder)  # for some, AutoTokenizer chooses another class by it
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | forgotten), encoding="utf-8")
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        smaller = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    smaller.name_or_path = tokenizer.name_or_path
    smaller.padding_side, smaller.truncation_side = tokenizer.padding_side, tokenizer.truncation_side
    smaller.init_kwargs.pop("name_or_path", None)
    smaller.init_kwargs.update(forgotten)
    own = json.loads(smaller.backend_tokenizer.to_str())
    differing = [part for part in state if part not in ("padding", "truncation") and own.get(part) != state[part]]
    if differing:
        raise VocabularyError(
            f"{type(smaller).__name__} opens the smaller vocabulary with another {' and '.join(differing)} than was "
            f"written, so it can't be pruned safely. Prune this model without vocab_* options."
        )
    if smaller.decode(smaller.encode(_PROBE)) != tokenizer.decode(tokenizer.encode(_PROBE)):
        raise VocabularyError(
            f"{type(smaller).__name__} with a smaller vocabulary decodes a text differently than before, so it can't "
            f"be pruned safely. Prune this model without vocab_* options."
        )
    return smaller
