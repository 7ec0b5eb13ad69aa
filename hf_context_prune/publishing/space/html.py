"""Pieces of the page as HTML: strict templates that escape every value."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_FOLDER = "publishing/templates/space"


@cache
def template_environment() -> Environment:
    """Return the environment of the templates: an unknown name is an error, and HTML is escaped."""
    return Environment(
        loader=PackageLoader("hf_context_prune", _FOLDER),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:  # noqa: ANN401 - whatever the template shows
    """Render a template as HTML.

    Args:
        template: Name of the template, such as ``"side"``.
        values: The values that it shows.
    """
    html = template_environment().get_template(f"{template}.html.jinja").render(values)
    # Gradio's own HTML component has templates too (`${}` and `{{}}`): a name with these in it must stay a name.
    return html.replace("{", "&#123;").replace("$", "&#36;")


def read_template_file(name: str) -> str:
    """Return the text of a file beside the templates."""
    return files("hf_context_prune").joinpath(_FOLDER, name).read_text(encoding="utf-8")
