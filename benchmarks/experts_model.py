"""The small mixture of experts that `benchmarks.experts` prunes: its tokenizer, its training, and its checkpoints.

No published mixture of experts is small enough for the machines of these benchmarks. So one of OLMoE's shape is trained on
text of several domains: 32 experts per layer of which a token is routed to 4, softmax before the choice, gates that are not
normalised, and a loss that balances the experts, over whole batches alone: each batch holds all domains, so experts may
divide the domains among themselves. Batches and their order follow from the seed and the number of the step, so that a
training that is killed goes on to the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import corpus
from hf_context_prune.utils.precision import bfloat16_is_fast

END = "<|endoftext|>"
SHARES = {"law": 0.4375, "medicine": 0.4375, "general": 0.125}
"""Share of the training sequences. There is a twentieth as much general text, which would else be learnt by heart."""
TIMED_STEPS = 8
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its training.

    Attributes:
        vocab_size: Entries of its byte-level BPE tokenizer, which is trained on the same text.
        hidden_size: Width of the residual stream.
        layers: Decoder layers.
        heads: Attention heads.
        experts: Experts of every layer.
        per_token: Experts that a token is routed to.
        neurons: Neurons of an expert.
        length: Tokens per sequence.
        batch: Sequences per step.
        balance: Weight of the loss that balances the experts.
        learning_rate: Largest learning rate.
        tokenizer_bytes: Text per domain that the tokenizer is trained on.
    """

    vocab_size: int = 8192
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    experts: int = 32
    per_token: int = 4
    neurons: int = 128
    length: int = 256
    batch: int = 16
    balance: float = 0.01
    learning_rate: float = 1e-3
    tokenizer_bytes: int = 3_000_000

    def config(self, tokenizer: Any) -> OlmoeConfig:
        """Return the config of the model."""
        end = tokenizer.convert_tokens_to_ids(END)
        return OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.per_token,
            max_position_embeddings=2 * self.length,
            router_aux_loss_coef=self.balance,
            tie_word_embeddings=True,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
        )


QUICK = Shape(
    vocab_size=512,
    hidden_size=64,
    layers=2,
    experts=8,
    per_token=2,
    neurons=32,
    length=64,
    batch=8,
    tokenizer_bytes=50_000,
)


def train_tokenizer(args: argparse.Namespace, shape: Shape) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the train text of all domains."""

    def texts() -> Any:
        for domain in SHARES:
            size = 0
            for document in corpus(args, "train", domain).documents:
                if size > shape.tokenizer_bytes:
                    break
                size += len(document.text)
                yield document.text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode_corpora(args: argparse.Namespace, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return the train text of every domain as one row of ids, documents apart by an end token."""
    end, found = tokenizer.convert_tokens_to_ids(END), {}
    for domain in SHARES:
        texts = [document.text for document in corpus(args, "train", domain).documents]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        found[domain] = torch.tensor([token for one in ids for token in (end, *one)])
    return found


