"""The state of a training in a resume folder, from which the same training goes on after a kill, to the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerState

from hf_context_prune.storage.kept_tensors import read_kept_tensors, write_kept_tensors

Tensors = dict[str, torch.Tensor]
_BYTES = 16
"""Largest number of bytes of a parameter: the weight, two moments of AdamW, and the best weight so far, in float32."""


def trainable_weights(model: PreTrainedModel) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the weights that are trained, by name."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def state_bytes(num_trained: int) -> int:
    """Return the bytes that the states of a training may take: the last one, and a newer one that takes its place."""
    return 2 * _BYTES * num_trained


@dataclass(frozen=True)
class KeptTraining:
    """A training as it was right after a measurement of the validation text.

    Attributes:
        course: The state of the `RecoveryMonitor`, as JSON values.
        best: The best weights so far, by name; empty where they are `weights`, or those of before the training.
        trainer: The state of the Trainer, as JSON values; None where the training had ended, which keeps nothing
            but `course` and `best`.
        weights: The weights at that step.
        optimizer: State and groups, as `Optimizer.state_dict` gives them.
        schedule: State of the learning rate, as `LRScheduler.state_dict` gives it.
        random: States of torch's random numbers: ``cpu`` and, on a GPU, ``cuda``.
    """

    course: dict[str, Any]
    best: Tensors
    trainer: dict[str, Any] | None
    weights: Tensors
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    random: Tensors

    @torch.no_grad()
    def restore_weights(self, model: PreTrainedModel) -> None:
        """Move the weights into a model."""
        for name, weight in trainable_weights(model):
            weight.copy_(self.weights.pop(name))

    def restore_optimizer(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Put state and learning rates into a new optimizer and its new schedule."""
        scheduler.load_state_dict(self.schedule)
        optimizer.load_state_dict(self.optimizer)

    def restore_random(self) -> None:
        """Set torch's random numbers."""
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"])


class RecoveryCheckpoint:
    """One file, whole or absent, that holds the last measured state of exactly one training.

    It takes at most 16 bytes of a parameter that is trained; while a newer state takes its place, there are two.

    Args:
        folder: Where the file lies.
        key: Hash of all that decides the training; see [`resume_key`][].
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / "recovery.safetensors", key

    def save(
        self,
        course: Mapping[str, Any],
        best: Tensors,
        model: PreTrainedModel,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        state: TrainerState,
    ) -> None:
        """Write the state of a training that goes on.

        Raises:
            SaveError: The file can't be written; an older one is as it was.
        """
        facts, tensors = optimizer.state_dict(), _named("best", best) | _named("weight", dict(trainable_weights(model)))
        for index, moments in facts["state"].items():
            tensors |= _named(f"optimizer/{index}", moments)
        tensors["random/cpu"] = torch.get_rng_state()
        if model.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        self._write(
            tensors,
            course=course,
            groups=facts["param_groups"],
            schedule=scheduler.state_dict(),
            trainer=asdict(state),
        )

    def save_ended(self, course: Mapping[str, Any], best: Tensors) -> None:
        """Write the best weights of a training that has ended.

        Raises:
            SaveError: The file can't be written; an older one is as it was.
        """
        self._write(_named("best", best), course=course, groups=[], schedule={}, trainer=None)

    def _write(self, tensors: Tensors, **facts: Any) -> None:  # noqa: ANN401 - JSON values
        texts = {name: json.dumps(value) for name, value in facts.items()}
        write_kept_tensors(self.path, tensors, self.key, texts, what="measured state of the recovery")

    def load(self) -> KeptTraining | None:
        """Return the state that an earlier run of the same training left; None if there is none."""
        kept = read_kept_tensors(self.path, self.key, remedy="the model is trained from the beginning")
        if kept is None:
            return None
        tensors, texts = kept
        facts = {name: json.loads(text) for name, text in texts.items() if name != "key"}
        moments: dict[int, Tensors] = {}
        for name, value in _within("optimizer", tensors).items():
            index, _, moment = name.partition("/")
            moments.setdefault(int(index), {})[moment] = value
        return KeptTraining(
            course=facts["course"],
            best=_within("best", tensors),
            trainer=facts["trainer"],
            weights=_within("weight", tensors),
            optimizer={"state": moments, "param_groups": facts["groups"]},
            schedule=facts["schedule"],
            random=_within("random", tensors),
        )


def _named(group: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def _within(group: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    start = f"{group}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
