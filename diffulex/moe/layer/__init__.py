"""MoE layers, from a spec or a model config."""

from __future__ import annotations

from typing import Any

from lowering.errors import MoEOptionError

from ...distributed.parallel import ParallelConfig
from .base import FusedMoE
from .ep_impl import EPFusedMoE
from .gate import RouterGate
from .naive_impl import NaiveFusedMoE
from .sharded import expert_parameter_names
from .shared import SharedExpertMLP
from .spec import GEMM_IMPLS, MoESpec, get_moe_spec
from .tp_impl import TPFusedMoE

BLOCK_IMPLS = ("naive", "tp", "ep")

__all__ = [
    "BLOCK_IMPLS",
    "GEMM_IMPLS",
    "EPFusedMoE",
    "FusedMoE",
    "MoESpec",
    "NaiveFusedMoE",
    "RouterGate",
    "SharedExpertMLP",
    "TPFusedMoE",
    "build_moe_block",
    "expert_parameter_names",
    "get_moe_spec",
]


def build_moe_block(
    impl: str, config: Any, layer_idx: int | None = None, *, parallel: ParallelConfig | None = None, **options: Any
) -> FusedMoE:
    """The MoE layer of a config; `impl` says where its experts live.

    "naive": on one device. "tp": on all ranks of `parallel`, which have the same tokens. "ep": on all ranks, which
    have tokens of their own. Layers over several ranks are made by all of them together.
    options: `moe_gemm_impl` (None: the config's attribute of that name, or "triton"), `device`, `dtype`.

    Raises `MoEOptionError` for another `impl`, or where it and `parallel` do not fit; `MoEConfigError` for what the
    config does not say; `MoEParallelError` where the ranks were given different layers.
    """
    if impl not in BLOCK_IMPLS:
        raise MoEOptionError.of(
            "build_moe_block",
            expected=f"impl in {BLOCK_IMPLS}",
            got=repr(impl),
            hint="'naive' is the layer on one device.",
        )
    if (impl == "naive") != (parallel is None):
        raise MoEOptionError.of(
            "build_moe_block",
            expected="a ParallelConfig for 'tp' and 'ep', and none for 'naive'",
            got=f"impl={impl!r}, parallel={'None' if parallel is None else 'given'}",
            hint="Pass parallel=diffulex.distributed.ParallelConfig(mesh, mode).",
        )
    if impl == "naive":
        return NaiveFusedMoE.from_config(config, layer_idx, **options)
    layer = TPFusedMoE if impl == "tp" else EPFusedMoE
    return layer.from_config(config, layer_idx, parallel=parallel, **options)
