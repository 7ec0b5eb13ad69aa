"""Benchmarks: one script a table; what they share is in `common.py`."""
