"""Datasets that are validated before a run, and the transforms that read their files."""
