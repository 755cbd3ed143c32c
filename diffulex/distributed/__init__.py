"""Experts on several devices: which rank owns what, what the ranks must agree on, and differentiable collectives."""

from __future__ import annotations

from .parallel import ParallelConfig
from .placement import ExpertPlacement

__all__ = ["ExpertPlacement", "ParallelConfig"]
