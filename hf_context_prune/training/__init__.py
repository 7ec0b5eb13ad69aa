"""Pruning inside the Trainer, and recovery training."""
