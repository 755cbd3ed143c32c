"""`diffulex.adapt(model)`: experts that transformers' interface does not reach, swapped in place for the ops."""

from .report import AdaptReport, LayerAdaptation
from .walk import adapt

__all__ = ["AdaptReport", "LayerAdaptation", "adapt"]
