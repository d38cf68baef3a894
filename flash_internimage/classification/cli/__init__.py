"""Command lines of the classification scripts."""
