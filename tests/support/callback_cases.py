"""A tiny training that the tests of the callback share, also as a script in processes of its own.

Usage: python -m tests.support.callback_cases FOLDER [train|killed|resume|push]...
With several modes, each trains in a folder of its own below FOLDER.
"""

from __future__ import annotations

import os
import random
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_context_prune import PrunerConfig
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.training.callback.mixin import ContextPruneTrainerMixin
from hf_context_prune.training.callback.schedule import PruningSchedule
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

SCHEDULE = PruningSchedule(start=2, end=6, num_prunings=3)
STEPS = 8


def config_for(**options):
    chosen = {"num_calibration_samples": 16, "max_seq_length": 32, "mlp_ratio": 0.5, "attention_ratio": 0.34}
    return PrunerConfig(**(chosen | options))


def dataset(count=160, *, length=32, seed=0):
    """Samples of token ids with labels."""
    return [{"input_ids": row.clone(), "labels": row.clone()} for row in _token_ids(count, length, seed)]


@cache
def _token_ids(count, length, seed):
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    texts = [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(count)]
    return [torch.tensor(tokenizer(text)["input_ids"][:length]) for text in texts]


def arguments(folder, **options):
    chosen = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**(chosen | options))


class OurTrainer(ContextPruneTrainerMixin, Trainer):
    """Pushes as the package does."""


def trainer_for(folder, callback, *, kind=Trainer, model=None, callbacks=(), data=None, eval_data=None, **options):
    """A Trainer on the tiny data, that prints nothing."""
    from transformers import PrinterCallback

    trainer = kind(
        model or tiny_model("llama"),
        arguments(folder, **options),
        train_dataset=data or dataset(),
        eval_dataset=eval_data,
        callbacks=[callback, *callbacks] if callback else list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Snapshots(TrainerCallback):
    """The weights after every step, as each process has them."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


class WaitForTheKill(TrainerCallback):
    """At the end of step 4, after its pruning, tell by a file that it is time."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_step_end(self, args, state, control, **_):
        import time

        if state.global_step == 4:
            (self.folder / "now").touch()
            time.sleep(600)


def main(folder, modes):
    """Train in every mode, one after another in the same processes."""
    torch.set_num_threads(1)
    for mode in modes:
        trainer = train(folder / mode if len(modes) > 1 else folder, mode)
    trainer.accelerator.end_training()


def train(folder, mode):
    """Train, and leave the final weights of each process in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    model, snapshots = None, Snapshots()
    checkpoint = None
    if mode == "resume":
        checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        model = load_checkpoint(checkpoint)
    trainer = trainer_for(
        folder,
        ContextPruneCallback(config_for(), SCHEDULE),
        model=model,
        callbacks=[snapshots, *([WaitForTheKill(folder)] if mode == "killed" else [])],
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=batch,
        **({"ddp_find_unused_parameters": False} if batch < 4 else {}),
        **({"kind": OurTrainer, "push_to_hub": True, "hub_model_id": "org/two"} if mode == "push" else {}),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    rank = os.environ.get("RANK", "0")
    plan = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, ContextPruneCallback)).plan
    torch.save(
        {"final": trainer.model.state_dict(), "steps": snapshots.weights, "plan": plan.to_dict()},
        folder / f"result.{rank}.pt",
    )
    trainer.save_model(str(folder / "final"))
    if mode == "push":
        trainer.push_to_hub(commit_message="The end")
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["train"])
