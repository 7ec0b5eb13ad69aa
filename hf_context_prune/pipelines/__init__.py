"""Whole runs, one per file: the only place where stages meet."""
