"""Benchmarks of the operators and the models, and their published results."""
