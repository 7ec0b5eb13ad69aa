"""Import of Gradio, which is an optional package."""

from __future__ import annotations

from typing import Any

from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.version import install_command

_INSTALL = f"The Space needs Gradio: {install_command('space')}."


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
