"""Allocation: how many units each layer keeps."""
