"""Training and test scripts of the segmentors."""
