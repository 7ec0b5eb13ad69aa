"""Pruning: statistics in, a smaller model out."""
