"""What runs an exported model: losses of given tokens, greedy text, and (where it has its own) a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hf_context_prune.modeling.generation import get_end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""What a folder's generation config may change, and other runtimes don't read: the plain model is compared."""


class Runtime(Protocol):
    """A loaded artefact. `close()` frees what it holds; nothing may be called after it."""

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """Negative log-likelihoods (nats) of ``ids[1:]``, each given what is before it.

        Args:
            ids: Token ids.
            expected: About what they are, which some runtimes need to read them precisely.
        """

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """The new tokens of a greedy continuation, without the end-of-text token that may end it early."""

    def encode(self, text: str) -> list[int] | None:
        """Token ids by the runtime's own tokenizer, without special tokens; None where it has none of its own."""

    def close(self) -> None:
        """Free it."""


class TorchRuntime:
    """A model of transformers: the folder's own, or one with quantised weights.

    Under `no_grad`, not `inference_mode`, in which Quanto's int4 weights can't be unpacked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model.eval()

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """As in [`Runtime`][]."""
        chosen = torch.tensor(ids[1:]).unsqueeze(-1)
        return [-value for value in self.log_probabilities(ids)[:-1].gather(-1, chosen).squeeze(-1).tolist()]

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """As in [`Runtime`][]."""
        prompt = torch.tensor([list(ids)], device=self._model.device)
        ends = get_end_token_ids(self._model)
        with torch.no_grad():
            output = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                pad_token_id=ends[0] if ends else 0,
                **NEUTRAL,
            )
        new: list[int] = output[0, len(ids) :].tolist()
        return new[:-1] if new and new[-1] in ends else new

    def encode(self, text: str) -> list[int] | None:
        """None: the tokenizer is that of transformers."""
        return None

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Of every token [position, token], float32, on the CPU."""
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([list(ids)], device=self._model.device), use_cache=False).logits
        return torch.log_softmax(logits[0].float(), dim=-1).cpu()

    def gaps(self, prompt: Sequence[int], text: Sequence[int]) -> list[float]:
        """By how much (nats) the likeliest token beats each token of a continuation: 0 where it is the greedy one."""
        scores = self.log_probabilities([*prompt, *text])[len(prompt) - 1 : -1]
        chosen = scores.gather(-1, torch.tensor(list(text), dtype=torch.long).unsqueeze(-1)).squeeze(-1)
        return (scores.amax(dim=-1) - chosen).tolist()
