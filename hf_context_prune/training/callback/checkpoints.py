"""Checkpoints of a pruning training: whether one can be resumed, and its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerState

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.file_names import PLAN_NAME

CONFIG_FILE = "config.json"


def progress_of(saved: Any, own: Mapping[str, Any], state: TrainerState, steps: Sequence[int]) -> dict[str, Any]:  # noqa: ANN401
    """What a checkpoint says of the training so far, if it is this training.

    Args:
        saved: The callback's state in the checkpoint.
        own: Config and schedule of the callback that resumes, as plain values.
        state: Of the Trainer.
        steps: After which the callback that resumes would prune.

    Raises:
        ConfigError: It was another training; says in what.
    """
    where = f"The checkpoint of step {state.global_step}"
    saved = saved[0] if isinstance(saved, list) and saved else saved
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
                f"{where} belongs to a training with another {part}: {asked}. Resume with what it was begun with."
            )
    progress: dict[str, Any] = saved["attributes"]["progress"]
    if progress["num_processes"] != num_processes():
        raise ConfigError(
            f"{where} was written by {progress['num_processes']} process(es), and now there are {num_processes()}: "
            f"batches and weights would not be the same. Resume with as many."
        )
    if progress["steps"] != list(steps):
        raise ConfigError(
            f"{where} belongs to a training that prunes after the steps {progress['steps']}; with {state.max_steps} "
            f"steps in all they would be {list(steps)}. Resume with the same max_steps or epochs."
        )
    return progress


def use_cache_of(model: PreTrainedModel) -> bool:
    """What a config is to say when the training is over: a Trainer sets it to False, and leaves the other config."""
    return getattr(model.generation_config, "use_cache", None) is not False


def complete_checkpoint(folder: Path, plan: PruningPlan | None, *, use_cache: bool) -> None:
    """Put the plan into a checkpoint that the Trainer wrote, and ``use_cache`` back into its config."""
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8")) | {"use_cache": use_cache}
    staged = file.with_name(f"{CONFIG_FILE}.tmp")
    staged.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    staged.replace(file)
    if plan is not None:
        plan.save(folder / PLAN_NAME)


def load_checkpoint(checkpoint: str | Path, **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
    """The model of a Trainer's checkpoint, with the widths that it had then: to resume, or to use.

        trainer = Trainer(model=load_checkpoint(path), callbacks=[ContextPruneCallback(config, schedule)], ...)
        trainer.train(resume_from_checkpoint=path)

    Args:
        checkpoint: A ``checkpoint-*`` folder.
        **kwargs: As for `from_pretrained`: ``dtype`` and ``attn_implementation``, where the training had others than
            the default.

    Raises:
        LoadError: It is none.
    """
    folder = Path(checkpoint)
    if not (folder / CONFIG_FILE).is_file():
        raise LoadError(f"{folder} is not a checkpoint of a Trainer: it holds no {CONFIG_FILE}.")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **kwargs)
    return model
