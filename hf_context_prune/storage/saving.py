"""The files of a model folder, written by the staged write of `staging.py`: whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoTokenizer

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.modeling.configuration_context_pruned import config_of_memory
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.utils.file_names import PLAN_NAME, PROCESSOR_FILES, REPORT_NAME
from hf_context_prune.utils.foreign_code import drop_foreign_code
from hf_context_prune.utils.links import resolve_inside

from .layer_shards import save_weights
from .manifest import PICKLE_SUFFIXES
from .staging import resolve_target, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SIDE_FILES_BYTES = 8 * 2**20
"""Room for tokenizer, card and JSON files beside the weights."""


class _Savable(Protocol):
    """A value that writes itself to one JSON file: a `PruningPlan` or an `EvalReport`."""

    def save(self, path: Path) -> object: ...


def estimate_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that saving a model needs: its tensors, shared ones once, and 8 MiB for tokenizer and JSON."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + SIDE_FILES_BYTES


def save_pruned(
    model: PreTrainedModel,
    target: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: _Savable | None = None,
    report: _Savable | None = None,
) -> Path:
    """Write a model with its tokenizer, plan and report to a folder, whole or not at all.

    Args:
        model: The model to save.
        target: The folder: absent, empty, or an older folder of this package, which is then replaced.
        tokenizer: Saved beside the weights if given.
        plan: Saved as ``pruning_plan.json`` if given.
        report: Saved as ``eval_report.json`` if given.

    Returns:
        The absolute path of the folder.

    Raises:
        SaveError: The model can't be saved; nothing was put in place, and an older folder is as it was.
    """
    _refuse_unsavable(model)
    goal = resolve_target(target)
    with staged_folder(goal, required_bytes=estimate_bytes(model)) as staging:
        write_model_folder(staging, model, tokenizer=tokenizer, plan=plan, report=report)
    return goal


def write_model_folder(
    folder: Path,
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: _Savable | None = None,
    report: _Savable | None = None,
    processor: Path | None = None,
) -> None:
    """Write the files of a model into a staging folder.

    A variable-width model also gets the modeling files that its ``auto_map`` names. Apart from references to code of
    others and ``tie_word_embeddings``, which says what is true in memory, the config is written unchanged: code that
    trained the model has to reset ``use_cache`` before.

    Args:
        folder: An existing folder, as [`staged_folder`][] yields it.
        model: As in [`save_pruned`][].
        tokenizer: As in [`save_pruned`][].
        plan: As in [`save_pruned`][].
        report: As in [`save_pruned`][].
        processor: A folder of which the files of a processor of images are copied, as far as it has them.

    Raises:
        LoadError: A file of the processor leads out of its folder.
        SaveError: The config can't express the model (then nothing was written), the ``auto_map`` names a file that
            does not exist, code of others or a pickle was written, or the tokenizer would reopen as another one.
    """
    _refuse_unsavable(model)
    with config_of_memory(model):
        save_weights(model, folder)
    if str(model.config.model_type).startswith("context_pruned_"):
        _check_auto_map(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in PROCESSOR_FILES if processor is not None else ():
        if os.path.lexists(processor / name) and not (folder / name).exists():  # type: ignore[operator]
            shutil.copyfile(resolve_inside(processor, name), folder / name)  # type: ignore[arg-type]
    _refuse_code(folder)
    leave_out_foreign_code(folder, tokenizer)
    if plan is not None:
        plan.save(folder / PLAN_NAME)
    if report is not None:
        report.save(folder / REPORT_NAME)
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise SaveError(
            f"Saving wrote {', '.join(pickles)}: files that can run code when they are loaded. Only safetensors, JSON, "
            f"text and this package's modeling files are saved; use a tokenizer and a model that save without pickle."
        )


def _refuse_code(folder: Path) -> None:
    code = sorted(path.name for path in folder.rglob("*.py") if path.name not in MODELING_FILES)
    if code:
        raise SaveError(
            f"Saving wrote {', '.join(code)}: the code of a class that is not part of transformers or this package. "
            f"Only this package's modeling files are saved; use a tokenizer and a model of transformers' own classes."
        )


def leave_out_foreign_code(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Remove the references to foreign code from a folder that is being written.

    Args:
        folder: The folder; see [`drop_foreign_code`][].
        tokenizer: The tokenizer that was saved there.

    Raises:
        SaveError: Without its ``auto_map``, `transformers` opens the tokenizer as another one.
    """
    if not drop_foreign_code(folder) or tokenizer is None:
        return
    reopened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenization_of(reopened) != tokenization_of(tokenizer):
        raise SaveError(
            f"The auto_map of this {type(tokenizer).__name__} names code of others, which is not saved, and without it "
            f"transformers opens the saved files as a {type(reopened).__name__} with other tokens. Remove auto_map "
            f"from the tokenizer_config.json of the base, and repeat this."
        )


def tokenization_of(tokenizer: PreTrainedTokenizerBase) -> Any:  # noqa: ANN401 - JSON values
    """Return all that decides the tokens of a text, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}


def _refuse_unsavable(model: PreTrainedModel) -> None:
    reason = getattr(model, "_context_prune_unsavable", None)
    if reason is not None:
        raise SaveError(f"This {type(model).__name__} can't be saved so that it reloads unchanged: {reason}")
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in _dtypes_chosen(model))
    if len(dtypes) > 1:
        raise SaveError(
            f"This {type(model).__name__} can't be saved so that it reloads unchanged: its weights are "
            f"{' and '.join(dtypes)}, and a config names one dtype. Convert the model first, such as by "
            f"model.to(torch.float32)."
        )


def _dtypes_chosen(model: PreTrainedModel) -> set[torch.dtype]:
    """Return the dtypes of the parameters, less those that the class itself chooses whatever the model's dtype is."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) == 1:
        return dtypes
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(default)
    fixed = {name: parameter.dtype for name, parameter in made.named_parameters() if parameter.dtype != model.dtype}
    return {parameter.dtype for name, parameter in model.named_parameters() if parameter.dtype != fixed.get(name)}


def _check_auto_map(folder: Path) -> None:
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not auto_map:
        raise SaveError(
            "config.json of this variable-width model has no auto_map, so it would not open without this package. "
            "Set config.auto_map = hf_context_prune.modeling.registry.build_auto_map(spec) before saving."
        )
    for reference in auto_map.values():
        file_name = f"{reference.rpartition('.')[0]}.py"
        if not (folder / file_name).is_file():  # a "repo--module" reference, to another repository, fails here too
            raise SaveError(
                f"auto_map in config.json names {reference!r}, but {file_name} is not one of the package's modeling "
                f"files. Set config.auto_map = hf_context_prune.modeling.registry.build_auto_map(spec) before saving."
            )


def count_weight_bytes(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of all safetensors files directly in `folder`.

    Raises:
        LoadError: The folder holds no safetensors file.
    """
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not sizes:
        raise LoadError(f"{os.fspath(folder)!r} holds no *.safetensors file. Save the model with safetensors weights.")
    return sum(sizes)
