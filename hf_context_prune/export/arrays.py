"""Arrays that are written to a file with every error."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


class FileArray(np.ndarray):  # type: ignore[type-arg]
    """An array that writes its bytes through the file object.

    numpy writes them through a buffer of its own, and ignores an error when the buffer is emptied at the end: on a full
    disk the file then lacks its last bytes without a word.
    """

    def tofile(self, fid: BinaryIO, sep: str = "", format: str = "%s") -> None:  # type: ignore[override]
        """Write all bytes in C order."""
        fid.write(np.ascontiguousarray(self).reshape(-1).view(np.uint8).data)


def as_file_array(values: NDArray[Any]) -> FileArray:
    """Return the same values as a [`FileArray`][], in C order."""
    return np.ascontiguousarray(values).view(FileArray)
