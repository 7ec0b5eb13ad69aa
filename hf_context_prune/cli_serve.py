"""``hf-context-prune serve``: `transformers serve`, for folders of variable widths too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError


def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned folder.")],
) -> None:
    """Serve DIR with an OpenAI-compatible API: `transformers serve DIR`, whose options can be given too.

    `transformers serve` alone looks for a model's class in transformers, and finds those of stock widths only.
    """
    missing = [name for name in ("fastapi", "openai", "pydantic", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'Serving needs {", ".join(missing)}: pip install "hf-context-prune[serving]".')
    import transformers
    from transformers.cli.transformers import main

    from .modeling import SPECS, model_class
    from .modeling.modeling_context_pruned import model_class_name
    from .saving import verify_folder

    verify_folder(folder)
    for spec in SPECS.values():
        setattr(transformers, model_class_name(spec), model_class(spec))
    sys.argv = ["transformers", "serve", str(folder), *context.args]
    main()
