"""Benchmarks: one script per table; `common.py` holds the shared parts."""
