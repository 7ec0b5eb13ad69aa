"""Entry point of the Space: ``python app.py [SPACE.yaml]``.

Without an argument it takes the space.yaml beside it; without that, the folder that `hf-context-prune demo` wrote here.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

for wheel in HERE.glob("hf_context_prune-*.whl"):
    # The build of a Space sees requirements.txt and no file beside it, so the wheel is unpacked here.
    unpacked = tempfile.TemporaryDirectory(prefix="hf-context-prune-")  # removed when Python ends
    zipfile.ZipFile(wheel).extractall(unpacked.name)
    sys.path.insert(0, unpacked.name)

from hf_context_prune.publishing.space.serve import main  # noqa: E402

if __name__ == "__main__":
    main(HERE)
