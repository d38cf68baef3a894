"""Command lines of the classification programs."""
