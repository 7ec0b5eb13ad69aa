"""Questions as a local task of lm-evaluation-harness, with the same prompts as `answer_questions`."""

import json
import os
import re
import shlex
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from hf_context_prune.data.questions import QuestionSet, format_prompt
from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.modeling.specs import PREFIX
from hf_context_prune.storage.files import refuse_inside_own
from hf_context_prune.storage.manifest import claims_to_be_ours
from hf_context_prune.utils.files import expand_home, resolve_path, write_file
from hf_context_prune.utils.foreign_code import find_foreign_code
from hf_context_prune.utils.locks import hold_lock
from hf_context_prune.utils.reading import read_yaml

_PROMPT = "{{prompt}}"


def harness_task_name(questions: str) -> str:
    """Return the name of the task for questions of a name (of a file, or a Hub id)."""
    return "context_prune_" + (re.sub(r"\W+", "_", Path(questions).stem.lower()).strip("_") or "questions")


def format_harness_command(model: str, questions: str, folder: str | Path) -> str:
    """Return the shell command that asks the questions of a task, with a note where it lacks something.

    ``trust_remote_code`` is given only for a folder of varying widths that names this package's modeling files alone.

    Args:
        model: Folder or Hub id of the model.
        questions: Name of the questions.
        folder: Folder of the task.
    """
    task, place, note = harness_task_name(questions), expand_home(model, LoadError), ""
    arguments = f"pretrained={shlex.quote(model)}"
    if not place.is_dir():
        note = " (a model of varying widths also needs trust_remote_code=True; read the code of its repository first)"
    elif str(PreTrainedConfig.get_config_dict(place)[0].get("model_type")).startswith(PREFIX):
        if found := find_foreign_code(place):
            note = f" (without trust_remote_code, as {model} names code of others: {found[0]})"
        else:
            arguments += ",trust_remote_code=True"
    path = shlex.quote(str(folder))
    return f"lm_eval --model hf --model_args {arguments} --include_path {path} --tasks {task} --num_fewshot 0{note}"


def write_harness_task(questions: QuestionSet, folder: str | Path, *, num_fewshot: int = 0) -> str:
    """Write a task folder for ``lm_eval --include_path FOLDER --tasks NAME --num_fewshot 0``.

    Examples are part of each prompt, since they come from the question's own source. ``acc`` is the scorer
    ``likelihood``; ``acc_norm`` divides by characters, ``likelihood_normalised`` by bytes: the same for ASCII.

    Args:
        questions: Questions with examples.
        folder: The folder, created if absent; an older task of that name is replaced.
        num_fewshot: Largest number of examples before a question.

    Returns:
        The task's name.

    Raises:
        SaveError: The folder holds a model or other files under the names of the task, lies in a folder that this
            package saved, or can't be written.
    """
    folder = resolve_path(folder, SaveError)
    refuse_inside_own(folder)
    if os.path.lexists(folder / "config.json") or claims_to_be_ours(folder):
        raise SaveError(f"{folder} holds a model; name another folder for the task.")
    name = harness_task_name(questions.name)
    rows = [
        {
            "id": question.id,
            "source": question.source,
            "prompt": format_prompt(question, questions.shots(question, num_fewshot)),
            "choices": list(question.choices),
            "answer": question.answer,
        }
        for question in questions.questions
    ]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _PROMPT,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0, "num_fewshot": num_fewshot},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"The task can't be written to {folder}: {error}. Name a folder that can be.") from error
    with hold_lock(folder):
        _refuse_other_files(folder, name)
        # Each task has its own file of rows: one folder may hold several tasks. The YAML proves whose the rows are.
        write_file(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return name


def _refuse_other_files(folder: Path, name: str) -> None:
    """Refuse to replace files under the names of a task, unless they are an older task of that name."""
    files = [file for file in (f"{name}.yaml", f"{name}.jsonl") if os.path.lexists(folder / file)]
    if not files:
        return
    try:
        task = read_yaml(folder / f"{name}.yaml")
    except (OSError, ValueError):
        task = None
    if not isinstance(task, dict) or (task.get("task"), task.get("doc_to_text")) != (name, _PROMPT):
        raise SaveError(
            f"{folder} holds {' and '.join(files)}, but no task that this package wrote: the files would be lost. Move "
            f"them, or name another folder for the task."
        )
