"""Helpers that know nothing of models or text: processes, linear algebra, precision, memory-mapped tensors, secrets."""
