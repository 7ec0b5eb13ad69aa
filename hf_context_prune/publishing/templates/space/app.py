"""Entry point of the Space: ``python app.py [SPACE.yaml]``.

Without an argument it takes the space.yaml beside it; without that, what `hf-context-prune demo` wrote to this folder.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

for wheel in HERE.glob("hf_context_prune-*.whl"):
    # A Space's build sees requirements.txt and none of the files beside it, so the wheel is unpacked here.
    unpacked = tempfile.TemporaryDirectory(prefix="hf-context-prune-")  # goes when Python ends
    zipfile.ZipFile(wheel).extractall(unpacked.name)
    sys.path.insert(0, unpacked.name)

from hf_context_prune.publishing.space.page import main  # noqa: E402

if __name__ == "__main__":
    main(HERE)
