"""Training and test programs of the detectors."""
