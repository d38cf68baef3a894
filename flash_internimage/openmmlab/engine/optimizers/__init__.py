"""Optimizer constructor and optimizer wrapper."""
