"""Export models to ONNX, torch.export, OpenVINO and AOTInductor, verified on real images.

Example::

    from flash_internimage.export import export_model
    from flash_internimage.inference import load_predictor

    predictor = load_predictor("flash_internimage_tiny.in1k", device="cpu")
    report = export_model(predictor, "tiny.onnx")
"""

from .exporting import Report, export_model
from .formats import FORMATS
from .verification import Comparison, DifferenceError, Timing

__all__ = ["FORMATS", "Comparison", "DifferenceError", "Report", "Timing", "export_model"]
