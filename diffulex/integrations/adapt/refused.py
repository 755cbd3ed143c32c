"""Modules that hold experts which the ops cannot express, by the name of their class."""

from __future__ import annotations

from lowering.errors import Reason, ReasonCode

_DETAILS = {
    "DogeCDMoE": (
        "product keys: each of its experts is one row of an embedding, and tokens mix in its router; there is no matrix"
        " product per expert for the ops to run"
    ),
    "VitPoseNaiveMoe": (
        "the data set of an image picks the expert, without a router, and each expert is one Linear that makes part of"
        " the features"
    ),
}


def refused(kind: str) -> Reason | None:
    """Why modules of this class are left as they are; None for classes that are not known to be beyond the ops."""
    return Reason(ReasonCode.STRUCTURE, _DETAILS[kind]) if kind in _DETAILS else None
