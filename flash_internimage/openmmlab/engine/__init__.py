"""Hooks, optimizers and the runner."""
