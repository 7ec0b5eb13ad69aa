"""The versions of this package and of the libraries that a plan depends on."""

from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that decide what a plan contains."""
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def install_command(extra: str) -> str:
    """Return the command that installs an extra; the package is on no index, so it is run in a checkout."""
    return f'pip install ".[{extra}]" (in a checkout of hf_context_prune)'
