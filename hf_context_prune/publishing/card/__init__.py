"""Model cards: the facts of a pruned folder, as metadata and text."""
