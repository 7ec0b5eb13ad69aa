"""Samples: the text on which an artefact is compared with the folder's own model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.samples import leading_token
from hf_context_prune.evaluation.passages import Passages
from hf_context_prune.evaluation.windows import context_token, cut_windows, encode_documents, group_records
from hf_context_prune.modeling.generation import with_plain_generation
from hf_context_prune.modeling.inference import evaluation_mode, max_positions
from hf_context_prune.storage.loading import LoadedModel

PROMPTS = (
    "The agreement between the two parties states that",
    "The patient was admitted to the hospital because",
    "In the third quarter of the year, the company reported",
    "Once upon a time, in a small village by the sea,",
    "To install the program, first open a terminal and",
)
_NEW_TOKENS = 32
_WINDOW = 256
_OWN_TOKENS = 64  # new tokens per prompt
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Sample:
    """Text to compare on.

    Attributes:
        windows: Token ids; the first token of each window is context and is not scored.
        prompts: Token ids to continue.
        new_tokens: Largest number of tokens of a continuation.
        texts: The windows as text, to compare tokenizers.
        num_bytes: UTF-8 bytes of the scored text; None for the model's own text.
        description: Description to show.
    """

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    texts: tuple[str, ...]
    num_bytes: int | None
    description: str

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens."""
        return sum(len(window) - 1 for window in self.windows)


def read_sample(loaded: LoadedModel, data: Any, text_column: str | None, *, max_tokens: int, seed: int) -> Sample:  # noqa: ANN401
    """Read passages of a text; their beginnings are the prompts.

    Args:
        loaded: The folder's model.
        data: Text, as `load_documents` reads it.
        text_column: Column with the text.
        max_tokens: Largest number of tokens to score.
        seed: Chooses the passages.

    Raises:
        DataError: There is no text to score.
    """
    source = load_documents(data, text_column=text_column)
    passages = Passages.of(source, loaded.tokenizer, max_tokens=max_tokens, seed=seed).text
    groups = group_records(passages, None)
    documents = encode_documents(groups, source.name, loaded.tokenizer, None, seed)
    length, new_tokens = _lengths(loaded)
    led = leading_token(loaded.tokenizer) is not None
    cut = list(cut_windows(documents, context_token(loaded.tokenizer), length - 1, each=led))
    windows = tuple((window.inputs[0], *window.targets) for window in cut)
    starts = sorted(windows, key=len, reverse=True)[: len(PROMPTS)]
    room = max(length - new_tokens - 1, 1)
    prompts = [window[: min(_PROMPT_TOKENS, room)] for window in starts]
    return Sample(
        windows,
        tuple([*prompts, *_prompts(loaded, room)][: len(PROMPTS)]),
        new_tokens,
        tuple(record.text for document in documents for record in groups[document.doc]),
        sum(document.num_bytes for document in documents),
        f"passages of {len(documents)} documents of {source.name}",
    )


def own_sample(loaded: LoadedModel, *, seed: int) -> Sample:
    """Let the model itself write the text: samples at temperature 1 that continue five prompts.

    On a model's own samples, the mean excess loss of another model estimates the KL divergence between the two: zero
    for the same model, positive for any other.
    """
    length, new_tokens = _lengths(loaded)
    room = max(length - new_tokens - 1, 1)
    prompts = _prompts(loaded, room)
    windows = _sampled(loaded, prompts, min(_OWN_TOKENS, length - max(map(len, prompts))), seed)
    texts = tuple(loaded.tokenizer.decode(window[1:]) for window in windows)
    return Sample(
        windows, prompts, new_tokens, texts, None, f"text that the model itself writes after {len(prompts)} prompts"
    )


def _prompts(loaded: LoadedModel, room: int) -> tuple[tuple[int, ...], ...]:
    """Return the built-in prompts, after the token that starts documents."""
    encoded = [loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    return tuple((context_token(loaded.tokenizer), *ids)[:room] for ids in encoded)


def _lengths(loaded: LoadedModel) -> tuple[int, int]:
    """Return the number of tokens of a window and of a continuation, within the model's positions."""
    limit = max_positions(loaded.model)
    length = _WINDOW if limit is None else min(_WINDOW, limit)
    return length, min(_NEW_TOKENS, max(length // 2, 1))


def _sampled(
    loaded: LoadedModel, prompts: tuple[tuple[int, ...], ...], new_tokens: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Return prompts with a sampled continuation; the random state of the caller is left as it is."""
    width, model = max(map(len, prompts)), loaded.model
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    plain = with_plain_generation(
        model,
        new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # an end-of-text token would leave padding behind it
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    with evaluation_mode(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = plain.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return tuple(tuple(row[width - len(prompt) :].tolist()) for row, prompt in zip(output.cpu(), prompts, strict=True))
