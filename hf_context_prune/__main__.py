"""``python -m hf_context_prune``: the command line, for launchers that start modules."""

from .cli.app import main

main()
