"""Training and test scripts of the detectors."""
