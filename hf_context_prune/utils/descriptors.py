"""Locks of open files, which the system frees when the file is closed or its process dies."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl


def lock_descriptor(descriptor: int) -> bool:
    """Lock an open file against other processes, and against other descriptors of this one, until it is closed.

    Args:
        descriptor: The file, open for writing: some network file systems lock no other.

    Returns:
        Whether it is locked; False on Windows, and on a file system without such locks.

    Raises:
        BlockingIOError: Another process, or another descriptor, holds the lock.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
