"""Rows of the token embeddings, and every config field that holds token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_context_prune.errors import PlanError

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_ID_SEQUENCES = ("bad_words_ids", "force_words_ids")


def iter_token_ids(config: Any) -> Iterator[tuple[str, int]]:  # noqa: ANN401 - model and generation configs alike
    """Yield (field, id) for every token that a config relies on: bos, eos (one or several), pad, forced and others.

    Negative ids, which some configs use for "none", are left out; so are tokens that are only suppressed.
    """
    for name, value in _id_fields(config):
        for index in value if isinstance(value, list | tuple) else [value]:
            if isinstance(index, int) and not isinstance(index, bool) and index >= 0:
                yield name, index
    for _, index in getattr(config, "forced_decoder_ids", None) or ():
        if index is not None:
            yield "forced_decoder_ids", index


def renumber_token_ids(config: Any, new_ids: Mapping[int, int]) -> None:  # noqa: ANN401
    """Replace every token id of a model or generation config, in place.

    Suppressed tokens that are removed, and forbidden sequences with a removed token, are dropped: they can't occur.

    Args:
        config: Model config or generation config.
        new_ids: New ids by old ids; must have every id of [`iter_token_ids`][].

    Raises:
        PlanError: One of these ids has no new id.
    """
    for name, index in iter_token_ids(config):
        if index not in new_ids:
            raise PlanError(
                f"{type(config).__name__}.{name} names the token {index}, which the plan removes. Make a plan with "
                f"this model, or set this field to a token that stays."
            )

    def mapped(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, list | tuple):
            return [mapped(item) for item in value]
        return new_ids[value] if isinstance(value, int) and value >= 0 else value

    for name, value in list(_id_fields(config)):
        setattr(config, name, mapped(value))
    for name in _ID_LISTS:
        if value := getattr(config, name, None):
            setattr(config, name, [new_ids[index] for index in value if index in new_ids])
    for name in _ID_SEQUENCES:
        if value := getattr(config, name, None):
            setattr(config, name, [kept for item in value if (kept := _sequence(item, new_ids))] or None)
    if value := getattr(config, "forced_decoder_ids", None):
        config.forced_decoder_ids = [[place, mapped(index)] for place, index in value]
    if value := getattr(config, "sequence_bias", None):
        pairs = value.items() if isinstance(value, Mapping) else value
        kept = [[[new_ids[i] for i in ids], bias] for ids, bias in pairs if all(i in new_ids for i in ids)]
        config.sequence_bias = kept or None


def _id_fields(config: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    for name, value in sorted(config.to_dict().items()):
        if name.endswith(("token_id", "token_ids")) and isinstance(value, int | list | tuple):
            yield name, value


def _sequence(item: Sequence[Any], new_ids: Mapping[int, int]) -> list[Any] | None:
    """Return a sequence in new ids, or None if it has a removed token; of alternatives, those that remain."""
    if item and isinstance(item[0], list | tuple):
        return [kept for part in item if (kept := _sequence(part, new_ids))] or None
    return [new_ids[index] for index in item] if all(index in new_ids for index in item) else None


def build_vocabulary_config(config: Any, order: Sequence[int]) -> Any:  # noqa: ANN401
    """Return a copy of a model config for the kept vocabulary entries, with new ids in every field."""
    result = copy.deepcopy(config)
    result.vocab_size = len(order)
    if hasattr(result, "vocab_size_per_layer_input"):
        result.vocab_size_per_layer_input = len(order)
    renumber_token_ids(result, {old: new for new, old in enumerate(order)})
    return result


_MORE_TABLES = "embed_tokens_per_layer"
"""Name of a second embedding, whose rows every layer reads (Gemma 4)."""


def token_modules(model: Any) -> list[nn.Module]:  # noqa: ANN401
    """Return all modules with a row per token: the input embedding, the LM head and other embeddings, if present."""
    more = (module for name, module in model.named_modules() if name.rpartition(".")[2] == _MORE_TABLES)
    found = (model.get_input_embeddings(), model.get_output_embeddings(), *more)
    return [module for module in found if module is not None]


def token_rows(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Return the parameters with one row per vocabulary entry (embedding, LM head, its bias), by state-dict name."""
    modules = {id(module) for module in token_modules(model)}
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if id(module) in modules
        for name, parameter in module.named_parameters(recurse=False)
    }


def token_cost(model: Any) -> int:  # noqa: ANN401
    """Return the parameters per vocabulary entry; tied parameters count once."""
    unique = {id(parameter): parameter for parameter in token_rows(model).values()}
    return sum(parameter[0].numel() for parameter in unique.values())


def num_rows(model: Any) -> int:  # noqa: ANN401
    """Return the number of rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])
