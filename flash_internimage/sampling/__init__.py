"""Show where the DCNv3 and DCNv4 layers of a model sample their input."""

from .drawing import draw_maps, draw_sampling_points
from .fields import OffsetLengths, effective_receptive_field, offset_lengths
from .layers import last_of_stages, list_layers
from .points import SamplingPoints, sampling_points
from .preprocessing import Preprocessing, preprocessing_of

__all__ = [
    "OffsetLengths",
    "Preprocessing",
    "SamplingPoints",
    "draw_maps",
    "draw_sampling_points",
    "effective_receptive_field",
    "last_of_stages",
    "list_layers",
    "offset_lengths",
    "preprocessing_of",
    "sampling_points",
]
