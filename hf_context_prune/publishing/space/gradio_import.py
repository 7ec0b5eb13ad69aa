"""Import of Gradio, which is an optional package."""

from __future__ import annotations

from typing import Any

from hf_context_prune.errors import ConfigError

_INSTALL = 'The Space needs Gradio: pip install "hf-context-prune[space]".'


def import_gradio() -> Any:  # noqa: ANN401 - an optional package
    """Return the package.

    Raises:
        ConfigError: Gradio is not installed; the message has the command that installs it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    return gradio
