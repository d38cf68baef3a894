"""Parameters, multiply-adds, activations and memory of models of all tasks, without computing.

Models and images are on the meta device, so neither a GPU nor weights nor memory are needed.
"""

from .measure import Complexity, measure_complexity

__all__ = ["Complexity", "measure_complexity"]
