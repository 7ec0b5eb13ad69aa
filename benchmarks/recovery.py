"""Measure recovery: pruned models after training, beside the base model trained as long; ablations; the callback.

python -m benchmarks.recovery --data PATH/TO/data            # medicine and law; resumes
python -m benchmarks.recovery --data PATH/TO/data --quick    # medicine, one size, a few minutes of training
python -m benchmarks.recovery --data PATH/TO/data --sizes    # medicine, several sizes, 8 minutes of training each
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.common import Rows, corpus, given, parser, write_section
from benchmarks.methods import OURS, Domain, rounded
from benchmarks.models import smollm2
from benchmarks.recovery_text import (
    ABLATIONS,
    EQUAL_TOKENS,
    GOAL_MINUTES,
    HEADLINE,
    LEARNING_RATE,
    REMOVED,
    SHORT_MINUTES,
    Run,
    ablations_text,
    callback_text,
    domain_text,
)
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.architectures import TARGETS
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.schedule import PruningSchedule
from hf_context_prune.training.recovery.config import MEASURED_HIDDEN_SIZE, RecoveryConfig
from hf_context_prune.training.recovery.recover import recover
from hf_context_prune.utils.precision import bfloat16_is_fast, reduced_precision_matmul


class RecoveryDomain(Domain):
    """A domain with its pruned models on disk, so that a resumed run does not prune again."""

    @cached_property
    def general(self) -> TextSource:
        """General test text (validation split), without documents that overlap with the domain's train text."""
        return drop_overlapping(corpus(self.args, "validation", "general"), self.train)[0]

    def pruned(self, share: float) -> LoadedModel:
        """Load the pruned model of this share, after pruning and saving it if it is not there yet."""
        folder = self.args.work / "models" / f"{self.name}-{share:g}-{self.args.num_samples}-{self.args.seed}"
        if not folder.exists():
            loaded = self.load()
            config = PrunerConfig(
                pruning_ratio=share,
                vocab_size=self.args.tokens[str(share)],
                native_architecture=False,
                num_calibration_samples=self.args.num_samples,
                max_seq_length=self.args.length,
                pruning_seed=self.args.seed,
            )
            model, tokenizer, plan = prune_model(
                loaded.model, loaded.tokenizer, CalibrationSet(self.train, config), config
            )
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_pruned(model, folder, tokenizer=tokenizer, plan=plan)
        return load_model(folder, dtype="float32", device="cpu")

    def scored(self, model: Any, tokenizer: Any, dense: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Score a model on the domain's text and on general text, on the documents of the base model's row."""
        result: dict[str, Any] = {"parameters": model.num_parameters()}
        for name, source in (("own", self.test_text[0]), ("general", self.general)):
            with reduced_precision_matmul():
                losses = document_losses(
                    model,
                    tokenizer,
                    source,
                    max_seq_length=self.args.length,
                    max_tokens=None if dense else self.args.eval_tokens,
                    docs=dense[name]["documents"] if dense else None,
                )
            result[name] = {
                "documents": [loss.doc for loss in losses],
                "nll": rounded(losses),
                "bytes": sum(loss.num_bytes for loss in losses),
            }
        return result

    def measure(self, run: Run, share: float, minutes: float, dense: Mapping[str, Any] | None) -> dict[str, Any]:  # type: ignore[override]
        """Train as a run says, and score the model."""
        loaded = self.load() if run.dense else self.pruned(share)
        if run.options is None:
            return self.scored(loaded.model, loaded.tokenizer, dense)
        config = RecoveryConfig(
            **run.options,
            max_minutes=minutes,
            max_seq_length=self.args.length,
            num_epochs=100.0,
            recovery_seed=self.args.seed,
        )
        result = recover(loaded.model, self.train, config, tokenizer=loaded.tokenizer)
        return {**self.scored(result.model, loaded.tokenizer, dense), "history": result.history.to_dict()}

    def measure_equal(self, way: str, share: float, steps: int, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Train on the same text, steps and learning rate, pruned during training or before; the vocabulary is kept."""
        model, tokenizer = copy.deepcopy(self.model), self.load().tokenizer
        config = PrunerConfig(
            pruning_ratio=share,
            allocation="uniform",
            **OURS,  # type: ignore[arg-type]
            num_calibration_samples=self.args.num_samples,
            max_seq_length=self.args.length,
            pruning_seed=self.args.seed,
        )
        listened, pruned = _Timed(config), 0.0
        if way == "then":
            begin = time.perf_counter()
            model, _, _ = prune_model(model, tokenizer, CalibrationSet(self.train, config), config)
            pruned = time.perf_counter() - begin
        rest, _ = hold_out_documents(self.train, seed=self.args.seed)
        batch = 4
        count = steps * batch
        samples = tokenize_samples(
            rest, tokenizer, num_samples=count, max_seq_length=self.args.length, seed=self.args.seed
        )
        folder = tempfile.mkdtemp(prefix="hf_context_prune-")
        begin = time.perf_counter()
        try:
            trainer = Trainer(
                model,
                TrainingArguments(
                    output_dir=folder,
                    max_steps=steps,
                    per_device_train_batch_size=batch // 2,
                    gradient_accumulation_steps=2,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="cosine",
                    warmup_steps=max(1, steps // 20),
                    adam_beta2=0.95,
                    weight_decay=0.01,
                    bf16=bfloat16_is_fast(torch.device("cpu")),
                    use_cpu=True,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    seed=self.args.seed,
                ),
                train_dataset=[{"input_ids": row, "labels": row} for row in samples],
                callbacks=[listened] if way == "gradual" else [],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = time.perf_counter() - begin
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        return {
            **self.scored(model, tokenizer, dense),
            "history": {
                "tokens": steps * batch * self.args.length,
                "seconds": seconds,
                "listening": listened.listening,
                "pruning": listened.pruning if way == "gradual" else pruned,
            },
        }


class _Timed(ContextPruneCallback):
    """The callback, with the seconds that listening and pruning take."""

    def __init__(self, config: Any = None, schedule: Any = None) -> None:
        super().__init__(config, schedule or PruningSchedule(0.1, 0.4, 3))
        self.listening = self.pruning = 0.0
        listen = self.listener.listen

        def timed(*args: Any) -> None:
            begin = time.perf_counter()
            listen(*args)
            self.listening += time.perf_counter() - begin

        self.listener.listen = timed  # type: ignore[method-assign]

    def _prune(self, *args: Any) -> None:
        begin = time.perf_counter()
        super()._prune(*args)
        self.pruning += time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__ or "", several=True)
    options.set_defaults(domains=["medicine", "law"])
    part = options.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="medicine, one size, a few minutes of training")
    part.add_argument("--sizes", action="store_true", help="medicine, several sizes, 8 minutes of training")
    options.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.5], help="of all parameters, to remove")
    options.add_argument(
        "--vocabularies", nargs="+", type=int, default=[16_384, 8_192], help="entries to keep, for each share"
    )
    options.add_argument("--minutes", type=float, default=GOAL_MINUTES, help="minutes of training")
    options.add_argument("--short-minutes", type=float, default=SHORT_MINUTES, help="minutes of training, ablations")
    options.add_argument("--steps", type=int, default=50, help="training steps with and without the callback")
    options.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=20_000, help="at most this many test tokens per domain")
    if "--quick" in arguments:
        small: dict[str, Any] = {"domains": ["medicine"], "shares": [0.3], "vocabularies": [16_384], "minutes": 2.5}
        options.set_defaults(**small, num_samples=24, eval_tokens=8_000)
    if "--sizes" in arguments:
        sizes: dict[str, Any] = {"shares": [0.1, 0.2, 0.3], "vocabularies": [32_768, 20_480, 16_384]}
        options.set_defaults(**sizes, domains=["medicine"], minutes=SHORT_MINUTES)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    args.tokens = {str(share): tokens for share, tokens in zip(args.shares, args.vocabularies, strict=True)}
    # The sizes have their own rows, because their base model was tuned on the same machine in the same run.
    family = "recovery_sizes" if args.sizes else "recovery"
    store, load = Rows(args, family, seed=args.seed), cache(smollm2)
    prefix = "recovery_quick" if args.quick else family
    whole = not (args.quick or args.sizes)
    domains = {name: RecoveryDomain(load, args, name, targets=TARGETS) for name in args.domains}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    common = {"blocks": args.num_samples, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}

    def get(place: tuple[Any, ...], measure: Callable[[], dict[str, Any]], **more: Any) -> None:
        rows[place] = store.get_or_measure({"place": list(place), **common, **more}, measure)

    def recall(domain: RecoveryDomain, key: str, share: float) -> None:
        """Take the row of a way of training that no longer exists, if the file has it."""
        place = {"place": [domain.name, key, share], "minutes": args.short_minutes, "tokens": args.tokens[str(share)]}
        if (row := store.find({**place, **common, "learning_rate": LEARNING_RATE})) is not None:
            rows[domain.name, key, share] = row

    def measure(domain: RecoveryDomain, key: str, share: float, minutes: float = 0.0) -> None:
        dense = rows.get((domain.name, "dense", 0))
        run = {**HEADLINE, **ABLATIONS}[key]
        more: dict[str, Any] = {}
        if key != "dense":
            more["minutes"] = minutes
        if share:
            more["tokens"] = args.tokens[str(share)]
        if run.options is not None:
            more["learning_rate"] = RecoveryConfig(**run.options).peak_learning_rate(MEASURED_HIDDEN_SIZE)
        get((domain.name, key, share), lambda: domain.measure(run, share, minutes, dense), **more)

    first, least = domains[args.domains[0]], args.shares[0]
    if whole:  # the short runs come first: they show whether the default deserves the long ones
        measure(first, "dense", 0)
        measure(first, "one-shot", least)
        for key in ABLATIONS:
            measure(first, key, least, args.short_minutes)
        for key in REMOVED:
            recall(first, key, least)
        write_section(f"{prefix}-ablations", ablations_text(rows, args))
    for name, domain in domains.items():
        measure(domain, "dense", 0)
        for share in args.shares:
            measure(domain, "one-shot", share)
            measure(domain, "ours", share, args.minutes)
        measure(domain, "dense-tuned", 0, args.minutes)
        write_section(f"{prefix}-{name}", domain_text(name, rows, args))
    if whole:
        for key in EQUAL_TOKENS:
            get(
                (first.name, key, least),
                lambda k=key: first.measure_equal(k, least, args.steps, rows[first.name, "dense", 0]),
                steps=args.steps,
                learning_rate=LEARNING_RATE,
            )
        write_section(f"{prefix}-callback", callback_text(rows, args))


if __name__ == "__main__":
    main()
