"""Programs that measure the operators and the models, and their published results."""
