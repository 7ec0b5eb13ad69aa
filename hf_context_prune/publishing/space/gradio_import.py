"""Gradio, which is an optional package."""

from __future__ import annotations

from typing import Any

from hf_context_prune.errors import ConfigError

_INSTALL = 'The Space needs Gradio: pip install "hf-context-prune[space]".'


def gradio() -> Any:  # noqa: ANN401 - an optional package
    """The package, or the error that says how to get it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    return gradio
