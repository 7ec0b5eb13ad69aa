"""Runtimes of exported models: losses of given tokens, greedy text, and a tokenizer where the runtime has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hf_context_prune.modeling.generation import get_end_token_ids, time_generation, with_plain_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runtime(Protocol):
    """A loaded artefact. `close()` frees it; no method may be called afterwards."""

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """Return the negative log-likelihood (nats) of each of ``ids[1:]``, given the tokens before it.

        Args:
            ids: Token ids.
            expected: Approximate results, which some runtimes need for precision.
        """

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return the new tokens of a greedy continuation, without an end-of-text token at its end."""

    def time_generation(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Return the seconds that the runtime takes to read prompts of one length, and for its decode steps.

        Args:
            prompts: Token ids of sequences that are decoded together.
            new_tokens: Decode steps, at least 1.
        """

    def encode(self, text: str) -> list[int] | None:
        """Return token ids of the runtime's tokenizer, without special tokens; None where it has no tokenizer."""

    def close(self) -> None:
        """Free the artefact."""


class TorchRuntime:
    """A model of transformers: the folder's own, or one with quantised weights.

    It runs under `no_grad`, because Quanto's int4 weights can't be unpacked under `inference_mode`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model.eval()

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """Return losses as [`Runtime`][] does."""
        chosen = torch.tensor(ids[1:]).unsqueeze(-1)
        return [-value for value in self.log_probabilities(ids)[:-1].gather(-1, chosen).squeeze(-1).tolist()]

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Continue a text as [`Runtime`][] does."""
        prompt = torch.tensor([list(ids)], device=self._model.device)
        ends = get_end_token_ids(self._model)
        with torch.no_grad():
            output = with_plain_generation(self._model, new_tokens=new_tokens).generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt)
            )
        new: list[int] = output[0, len(ids) :].tolist()
        return new[:-1] if new and new[-1] in ends else new

    def time_generation(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Time a generation as [`Runtime`][] does."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.no_grad():
            return time_generation(self._model, ids, new_tokens, inference=False)

    def encode(self, text: str) -> list[int] | None:
        """Return None: the tokenizer is the one of transformers."""
        return None

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of every token [position, token], float32, on the CPU."""
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([list(ids)], device=self._model.device), use_cache=False).logits
        return torch.log_softmax(logits[0].float(), dim=-1).cpu()

    def gaps(self, prompt: Sequence[int], text: Sequence[int]) -> list[float]:
        """Return how much likelier (nats) the best token is than each token of a continuation; 0 for the best token."""
        scores = self.log_probabilities([*prompt, *text])[len(prompt) - 1 : -1]
        chosen = scores.gather(-1, torch.tensor(list(text), dtype=torch.long).unsqueeze(-1)).squeeze(-1)
        return (scores.amax(dim=-1) - chosen).tolist()
