"""``hf-context-prune serve``."""

from __future__ import annotations

import typer

from .options import FolderArgument


def serve(context: typer.Context, folder: FolderArgument) -> None:
    """Serve DIR with an OpenAI-compatible API: `transformers serve DIR`, whose options can be given too.

    `transformers serve` alone looks for a model's class in transformers, and finds those of native widths only.
    """
    from hf_context_prune.pipelines.serve import serve as run

    run(folder, context.args)
