"""A model folder -> an export of it, compared in its own runtime, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_context_prune.export.report import ExportReport
from hf_context_prune.export.run import MAX_TOKENS, ExportResult, run_export
from hf_context_prune.publishing.card.export_card import write_export_card
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.provenance import read_base_card
from hf_context_prune.utils.locks import reserves


@reserves("output")
def export_model(
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
) -> ExportResult:
    """Write a model folder in another format, run the artefact, and put it in place if it gives the same results.

    Args:
        folder: A pruned folder, or any other model that `load_model` opens.
        output: Folder to write: absent, empty, or an untouched older export.
        format: ``"quanto"``, ``"torchao"``, ``"onnx"`` or ``"gguf"``.
        dtype: Data type of the weights; None takes the default of the format (the first of its entry in `FORMATS`).
        data: Test text for the comparison; None takes text that the model itself writes, which has no bits per byte.
        importance_data: Text of the domain, other than `data`, that tells which inputs matter (llama.cpp's importance
            matrix): their errors are kept small. For the k-quants of gguf.
        text_column: Column with the text.
        max_tokens: Largest number of tokens of `data` to compare on, in passages of many documents.
        tolerance: Relative change of the perplexity to allow, instead of the limit of the format.
        seed: Seed of the choice of passages, or of the model's own text.

    Returns:
        The folder that was written, and the comparison: `result.report.verification` has the losses before and after.

    Raises:
        ConfigError: The format or data type is unknown, a package is not installed, or the folder is an export.
        ExportError: The format can't hold the model, or the artefact differs by more than the tolerance.
        SaveError: The output can't be written.
        ContextPruneError: See `hf_context_prune.errors`. In every case the output is as it was.

    Example:
        ```python
        from hf_context_prune import export_model

        result = export_model("mini-gpt", "mini-gguf", format="gguf", dtype="q4_k_m")
        print(result.folder, result.report.verification.perplexity_change)
        ```
    """
    return run_export(
        folder,
        output,
        format=format,
        dtype=dtype,
        data=data,
        importance_data=importance_data,
        text_column=text_column,
        max_tokens=max_tokens,
        tolerance=tolerance,
        seed=seed,
        write_card=lambda staging, loaded, report: _write_card(staging, loaded, report, Path(output).name),
    )


def _write_card(staging: Path, loaded: LoadedModel, report: ExportReport, name: str) -> None:
    write_export_card(
        staging,
        name=name,
        source=loaded.folder,
        base=read_base_card(loaded),
        made_as=(report.format, report.weights, report.source),
        rows=report.table_rows(),
        caption=report.caption(),
    )
