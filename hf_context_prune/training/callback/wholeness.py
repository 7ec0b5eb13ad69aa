"""Whether a checkpoint of a Trainer is whole: a Trainer writes its files one by one into the final folder.

The order of transformers 5: config.json, generation_config.json, weights, tokenizer, training_args.bin, optimizer.pt,
scheduler.pt, scaler.pt (fp16), rng_state*.pth, trainer_state.json; then pruning_plan.json of `ContextPruneCallback`.
So a kill leaves a folder that lacks the last of them, or holds a part of one. Without pruning_plan.json it is whole:
the same plan is in trainer_state.json.

Who reads what: `load_checkpoint` reads config, generation config and safetensors. A Trainer that resumes reads weights
and trainer_state.json, and loads the pickles optimizer.pt, scheduler.pt, scaler.pt and rng_state*.pth, by torch's
``weights_only``. This package never unpickles them: of a pickle, only the archive around it is looked at. Nobody reads
training_args.bin.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hf_context_prune.errors import LoadError, PlanError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.hub_download import CONVERT
from hf_context_prune.utils.distributed import num_processes, process_index
from hf_context_prune.utils.file_names import PLAN_NAME
from hf_context_prune.utils.reading import MAX_JSON_BYTES, read_text

STATE_NAME = "trainer_state.json"
_MAX_STATE_BYTES = 2**30
"""A Trainer's state holds everything that it has logged."""
_NAME = re.compile(r"checkpoint-(\d+)")
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt")
_RANDOM_STATES = "rng_state*.pth"


class _NotWholeError(Exception):
    """A file is missing or cut; the message says which."""


def check_whole(folder: Path, *, to_resume: bool = False) -> None:
    """Refuse a checkpoint that was cut, and weights that are a pickle, before anything is loaded.

    A folder counts as a checkpoint by its name or by an optimizer's state in it; of any other folder (of
    ``Trainer.save_model``), model and config are checked.

    Args:
        folder: A checkpoint, or a folder that a Trainer saved a model to.
        to_resume: Require the state of the training too. A checkpoint of ``save_only_model`` has none, and is whole
            otherwise.

    Raises:
        LoadError: A file is missing, empty or cut; names the file, and the last whole checkpoint beside the folder.
    """
    try:
        _check(folder, to_resume=to_resume)
    except _NotWholeError as error:
        kind = "checkpoint" if _is_checkpoint(folder) or to_resume else "model folder of a Trainer"
        raise LoadError(f"{folder} is not a whole {kind}: {error}. {_advice(folder, to_resume=to_resume)}") from error


def check_resumable(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> None:
    """Check the checkpoint that a training is about to resume, before its Trainer loads any of it.

    Args:
        resume_from_checkpoint: As given to ``Trainer.train``; True means the last one in `output_dir`.
        output_dir: The Trainer's.

    Raises:
        LoadError: There is no checkpoint, or it is not whole; names the last whole one.
    """
    if not resume_from_checkpoint:
        return
    place = resume_from_checkpoint
    if isinstance(place, bool):
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise LoadError(
                f"{output_dir} holds no checkpoint to resume from. Start the training again, without "
                f"resume_from_checkpoint."
            )
        place = str(last)
    check_whole(Path(place), to_resume=True)


def _advice(folder: Path, *, to_resume: bool) -> str:
    last = next((item for item in _checkpoints_beside(folder) if _is_whole(item, to_resume=to_resume)), None)
    if last is None:
        return (
            "No checkpoint beside it is whole: start the training again, without resume_from_checkpoint, or save or "
            "copy the folder again."
        )
    return f"The last whole checkpoint is {last}: take that one."


def _checkpoints_beside(folder: Path) -> Iterator[Path]:
    """Yield the other checkpoints in the folder's parent, the last first."""
    parent = folder.resolve().parent
    if parent.is_dir():
        found = [(int(match[1]), path) for path in parent.iterdir() if (match := _NAME.fullmatch(path.name))]
        yield from (path for _, path in sorted(found, reverse=True) if path != folder.resolve())


def _is_whole(folder: Path, *, to_resume: bool) -> bool:
    try:
        _check(folder, to_resume=to_resume)
    except (_NotWholeError, LoadError):
        return False
    return True


def _is_checkpoint(folder: Path) -> bool:
    has_state = any((folder / name).exists() for name in _TRAINING_STATE) or any(folder.glob(_RANDOM_STATES))
    return has_state or _NAME.fullmatch(folder.resolve().name) is not None


def _check(folder: Path, *, to_resume: bool) -> None:
    if not folder.is_dir():
        raise _NotWholeError("there is no such folder")
    _read_json(folder / CONFIG_NAME)
    _check_weights(folder)
    if (folder / GENERATION_CONFIG_NAME).exists() or _is_checkpoint(folder):
        _read_json(folder / GENERATION_CONFIG_NAME)
    if _is_checkpoint(folder) or to_resume:
        progress = _read_progress(folder)
        _check_training_state(folder, progress, to_resume=to_resume)
        _check_plan(folder, progress)


def _check_weights(folder: Path) -> None:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).exists():
        _check_safetensors(folder / SAFE_WEIGHTS_NAME)
    elif index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise _NotWholeError(f"{index.name} names no weights")
        for name in sorted({str(shard) for shard in shards.values()}):
            if Path(name).name != name:
                raise _NotWholeError(f"{index.name} names {name!r}, which is no file name")
            missing = {key for key, shard in shards.items() if shard == name} - _check_safetensors(folder / name)
            if missing:
                raise _NotWholeError(f"{name} lacks {min(missing)}, which {index.name} says it holds")
    elif pickles := [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / name).exists()]:
        raise LoadError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it is loaded, "
            f"and is refused. {CONVERT}"
        )
    else:
        raise _NotWholeError(f"{SAFE_WEIGHTS_NAME} is missing")


