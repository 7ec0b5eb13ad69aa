"""Pruning inside `transformers.Trainer`."""
