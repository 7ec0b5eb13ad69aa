"""``hf-context-prune serve``: `transformers serve`, for folders of variable widths too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.errors import ConfigError


def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned folder.")],
) -> None:
    """Serve DIR with an OpenAI-compatible API: `transformers serve DIR`, whose options can be given too.

    `transformers serve` alone looks for a model's class in transformers, and finds those of native widths only.
    """
    missing = [name for name in ("fastapi", "openai", "pydantic", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'Serving needs {", ".join(missing)}: pip install "hf-context-prune[serving]".')
    import transformers
    from transformers.cli.transformers import main

    from hf_context_prune.export.report import ExportReport
    from hf_context_prune.modeling import model_class
    from hf_context_prune.modeling.modeling_context_pruned import model_class_name
    from hf_context_prune.modeling.specs import SPECS
    from hf_context_prune.storage.manifest import verify_folder
    from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME

    if EXPORT_REPORT_NAME in verify_folder(folder)["files"]:
        report = ExportReport.load(folder / EXPORT_REPORT_NAME)
        if report.format != "torchao":  # transformers would draw the weights that it does not find at random
            raise ConfigError(
                f"{folder} is an export to {report.format}, which transformers can't serve. Serve the folder that it "
                f"was made from ({report.source}), or an export to torchao."
            )
    for spec in SPECS.values():
        setattr(transformers, model_class_name(spec), model_class(spec))
    sys.argv = ["transformers", "serve", str(folder), *context.args]
    main()
