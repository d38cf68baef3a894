"""Command lines of the detection and segmentation programs."""
