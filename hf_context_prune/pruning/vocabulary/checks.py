"""Checks before a vocabulary is pruned: whether tokenizer and model belong together, and which tokens must stay."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.errors import VocabularyError
from hf_context_prune.modeling.token_rows import iter_token_ids, num_rows
from hf_context_prune.modeling.view import ModelView

from .chat_template import template_ids
from .rebuild import build_state, order_ids, read_table, rebuild_tokenizer
from .selection import VocabularySize, mandatory_tokens
from .tokens import TokenTable

_SPARE_ROWS = (1024, 0.05)
"""Embedding rows beyond the tokenizer that padding explains: a number, or a share of the rows if that is more."""


def check_prunable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: VocabularySize | None,
    *,
    keep: Collection[str] = (),
    remove: Collection[str] = (),
) -> None:
    """Refuse a vocabulary that can't be pruned, or not to that size, before any text is read.

    Args:
        model: A causal LM.
        tokenizer: Its fast tokenizer.
        size: How many tokens stay; None: that is to be found.
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.

    Raises:
        VocabularyError: See [`prune_vocabulary`][].
        BudgetError: The size can't be reached.
    """
    spec, table = ModelView.of(model).spec, read_paired_table(model, tokenizer)
    needed = required_ids(model, tokenizer, table) | find_ids(table, keep, "kept")
    if size is not None:
        size.check()
        mandatory_tokens(table, size, needed, find_ids(table, remove, "removed"))
    whole = build_state(table, order_ids(table, sorted(table.contents)))
    rebuild_tokenizer(tokenizer, whole, spec.model_type)  # refuses a class that does not open what is written


def fewest_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, multiple: int) -> int:
    """Return the smallest vocabulary that a model can be trimmed to, as a multiple of a number."""
    table, size = read_paired_table(model, tokenizer), VocabularySize(pad_to_multiple_of=multiple)
    must = mandatory_tokens(table, size, required_ids(model, tokenizer, table))
    return min(size.round_up(len(must)), len(table))


def read_paired_table(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """Return the tokenizer's vocabulary, if it can be this model's.

    Raises:
        VocabularyError: The tokenizer has own tokens without a row, or far fewer tokens than there are rows.
    """
    rows = num_rows(model)
    table = read_table(tokenizer, rows)
    highest, (number, share) = max(table.contents), _SPARE_ROWS
    if highest >= rows:
        raise VocabularyError(
            f"The tokenizer has ids up to {highest:,}, the model only {rows:,} embedding rows: they don't belong "
            f"together. Load the tokenizer from where the model came from."
        )
    if rows - highest - 1 > max(number, share * rows):
        raise VocabularyError(
            f"The model has {rows:,} embedding rows, the tokenizer ids up to {highest:,} only: they don't belong "
            f"together. Load the tokenizer from where the model came from."
        )
    return table


def required_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> set[int]:
    """Return the ids that the configs, the tokenizer's special tokens and the chat template rely on.

    Raises:
        VocabularyError: A config names an id that the tokenizer lacks, or an ordinary token as the begin or end of a
            text that the tokenizer begins or ends otherwise.
    """
    ids = {index for index in tokenizer.all_special_ids if index in table.contents}
    special = ids | tokenizer.added_tokens_decoder.keys()
    for kind, config in (("config", model.config), ("generation_config", model.generation_config)):
        for name, index in iter_token_ids(config) if config is not None else ():
            if index not in table.contents:
                raise VocabularyError(
                    f"{kind}.{name} is {index}, which is no token of the tokenizer, so it would have no id in the "
                    f"smaller vocabulary. Load the tokenizer from where the model came from, or set it to one of the "
                    f"tokenizer's ids."
                )
            own = getattr(tokenizer, name, None) if name in ("bos_token_id", "eos_token_id") else None
            if own is not None and own != index and index not in special:
                raise VocabularyError(
                    f"{kind}.{name} is {index}, which is the ordinary token {table.contents[index]!r} of this "
                    f"tokenizer; its own is {tokenizer.convert_ids_to_tokens(own)!r} ({own}): they don't belong "
                    f"together. Load the tokenizer from where the model came from, or set {kind}.{name} to {own}."
                )
            ids.add(index)
    return ids | template_ids(tokenizer)


def find_ids(table: TokenTable, tokens: Collection[str], purpose: str) -> set[int]:
    """Return the ids of tokens that a user names by their contents.

    Args:
        table: The full vocabulary.
        tokens: Contents of tokens.
        purpose: ``"kept"`` or ``"removed"``, for the message.

    Raises:
        VocabularyError: `tokens` is no list of strings, or the tokenizer lacks one.
    """
    known = {content: index for index, content in table.contents.items()}
    if isinstance(tokens, str) or not isinstance(tokens, Collection):
        raise VocabularyError(f"The tokens to be {purpose} are {tokens!r}; give a list of tokens.")
    for token in tokens:
        if token not in known:
            raise VocabularyError(
                f"{token!r} is to be {purpose}, but the tokenizer has no such token (tokens are written as in its "
                f"vocabulary: tokenizer.tokenize(text) shows them)."
            )
    return {known[token] for token in tokens}
