"""Weights of MoE blocks from transformers checkpoints and back, under every naming scheme in use."""

from __future__ import annotations

from lowering.errors import MoECheckpointError

from .block import Block, block_of
from .load import LoadOptions, load_checkpoint
from .reader import CheckpointReader
from .save import SaveOptions, save_checkpoint
from .schemes import SCHEMES, Scheme, scheme_of

__all__ = [
    "SCHEMES",
    "Block",
    "CheckpointReader",
    "LoadOptions",
    "MoECheckpointError",
    "SaveOptions",
    "Scheme",
    "block_of",
    "load_checkpoint",
    "save_checkpoint",
    "scheme_of",
]
