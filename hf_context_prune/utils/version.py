"""The versions of this package and of the libraries that a plan depends on."""

from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that decide what a plan contains."""
    return {name: metadata.version(name) for name in ("torch", "transformers")}
