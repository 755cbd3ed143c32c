"""Every Mixture-of-Experts family of transformers as a tiny model, and what becomes of it under `torch.compile`."""

from .catalogue import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
