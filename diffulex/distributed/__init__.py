"""Experts on several devices: which rank owns what, their loads, agreement of the ranks, differentiable collectives."""

from __future__ import annotations

from .balance import PlacementPlan, plan_placement
from .faults import naming_lost_ranks
from .load import ExpertLoad
from .parallel import ParallelConfig
from .placement import ExpertPlacement

__all__ = ["ExpertLoad", "ExpertPlacement", "ParallelConfig", "PlacementPlan", "naming_lost_ranks", "plan_placement"]
