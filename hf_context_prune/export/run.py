"""Export of a model folder to another format; the artefact is compared in its runtime before it is put in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import ConfigError, ContextPruneError, ExportError, LoadError, PruningWarning
from hf_context_prune.modeling.generation import hardware_name
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import claims_to_be_ours, verify_folder
from hf_context_prune.storage.saving import count_weight_bytes, estimate_bytes, leave_out_foreign_code
from hf_context_prune.storage.staging import check_space, check_target, resolve_target, staged_folder
from hf_context_prune.utils.failed_writes import find_failed_write
from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME, PLAN_NAME
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.foreign_code import refuse_foreign_code
from hf_context_prune.utils.memory import fits_in_memory
from hf_context_prune.utils.options import at_least

from .formats import FORMATS, ExportFormat, FormatModule, Importance, format_of
from .importance import measure_importance
from .report import ExportReport
from .runtime import Runtime, TorchRuntime
from .sample import own_sample, read_sample
from .verify import check, check_tokens, compare, measure

_LOGGER = logging.getLogger(__name__)
MAX_TOKENS = 2000
_SIDE_BYTES = 32 * 2**20
"""Room for the tokenizer and the other parts of a file, beside at most 16 bits per weight."""


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        folder: Path of the export.
        report: Its report, with the comparison.
    """

    folder: Path
    report: ExportReport


def run_export(
    folder: str | Path,
    output: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    data: Any = None,  # noqa: ANN401 - whatever load_documents reads
    importance_data: Any = None,  # noqa: ANN401 - the same
    text_column: str | None = None,
    max_tokens: int = MAX_TOKENS,
    tolerance: float | None = None,
    seed: int = 0,
    write_card: Callable[[Path, LoadedModel, ExportReport], None],
) -> ExportResult:
    """Export a folder as `export_model` does, with a card from elsewhere; see there for the errors.

    Args:
        folder: As for `export_model`.
        output: As for `export_model`.
        format: As for `export_model`.
        dtype: As for `export_model`.
        data: As for `export_model`.
        importance_data: As for `export_model`.
        text_column: As for `export_model`.
        max_tokens: As for `export_model`.
        tolerance: As for `export_model`.
        seed: As for `export_model`.
        write_card: Writes the card into the folder that is being written, for a loaded model and the report.
    """
    if data is None:
        _warn_of_unused(None if importance_data is not None else text_column, max_tokens)
    kind = format_of(format)
    chosen = next(iter(kind.dtypes)) if dtype is None else dtype.lower()  # llama.cpp writes Q4_K_M
    allowed = kind.tolerance(chosen)
    if importance_data is not None and chosen not in kind.weighted:
        able = [f"{name}: {', '.join(sorted(one.weighted))}" for name, one in FORMATS.items() if one.weighted]
        raise ConfigError(
            f"importance_data serves data types that can weigh their errors ({'; '.join(able)}), and {chosen} of "
            f"{kind.name} is none. Leave it out, or choose one of them (--dtype)."
        )
    if not (seeds := at_least(0)).test(seed):
        raise ConfigError(f"seed is {seed!r}; it must be {seeds.text}.")
    if tolerance is not None:
        if not 0 <= tolerance < float("inf"):
            raise ConfigError(f"tolerance is {tolerance}; it must be a relative change of at least 0, such as 0.05.")
        allowed = replace(allowed, perplexity=tolerance)
    module = kind.module()
    goal = resolve_target(output)
    source = resolve_path(folder, LoadError)
    if goal == source or source in goal.parents:
        raise ConfigError(f"--output {output} lies in {folder}, which would then be damaged. Name another folder.")
    if source.exists() and goal in source.parents:
        raise ConfigError(f"{folder} lies in --output {output}, which would replace it. Name another folder.")
    if (source / EXPORT_REPORT_NAME).is_file():
        made = read_export(source)
        raise ConfigError(
            f"{folder} is already an export to {made.format}. Export the folder that it was made from ({made.source})."
        )
    check_target(goal, replaces=EXPORT_REPORT_NAME)
    kept_dtype = _dtype_to_load(kind, source)
    loaded = load_model(folder, dtype=kept_dtype, device="cpu")
    kind.check_memory(sum(parameter.nbytes for parameter in loaded.model.parameters()))
    if loaded.folder is not None and claims_to_be_ours(loaded.folder):
        refuse_foreign_code(loaded.folder, saved_here=True)
    module.check(loaded, chosen)
    required_bytes = _bytes_to_write(kind, loaded)
    check_space(goal, required_bytes)  # before the model is measured
    importance: dict[str, Importance] = {}
    weighed_by = None if importance_data is None else load_documents(importance_data, text_column=text_column)
    if weighed_by is not None:
        _LOGGER.info("Measuring which inputs matter.")
        test_text = None if data is None else load_documents(data, text_column=text_column)
        importance["importance"] = measure_importance(loaded, weighed_by, seed=seed, test_text=test_text)
    _LOGGER.info("Measuring the model of the folder.")
    sample = (
        own_sample(loaded, seed=seed)
        if data is None
        else read_sample(loaded, data, text_column, max_tokens=max_tokens, seed=seed)
    )
    reference = TorchRuntime(loaded.model)
    before = measure(reference, sample)
    plan_sha256, bytes_before = _plan_sha256(loaded), _bytes_of(loaded)
    with staged_folder(goal, required_bytes=required_bytes, replaces=EXPORT_REPORT_NAME) as staging:
        _LOGGER.info("Writing %s.", kind.name)
        _write(kind, module, load_model(folder, dtype=kept_dtype, device="cpu"), staging, chosen, **importance)
        _LOGGER.info("Running the artefact.")
        with _opened(kind, staging) as runtime:
            check_tokens(runtime, loaded.tokenizer, sample)
            after = measure(runtime, sample, before)
        found = compare(
            before, after, reference, sample, allowed, bytes_before=bytes_before, bytes_after=kind.size(staging)
        )
        check(found)
        report = ExportReport(
            kind.name,
            chosen,
            loaded.name,
            plan_sha256,
            kind.versions(),
            _machine(),
            found,
            importance=None if weighed_by is None else weighed_by.name,
        )
        report.save(staging / EXPORT_REPORT_NAME)
        write_card(staging, loaded, report)
    return ExportResult(goal, report)


