"""Backbone, neck, layers, detectors and segmentors."""
