"""Command lines of the detection and segmentation scripts."""