def draw_batch(text: dict[str, torch.Tensor], shape: Shape, seed: int, step: int) -> torch.Tensor:
    """Return the sequences of a step, [batch, length]: of every domain its share."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    counts = {domain: round(share * shape.batch) for domain, share in SHARES.items()}
    rows = []
    for domain, count in counts.items():
        starts = torch.randint(max(1, len(text[domain]) - shape.length), (count,), generator=generator)
        rows += [text[domain][start : start + shape.length] for start in starts.tolist()]
    return torch.stack(rows)


class Training:
    """A training that saves itself every few minutes, and goes on from there.

    Args:
        folder: Where its checkpoint lies.
        shape: Sizes.
        tokenizer: The tokenizer.
        seed: Seed of weights and batches.
    """

    def __init__(self, folder: Path, shape: Shape, tokenizer: Any, seed: int) -> None:
        self.path, self.shape, self.seed = folder / "checkpoint.safetensors", shape, seed
        torch.manual_seed(seed)
        self.model = OlmoeForCausalLM(shape.config(tokenizer)).train()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=shape.learning_rate, betas=(0.9, 0.95))
        self.step, self.total, self.seconds, self.loss = 0, 0, 0.0, math.nan

    def run(self, text: dict[str, torch.Tensor], minutes: float, steps: int, save_minutes: float) -> None:
        """Train for a number of steps, or for as many as take some minutes, counted once the first few are timed."""
        self._load()
        self.total = self.total or steps
        saved = begin = time.perf_counter()
        timed = 0.0
        while not self.total or self.step < self.total:
            before = time.perf_counter()
            self.advance(draw_batch(text, self.shape, self.seed, self.step))
            timed += time.perf_counter() - before if self.step > WARM_UP_STEPS else 0.0
            if not self.total and self.step == WARM_UP_STEPS + TIMED_STEPS:
                self.total = max(self.step, int(60 * minutes * TIMED_STEPS / timed))
            now = time.perf_counter()
            if now - saved > 60 * save_minutes or self.step == self.total:
                self.seconds, begin, saved = self.seconds + now - begin, now, now
                self._save()
                tokens = self.step * self.shape.batch * self.shape.length
                print(
                    f"step {self.step} of {self.total}, loss {self.loss:.3f}, {tokens / self.seconds:,.0f} tokens/s",
                    flush=True,
                )

    def advance(self, batch: torch.Tensor) -> None:
        """Make one step. The learning rate rises over a twentieth of the steps, then falls to a tenth as a cosine."""
        warm_up = max(1, self.total // 20) if self.total else 100
        scale = 0.1 + 0.45 * (1 + math.cos(math.pi * self.step / self.total)) if self.total else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.shape.learning_rate * scale * min(1.0, (self.step + 1) / warm_up)
        with self._precision():
            loss = self.model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.loss = self.step + 1, float(loss.detach())

    def _precision(self) -> AbstractContextManager[None]:
        fast = bfloat16_is_fast(torch.device("cpu"))
        return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()  # type: ignore[return-value]

    def _save(self) -> None:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": self.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
        facts = {
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
            "shape": self.shape,
            "seed": self.seed,
        }
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={key: repr(value) for key, value in facts.items()})
        os.replace(partial, self.path)

    def _load(self) -> None:
        if not self.path.exists():
            return
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            facts = file.metadata()
            if (facts["shape"], facts["seed"]) != (repr(self.shape), repr(self.seed)):
                raise SystemExit(f"{self.path} is of a model of other sizes or another seed. Start over with --fresh.")
            self.step, self.total, self.seconds = int(facts["step"]), int(facts["total"]), float(facts["seconds"])
            for name, parameter in self.model.named_parameters():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                moments = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def get_or_train(args: argparse.Namespace, shape: Shape) -> tuple[Any, Any, dict[str, Any]]:
    """Return the trained model with its tokenizer, and facts on its training; from disk where it is finished."""
    folder = Path(args.work) / f"{args.section}-model"
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _once(folder / "tokenizer", lambda: train_tokenizer(args, shape), AutoTokenizer.from_pretrained)
    training = Training(folder, shape, tokenizer, args.seed)
    training.run(encode_corpora(args, tokenizer), args.minutes, args.steps, args.save_minutes)
    model = _once(folder / "model", lambda: training.model, AutoModelForCausalLM.from_pretrained).eval()
    tokens = training.step * shape.batch * shape.length
    return model, tokenizer, {"steps": training.step, "tokens": tokens, "seconds": round(training.seconds, 1)}


def _once(folder: Path, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
    """Return what is saved in a folder; made and saved first where it is not there."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make().save_pretrained(partial)
        os.replace(partial, folder)
    return load(folder)


def divergence(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the Jensen-Shannon divergence of two distributions over experts, in bits: 0 where alike, 1 where apart."""
    p, q = (torch.tensor(one, dtype=torch.float64) / sum(one) for one in (first, second))
    middle = (p + q) / 2
    return float(sum((one * (one / middle).log2().nan_to_num()).sum() for one in (p, q)) / 2)