def _check_safetensors(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file whose header and size are whole."""
    _check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _NotWholeError(f"{path.name} is cut or damaged ({error})") from error


def _check_archive(path: Path) -> None:
    """Check the archive that torch wrote: its table of contents is at its end. The pickle in it is not loaded."""
    _check_regular(path)
    try:
        with zipfile.ZipFile(path):
            pass
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _NotWholeError(f"{path.name} is cut or damaged ({error})") from error


def _check_regular(path: Path) -> None:
    """Refuse a missing or empty file, and what is no file: reading a pipe would wait for ever."""
    if not path.is_file():
        raise _NotWholeError(f"{path.name} is not a file" if path.exists() else f"{path.name} is missing")
    if not path.stat().st_size:
        raise _NotWholeError(f"{path.name} is empty")


def _read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; NaN is allowed, since a Trainer logs it."""
    _check_regular(path)
    try:
        values = json.loads(read_text(path, max_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise _NotWholeError(f"{path.name} is not whole JSON ({error})") from error
    if not isinstance(values, dict):
        raise _NotWholeError(f"{path.name} holds a {type(values).__name__}, not an object")
    return values


def _read_progress(folder: Path) -> dict[str, Any] | None:
    """Return the progress of the pruning in a Trainer's state, as plain values; None without a callback.

    The Trainer writes its state last: a folder with a whole one is whole up to what the callback adds.
    """
    try:
        saved = TrainerState(**_read_json(folder / STATE_NAME, _MAX_STATE_BYTES)).stateful_callbacks
        states = [item[0] if isinstance(item, list) else item for item in dict(saved or {}).values()]
    except (TypeError, ValueError, IndexError) as error:
        raise _NotWholeError(f"{STATE_NAME} is not the state of a Trainer ({error})") from error
    found = (state["attributes"].get("progress") for state in states if _has_attributes(state))
    return next((values for values in found if isinstance(values, dict) and "total_params" in values), None)


def _has_attributes(state: object) -> bool:
    return isinstance(state, dict) and isinstance(state.get("attributes"), dict)


def _check_training_state(folder: Path, progress: dict[str, Any] | None, *, to_resume: bool) -> None:
    names, found = [*_TRAINING_STATE], sorted(path.name for path in folder.glob(_RANDOM_STATES))
    several = num_processes()
    if several > 1 and progress is not None and progress.get("num_processes") == several:
        names.append(f"rng_state_{process_index()}.pth")  # each process resumes its own
    elif not found:
        names.append(_RANDOM_STATES)
    present = [name for name in names if (folder / name).exists()]
    if not present and not found and not to_resume:
        return  # save_only_model
    missing = [name for name in names if name not in present]
    if missing:
        only = " (save_only_model=True leaves it out)" if not present and not found else ""
        raise _NotWholeError(f"{missing[0]} is missing, so training can't go on as it was{only}")
    for name in {*names, *found}:
        _check_archive(folder / name)
    if (folder / "scaler.pt").exists():
        _check_archive(folder / "scaler.pt")


def _check_plan(folder: Path, progress: dict[str, Any] | None) -> None:
    if progress is None or progress.get("plan") is None or not (folder / PLAN_NAME).exists():
        return
    _check_regular(folder / PLAN_NAME)
    try:
        if PruningPlan.load(folder / PLAN_NAME) != PruningPlan.from_dict(progress["plan"]):
            raise _NotWholeError(f"{PLAN_NAME} is not the plan in {STATE_NAME}")
    except PlanError as error:
        raise _NotWholeError(f"{PLAN_NAME} or the plan in {STATE_NAME} is damaged ({error})") from error
