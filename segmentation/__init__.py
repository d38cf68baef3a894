"""Training and test programs of the segmentors."""