def _dtype_to_load(kind: ExportFormat, folder: Path) -> str:
    """Return the data type of the format, or that of the files where a conversion of all weights would not fit."""
    if kind.copies or not folder.is_dir() or fits_in_memory(2 * count_weight_bytes(folder)):
        return kind.dtype
    return "auto"


def _warn_of_unused(text_column: str | None, max_tokens: int) -> None:
    """Warn about options of the test text, where none is given."""
    given = (("text_column", text_column, None), ("max_tokens", max_tokens, MAX_TOKENS))
    if unused := ", ".join(f"{name}={value!r}" for name, value, usual in given if value != usual):
        warnings.warn(
            f"{unused} has no effect: without data (--data) the export is compared on text that the model itself "
            f"writes.",
            PruningWarning,
            stacklevel=3,
        )


def open_export(folder: str | Path) -> Runtime:
    """Load an export in its runtime, after checking its files against the manifest.

    Args:
        folder: A folder that [`export_model`][] wrote.

    Returns:
        The export in its own runtime, which gives the logits of token ids.

    Raises:
        LoadError: A file is missing or was changed, or the folder is not an export.
        ConfigError: A package is not installed.
    """
    return _load(format_of(read_export(folder).format), Path(folder))


def read_export(folder: str | Path) -> ExportReport:
    """Read the report of an export, after checking its files against the manifest.

    Args:
        folder: A folder that [`export_model`][] wrote.

    Returns:
        The format, the data type, and the comparison with the model that was exported.

    Raises:
        LoadError: A file is missing or was changed, or the folder is not an export.
    """
    manifest = verify_folder(folder)
    if EXPORT_REPORT_NAME not in manifest["files"]:
        raise LoadError(f"{folder} has no {EXPORT_REPORT_NAME}, so it is not an export. Open it with load_pruned.")
    report = ExportReport.load(Path(folder) / EXPORT_REPORT_NAME)
    if report.format not in FORMATS:
        raise LoadError(f"{folder} is an export to {report.format!r}, a format that this version does not have.")
    return report


def _write(
    kind: ExportFormat, module: FormatModule, loaded: LoadedModel, staging: Path, dtype: str, **importance: Importance
) -> None:
    try:
        module.write(loaded, staging, dtype, **importance)
        leave_out_foreign_code(staging, loaded.tokenizer)  # of a base: many name code that nothing here needs
    except ContextPruneError:
        raise
    except Exception as error:
        if find_failed_write(error, staging) is not None:  # the staged write explains it
            raise
        raise ExportError(
            f"{loaded.name} can't be written as {kind.name}: {type(error).__name__}: {error}. Nothing was put in "
            f"place. Export to another format."
        ) from error


@contextmanager
def _opened(kind: ExportFormat, folder: Path) -> Iterator[Runtime]:
    runtime = _load(kind, folder)
    try:
        yield runtime
    except ContextPruneError:
        raise
    except Exception as error:  # runtimes raise errors of any type
        raise ExportError(
            f"The artefact fails in its runtime ({kind.name}): {type(error).__name__}: {error}. Nothing was put in "
            f"place. Export to another format."
        ) from error
    finally:
        runtime.close()


def _load(kind: ExportFormat, folder: Path) -> Runtime:
    try:
        return kind.module().load(folder)
    except ContextPruneError:
        raise
    except Exception as error:
        raise ExportError(
            f"{folder} can't be opened by the runtime of {kind.name}: {type(error).__name__}: {error}"
        ) from error


def _plan_sha256(loaded: LoadedModel) -> str | None:
    path = None if loaded.folder is None else loaded.folder / PLAN_NAME
    return PruningPlan.load(path).sha256 if path is not None and path.is_file() else None


def _bytes_of(loaded: LoadedModel) -> int:
    if loaded.folder is None:
        raise ConfigError(f"{loaded.name} is not a folder of safetensors files.")
    return count_weight_bytes(loaded.folder)


def _bytes_to_write(kind: ExportFormat, loaded: LoadedModel) -> int:
    """Return the bytes that an export needs: of the formats that hold whole models in memory, those of the model."""
    needed = estimate_bytes(loaded.model)
    return needed if kind.copies else min(needed, 2 * loaded.model.num_parameters() + _SIDE_BYTES)


def _machine() -> str:
    return f"{hardware_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
