"""For scripts that run in a fresh process: the package can't be imported there, and nothing is fetched from the Hub."""

import os
import sys
from pathlib import Path


class _Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_context_prune":
            raise ImportError("hf_context_prune is barred here")


def bar_package():
    """Bar the package; call this before `transformers` is imported. Returns the folder that the command line names."""
    folder = Path(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    sys.meta_path.insert(0, _Barred())
    return folder
