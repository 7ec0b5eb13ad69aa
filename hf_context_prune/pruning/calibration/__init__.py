"""Calibration: the statistics of the units on domain text."""
