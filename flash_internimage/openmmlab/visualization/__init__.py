"""Visualizers, which draw the pictures of `--show-dir`, validation and inferencers."""
