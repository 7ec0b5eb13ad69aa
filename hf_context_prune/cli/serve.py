"""``hf-context-prune serve``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.errors import ConfigError

from .options import FolderArgument


class Engine(StrEnum):
    """What runs the model."""

    transformers = "transformers"
    vllm = "vllm"


def serve(
    context: typer.Context,
    folder: FolderArgument,
    engine: Annotated[Engine, typer.Option(help="What runs the model: transformers or vllm.")] = Engine.transformers,
    python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the environment that has vLLM, such as vllm/bin/python. By default this one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve DIR with an OpenAI-compatible API, by `transformers serve` or by vLLM.

    Options of the engine follow: `serve mini-gpt --port 8001`, or `serve mini-gpt --engine vllm --python
    vllm/bin/python --host 127.0.0.1 --max-model-len 2048`.

    vLLM 0.32 or later wants other versions of transformers than this package, so it has an environment of its own.
    `transformers serve` alone finds the classes of native widths only.
    """
    if engine is Engine.vllm:
        from hf_context_prune.pipelines.vllm_server import vllm_command

        command = vllm_command(folder, context.args, python=python)
        os.execve(command[0], command, os.environ | {"HF_HUB_OFFLINE": "1"})  # signals reach the server itself
    if python is not None:
        raise ConfigError("--python names the environment of vLLM; give --engine vllm with it.")
    from hf_context_prune.pipelines.serve import serve as run

    run(folder, context.args)
