"""Evaluation: losses by document, multiple choice, speed and memory, with intervals."""
