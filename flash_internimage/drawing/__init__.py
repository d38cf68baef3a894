"""Pictures of predictions and annotations that people can read.

Images and pictures are (H, W, 3) uint8 arrays in RGB. Small images are enlarged before anything is
drawn, lines and text scale with the picture, and colors are distinct for color-blind readers.

Example::

    from flash_internimage.drawing import draw_detections, side_by_side

    truth = draw_detections(image, annotations, caption="Ground truth")
    prediction = draw_detections(image, detections, caption="Prediction")
    Image.fromarray(side_by_side([truth, prediction])).save("comparison.png")
"""

from .classification import draw_classification
from .colors import class_colors
from .detections import draw_detections
from .label_maps import draw_label_map
from .layout import contact_sheet, enlarge, side_by_side

__all__ = [
    "class_colors",
    "contact_sheet",
    "draw_classification",
    "draw_detections",
    "draw_label_map",
    "enlarge",
    "side_by_side",
]
