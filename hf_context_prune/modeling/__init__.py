"""Models: architectures, variable-width classes, plans, inference.

Importing this package registers the variable-width classes with the auto classes of `transformers`. The files in
`modeling_context_pruned.MODELING_FILES` are copied, without subfolders, beside every saved variable-width model, so
that the model also opens without the package (``trust_remote_code=True``).
"""

from .registry import register_classes

register_classes()
