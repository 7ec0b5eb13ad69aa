"""Tiny models for a Space: a base, two pruned from it, and a server in this process that tests can hold and count."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.publishing.space.page import build
from hf_context_prune.publishing.space.serve import serve
from hf_context_prune.publishing.space.settings import Entry, Limits, Settings, Source
from hf_context_prune.publishing.space.store import ModelStore, load_source
from hf_context_prune.storage.loading import LoadedModel, load_model
from tests.support.runs import OPTIONS
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

CHAT = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def make_models(place: Path) -> Path:
    """``base``, ``uniform`` (the stock architecture) and ``variable`` (our class) below a folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_model("llama", tie_word_embeddings=True, max_position_embeddings=512)
    for config in (model.config, model.generation_config):
        config.eos_token_id = None  # they write to the end, whatever it is
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    quick = EvalOptions(max_tokens=400, benchmark=False, memory=False)
    for name, config in (
        ("uniform", PrunerConfig(mlp_ratio=0.5, **OPTIONS)),
        ("variable", PrunerConfig(pruning_ratio=0.2, units="neurons,kv_groups", native_architecture=False, **OPTIONS)),
    ):
        result = prune(load_model(place / "base"), texts(), config, eval_options=quick)
        result.save_pretrained(place / name)
    return place


def settings_of(place: Path, *, limits: Limits | None = None) -> Settings:
    """Three domains: two that work and one whose folder is not there."""
    base = Source(path=place / "base")
    prompts = ("the court finds", "is the patient given the dose?")
    entries = (
        Entry("Law", Source(path=place / "uniform"), base, prompts),
        Entry("Medicine", Source(path=place / "variable"), base, ("the patient was given",)),
        Entry("Lost", Source(path=place / "lost"), base),
    )
    return Settings("Tiny Mini-GPTs", entries, limits or Limits(new_tokens=100, prompt_characters=400))


@contextmanager
def serving(settings: Settings, store: ModelStore) -> Iterator[str]:
    """A server in this process; yields its address."""
    blocks = build(settings, store)
    _, address, _ = serve(
        blocks, settings, prevent_thread_lock=True, server_name="127.0.0.1", server_port=None, quiet=True
    )
    try:
        yield address.rstrip("/")
    finally:
        blocks.close()


class HeldStore(ModelStore):
    """Counts the steps of all models, and lets them through one by one while it is held."""

    def __init__(self, decode=None) -> None:
        super().__init__(self._counted)
        self.steps, self._decode, self._free = 0, decode, threading.Event()
        self.hold()
        self._free.set()

    def hold(self) -> None:
        self._permits, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self._free.clear()

    def let(self, steps: int) -> None:
        """Let this many steps begin."""
        self._permits.release(steps)

    def run(self, steps: int) -> None:
        """Let this many steps run, and wait until the next one stands at its beginning."""
        self.let(steps)
        for _ in range(steps + 1):
            assert self.waits.acquire(timeout=60), f"fewer than {steps + 1} steps began"

    def release(self) -> None:
        self._free.set()
        self._permits.release(1_000_000)

    def _counted(self, source: Source) -> LoadedModel:
        loaded = load_source(source)
        loaded.model.register_forward_pre_hook(self._step)
        if self._decode is not None:
            loaded = replace(loaded, tokenizer=_Speaking(loaded.tokenizer, self._decode))
        return loaded

    def _step(self, *_: object) -> None:
        if not self._free.is_set():
            self.waits.release()
            self._permits.acquire(timeout=60)
        self.steps += 1


class _Speaking:
    """A tokenizer that says the same whatever it decodes."""

    def __init__(self, tokenizer, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments, **options):
        return self._tokenizer(*arguments, **options)

    def decode(self, *_: object, **__: object) -> str:
        return self._text
