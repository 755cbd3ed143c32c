"""MoE layers, from a spec or a model config."""

from __future__ import annotations

from typing import Any

from lowering.errors import MoEOptionError

from .base import FusedMoE
from .gate import RouterGate
from .naive_impl import NaiveFusedMoE
from .shared import SharedExpertMLP
from .spec import GEMM_IMPLS, MoESpec, get_moe_spec

BLOCK_IMPLS = ("naive",)

__all__ = [
    "BLOCK_IMPLS",
    "GEMM_IMPLS",
    "FusedMoE",
    "MoESpec",
    "NaiveFusedMoE",
    "RouterGate",
    "SharedExpertMLP",
    "build_moe_block",
    "get_moe_spec",
]


def build_moe_block(impl: str, config: Any, layer_idx: int | None = None, **options: Any) -> FusedMoE:
    """The MoE layer of a config; `impl` says where its experts live: "naive" on one device.

    options: `moe_gemm_impl` (None: the config's attribute of that name, or "triton"), `device`, `dtype`.

    Raises `MoEOptionError` for another `impl`, `MoEConfigError` for what the config does not say.
    """
    if impl == "naive":
        return NaiveFusedMoE.from_config(config, layer_idx, **options)
    raise MoEOptionError.of(
        "build_moe_block", expected=f"impl in {BLOCK_IMPLS}", got=repr(impl), hint="'naive' is the layer on one device."
    )
