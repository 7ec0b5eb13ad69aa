"""Checkpoints of a pruning training: what they keep, whether one can be resumed, and its model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerState
from transformers.utils import CONFIG_NAME

from hf_context_prune.errors import ConfigError, ContextPruneError, LoadError, PlanError
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.loading import load_weights
from hf_context_prune.storage.manifest import verify_if_ours
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.file_names import MANIFEST_NAME, PLAN_NAME
from hf_context_prune.utils.files import write_file

from .wholeness import check_whole


@dataclass
class PruningProgress:
    """How far a training has pruned: the part of the callback's state that training changes.

    Attributes:
        plan: Kept units, counted in the model that the training began with; None before the first pruning.
        total_params: Parameters of that model; 0 before any training.
        dense: Its widths.
        final: Uniform widths after the last pruning; None for adaptive ones, which are found by measuring.
        tokens: Token ids of the last batches.
        metrics: Sizes that are logged.
        num_done: Prunings that are done.
        fingerprint: Fingerprint of the model that the training began with.
        use_cache: `use_cache` of the config, to be restored after training.
        padding_idx: `padding_idx` of the embedding.
        steps: Steps after which to prune, ascending.
        base: Provenance of the model that the training began with.
        num_processes: Processes of the training.
    """

    plan: PruningPlan | None = None
    total_params: int = 0
    dense: tuple[LayerWidths, ...] = ()
    final: tuple[LayerWidths, ...] | None = None
    tokens: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    num_done: int = 0
    fingerprint: str = ""
    use_cache: bool = True
    padding_idx: int | None = None
    steps: tuple[int, ...] = ()
    base: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "plan": None if self.plan is None else self.plan.to_dict(),
            "dense": [astuple(widths) for widths in self.dense],
            "final": None if self.final is None else [astuple(widths) for widths in self.final],
            "steps": list(self.steps),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningProgress:
        """Build from the values of `to_dict`; earlier versions wrote no `base` and no `padding_idx`."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        final = known["final"]
        return cls(
            **known
            | {
                "plan": None if known["plan"] is None else PruningPlan.from_dict(known["plan"]),
                "dense": tuple(LayerWidths(*widths) for widths in known["dense"]),
                "final": None if final is None else tuple(LayerWidths(*widths) for widths in final),
                "tokens": list(known["tokens"]),
                "metrics": dict(known["metrics"]),
                "steps": tuple(known["steps"]),
                "base": dict(known.get("base") or {}),
            }
        )


def read_progress(saved: Any, own: Mapping[str, Any], state: TrainerState, steps: Sequence[int]) -> PruningProgress:  # noqa: ANN401
    """Read the progress in a checkpoint, if it belongs to this training.

    Args:
        saved: The callback's state in the checkpoint.
        own: Config and schedule of the callback that resumes, as plain values.
        state: State of the Trainer.
        steps: Steps after which the callback that resumes would prune.

    Raises:
        ConfigError: It belongs to another training; says what differs.
        LoadError: It is damaged.
    """
    where = f"The checkpoint of step {state.global_step}"
    saved = saved[0] if isinstance(saved, list) and saved else saved
    try:
        return _read_progress(where, saved, own, state, steps)
    except (KeyError, TypeError, AttributeError, PlanError) as error:
        raise LoadError(
            f"{where} holds a damaged state of its ContextPruneCallback ({type(error).__name__}: {error}). Resume from "
            f"an earlier checkpoint, or start the training again."
        ) from error


def _read_progress(
    where: str,
    saved: Any,  # noqa: ANN401
    own: Mapping[str, Any],
    state: TrainerState,
    steps: Sequence[int],
) -> PruningProgress:
    if not saved or not saved["attributes"]["progress"]["total_params"]:
        raise ConfigError(
            f"{where} was written without a ContextPruneCallback. Start from its weights as a new training, without "
            f"resume_from_checkpoint."
        )
    for part in ("config", "schedule"):
        then = saved["args"][part]
        differing = sorted(key for key in own[part] if own[part][key] != then.get(key))
        if differing:
            asked = ", ".join(f"{key}={own[part][key]!r} (was {then.get(key)!r})" for key in differing)
            raise ConfigError(
                f"{where} belongs to a training with another {part}: {asked}. Resume with the {part} of its begin."
            )
    progress = PruningProgress.from_dict(saved["attributes"]["progress"])
    if progress.num_processes != num_processes():
        raise ConfigError(
            f"{where} was written by {progress.num_processes} process(es), and now there are {num_processes()}: "
            f"batches and weights would not be the same. Resume with as many."
        )
    if progress.steps != tuple(steps):
        raise ConfigError(
            f"{where} belongs to a training that prunes after the steps {list(progress.steps)}; with "
            f"{state.max_steps} steps in all they would be {list(steps)}. Resume with the same max_steps or epochs."
        )
    return progress


def read_use_cache(model: PreTrainedModel) -> bool:
    """Return the `use_cache` to restore after training.

    The Trainer sets ``config.use_cache = False`` but leaves `generation_config` alone, so it is read there.
    """
    return getattr(model.generation_config, "use_cache", None) is not False


def complete_checkpoint(folder: Path, plan: PruningPlan | None, *, use_cache: bool) -> None:
    """Put the plan into a checkpoint that the Trainer wrote, and ``use_cache`` back into its config.

    Raises:
        SaveError: The config can't be written; it is as it was.
    """
    file = folder / CONFIG_NAME
    values = json.loads(file.read_text(encoding="utf-8")) | {"use_cache": use_cache}
    write_file(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
    if plan is not None:
        plan.save(folder / PLAN_NAME)


def load_checkpoint(checkpoint: str | Path, **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
    """Load the model of a Trainer's checkpoint, with the widths that it had then: to resume, or to use.

        trainer = Trainer(model=load_checkpoint(path), callbacks=[ContextPruneCallback(config, schedule)], ...)
        trainer.train(resume_from_checkpoint=path)

    Only JSON and safetensors are read. The Trainer that resumes loads the states of optimizer, scheduler and random
    numbers, which are pickles, by torch's ``weights_only``; here only the archives around them are checked.

    Args:
        checkpoint: A ``checkpoint-*`` folder, or one of ``Trainer.save_model``.
        **kwargs: As for `from_pretrained`: ``dtype`` and ``attn_implementation``, if the training had other ones than
            the default.

    Returns:
        The model of the checkpoint, with its widths.

    Raises:
        LoadError: The folder is no checkpoint, or not a whole one (names the last whole one beside it); its weights are
            a pickle, or are not those of its config.
        UnsupportedArchitectureError: The architecture is not in the table.
    """
    folder = Path(checkpoint)
    check_whole(folder)
    if os.path.lexists(folder / MANIFEST_NAME):  # a Trainer writes none; a folder with one was saved by this package
        verify_if_ours(folder)
    try:
        return load_weights(str(folder), folder, **kwargs)
    except ContextPruneError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError...
        raise LoadError(f"The model of {folder} can't be loaded: {type(error).__name__}: {error}") from error
