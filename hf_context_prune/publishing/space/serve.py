"""Serving a Space: the start of ``app.py``, and Gradio's server with public access in mind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hf_context_prune.errors import ConfigError, ContextPruneError
from hf_context_prune.utils.file_names import SPACE_SETTINGS_NAME
from hf_context_prune.utils.palette import css_variables

from .gradio_import import import_gradio
from .html import read_template_file
from .page import build
from .settings import DEMO_FOLDER, Settings, demo_settings, read_space_settings

_HEAD = (
    f"<style>{css_variables()} "
    "footer .divider:last-child { display: none !important; } "
    "@media (max-width: 640px) { .gradio-container > .main { padding: 0.75rem !important; } }</style>"
)
"""A style outside the reach of `css`, which Gradio confines to the parts within the container."""
_UPLOAD_BYTES = 1  # no input takes a file


def serve(blocks: Any, settings: Settings, **launch: Any) -> Any:  # noqa: ANN401 - arguments and result of gradio's launch
    """Serve the blocks of [`build`][] to the public: one generation at a time, a short queue, no uploads, no internals.

    Args:
        blocks: The blocks of `build`.
        settings: The settings that they were built from.
        launch: Further arguments of gradio's `launch`, such as ``prevent_thread_lock``. Address and port come from
            GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
    """
    gr = import_gradio()
    # api_open: outside of the Hub's Spaces, Gradio would let a plain POST skip the queue.
    blocks.queue(max_size=settings.limits.waiting, default_concurrency_limit=1, api_open=False)
    return blocks.launch(
        theme=_make_theme(gr),
        css=read_template_file("style.css"),
        head=_HEAD,
        show_error=False,
        max_file_size=_UPLOAD_BYTES,
        enable_monitoring=False,
        ssr_mode=False,
        footer_links=["api", "gradio"],
        **launch,
    )


def _make_theme(gr: Any) -> Any:  # noqa: ANN401 - gradio, and its theme
    """Return a theme with the fonts of the system, so that none is fetched."""
    system = [gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")]
    return gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=system, font_mono=mono).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color_dark="white",
    )


def choose_settings(arguments: list[str], beside: Path) -> Settings:
    """Return the settings for a start of ``app.py``.

    Args:
        arguments: At most one: the YAML of a Space.
        beside: Folder of ``app.py``. Without an argument, its ``space.yaml`` is taken if there is one; without both,
            the default: the folder that ``hf-context-prune demo`` wrote to the current folder.

    Raises:
        ConfigError: There are several arguments, or the YAML can't be used.
    """
    if len(arguments) > 1:
        raise ConfigError(f"app.py takes one argument, the YAML of a Space; it was given {len(arguments)}.")
    own = beside / SPACE_SETTINGS_NAME
    if arguments or own.is_file():
        return read_space_settings(arguments[0] if arguments else own)
    return demo_settings(Path(DEMO_FOLDER).absolute())


def main(beside: Path) -> None:
    """Serve a Space until it is stopped.

    Args:
        beside: Folder of the running ``app.py``.
    """
    try:
        settings = choose_settings(sys.argv[1:], beside)
        blocks = build(settings)
    except ContextPruneError as error:
        sys.exit(f"Error: {error}")
    serve(blocks, settings)
