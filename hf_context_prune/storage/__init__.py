"""Folders on disk: loading, saving, caches, manifests, resume points."""
