"""The entry of an architecture that a program registered, beside a saved variable-width model of it.

In the package, and beside models of the table's own architectures, there is none. Only literals stand here: the package
reads this file of a folder as data, and never runs it.
"""

from __future__ import annotations

from typing import Any

ENTRIES: tuple[dict[str, Any], ...] = ()
