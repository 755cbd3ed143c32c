"""A package `vllm` with the signatures of vLLM 0.33.0 and what its kernels compute, in PyTorch on any device.

Only what `diffulex.integrations.vllm` calls. `SOURCES` names where each of it stands in vLLM; `published` reads the
signature there, without importing it, so that a test compares the two wherever vLLM's files are present.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch

from lowering.reference.moe_block import ExpertWeights, moe_block_reference

VERSION = "0.33.0"
_FUSED_MOE = "model_executor/layers/fused_moe"
SOURCES = {
    "fused_experts": f"{_FUSED_MOE}/fused_moe.py",
    "fused_topk": f"{_FUSED_MOE}/router/fused_topk_router.py",
    "biased_moe_quant_config": f"{_FUSED_MOE}/config.py",
    "FusedMoEConfig": f"{_FUSED_MOE}/config.py",
    "FusedMoEParallelConfig.make_no_parallel": f"{_FUSED_MOE}/config.py",
    "RoutingMethodType": f"{_FUSED_MOE}/config.py",
    "MoEActivation": f"{_FUSED_MOE}/activation.py",
    "FusedMoEKernel.__init__": f"{_FUSED_MOE}/modular_kernel.py",
    "FusedMoEKernel.apply": f"{_FUSED_MOE}/modular_kernel.py",
    "FusedMoEActivationFormat": f"{_FUSED_MOE}/modular_kernel.py",
    "TritonExperts.__init__": f"{_FUSED_MOE}/experts/triton_moe.py",
    "TritonExperts.is_supported_config": f"{_FUSED_MOE}/experts/triton_moe.py",
    "make_moe_prepare_and_finalize_no_dp_ep": f"{_FUSED_MOE}/prepare_finalize/no_dp_ep.py",
    "init_workspace_manager": "v1/worker/workspace.py",
    "is_workspace_manager_initialized": "v1/worker/workspace.py",
}


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SITU = "situ"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"


class RoutingMethodType(enum.IntEnum):
    Default = (0,)
    Renormalize = (1,)
    DeepSeekV3 = (2,)
    Llama4 = (3,)
    RenormalizeNaive = (4,)
    TopK = (5,)
    SigmoidRenorm = (6,)
    MiniMax2 = (7,)
    Sigmoid = (8,)
    Unspecified = (9,)
    DeepseekV4 = (100,)
    Custom = (101,)
    Simulated = (102,)


class FusedMoEActivationFormat(enum.Enum):
    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


@dataclasses.dataclass
class FusedMoEQuantConfig:
    w1_bias: Any = None
    w2_bias: Any = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None


def biased_moe_quant_config(w1_bias, w2_bias, gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None):
    return FusedMoEQuantConfig(w1_bias, w2_bias, gemm1_alpha, gemm1_beta, gemm1_clamp_limit)


class FusedMoEParallelConfig:
    @classmethod
    def make_no_parallel(cls):
        return cls()


@dataclasses.dataclass
class FusedMoEConfig:
    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size: int
    num_local_experts: int
    num_logical_experts: int
    activation: MoEActivation
    device: Any
    routing_method: RoutingMethodType
    moe_parallel_config: FusedMoEParallelConfig
    in_dtype: torch.dtype
    router_logits_dtype: Any = None
    hidden_dim_unpadded: int | None = None
    intermediate_size_per_partition_unpadded: int | None = None
    intermediate_pad: int | None = None
    moe_backend: str = "auto"
    max_num_tokens: int = 256
    elastic_ep_max_dp_size: int | None = None
    has_bias: bool = False
    is_lora_enabled: bool = False
    has_hash_routing: bool = False
    require_decomposed_backend: bool = False
    shared_expert_prefix: str | None = None
    skip_final_all_reduce: bool = False
    _defer_moe_finalize: bool = dataclasses.field(default=False, init=False)
    defer_moe_finalize_max_num_tokens: int = -1
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None
    max_capture_size: int = 0
    intermediate_size_per_partition: int = -1
    tp_shard_with_padding: bool = False
    rocm_aiter_fmoe_enabled: bool = False
    aiter_fmoe_shared_expert_enabled: bool = False
    use_mxfp4_w4a4_dsv4: bool = False


_FORMULAS = {
    MoEActivation.SILU: "silu(g) * u",
    MoEActivation.GELU: "gelu(g) * u",
    MoEActivation.GELU_TANH: "gelu_tanh(g) * u",
    MoEActivation.SWIGLUOAI: "swiglu_oai",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}


def _formula(activation: MoEActivation, quant: FusedMoEQuantConfig) -> str:
    limit, alpha, beta = quant.gemm1_clamp_limit, quant.gemm1_alpha, quant.gemm1_beta
    if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        assert limit is not None
        gate = f"min(g, {limit})"
        return f"(max(min(u, {limit}), -{limit}) + {beta}) * ({gate} * sigmoid({gate} * {alpha}))"
    if activation is MoEActivation.SILU and limit is not None:
        return f"silu(min(g, {limit})) * max(min(u, {limit}), -{limit})"
    return _FORMULAS[activation]


def _compute(hidden, w1, w2, topk_weights, topk_ids, *, activation, global_num_experts, expert_map, quant):
    assert topk_weights.size() == topk_ids.size() and topk_ids.dtype == torch.int32
    assert topk_weights.dtype == torch.float32 and hidden.is_contiguous()
    assert hidden.size(1) == w1.size(2) and w1.stride(-1) == 1 and w2.stride(-1) == 1
    assert hidden.dtype in (torch.float32, torch.float16, torch.bfloat16) and hidden.size(0) > 0
    num_experts = w1.size(0) if global_num_experts == -1 else global_num_experts
    assert bool(((topk_ids >= 0) & (topk_ids < num_experts)).all()), "an id outside would be read out of bounds"
    local = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    interleaved = activation is MoEActivation.SWIGLUOAI
    experts = ExpertWeights(w1, w2, quant.w1_bias, quant.w2_bias, _formula(activation, quant), interleaved)
    return moe_block_reference(hidden, topk_weights, local, experts=experts, dtype=torch.float32).to(hidden.dtype)


def fused_experts(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    activation=MoEActivation.SILU,
    apply_router_weight_on_input=False,
    global_num_experts=-1,
    expert_map=None,
    quant_config=None,
):
    assert isinstance(activation, MoEActivation) and not apply_router_weight_on_input
    quant = quant_config or FusedMoEQuantConfig()
    assert quant.gemm1_clamp_limit is None, "the function does not hand it to the kernel"
    return _compute(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=activation,
        global_num_experts=global_num_experts,
        expert_map=expert_map,
        quant=quant,
    )


def fused_topk(hidden_states, gating_output, topk, renormalize, indices_type=None, scoring_func="softmax"):
    assert hidden_states.size(0) == gating_output.size(0) and scoring_func == "softmax" and indices_type is None
    weights, ids = gating_output.float().softmax(-1).topk(topk, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    return weights, ids.int(), ids.int()


class TritonExperts:
    refusal: str | None = None

    def __init__(self, moe_config, quant_config):
        self.moe_config, self.quant_config = moe_config, quant_config

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
        assert activation_format is FusedMoEActivationFormat.Standard
        return cls.refusal is None, cls.refusal


class NoDPEP:
    pass


def make_moe_prepare_and_finalize_no_dp_ep(use_monolithic):
    assert use_monolithic is False
    return NoDPEP()


class FusedMoEKernel:
    built = 0

    def __init__(self, prepare_finalize, fused_experts):
        assert isinstance(prepare_finalize, NoDPEP) and isinstance(fused_experts, TritonExperts)
        self.fused_experts = fused_experts
        FusedMoEKernel.built += 1

    def apply(
        self,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        apply_router_weight_on_input,
        shared_experts=None,
        shared_experts_input=None,
    ):
        config, quant = self.fused_experts.moe_config, self.fused_experts.quant_config
        assert is_workspace_manager_initialized() and not apply_router_weight_on_input
        assert config.activation is activation and config.num_experts == global_num_experts
        assert config.num_local_experts == w1.size(0) and config.experts_per_token == topk_ids.size(1)
        assert (config.hidden_dim, config.intermediate_size) == (w2.size(1), w2.size(2))
        assert config.in_dtype == hidden_states.dtype and config.has_bias == (quant.w1_bias is not None)
        assert config.swiglu_limit == quant.gemm1_clamp_limit
        return _compute(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            quant=quant,
        )


_workspace: list[Any] = []


def init_workspace_manager(device, num_ubatches=None, num_lanes=1, alloc_context=contextlib.nullcontext):
    _workspace.append(device)


def is_workspace_manager_initialized():
    return bool(_workspace)


_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": VERSION},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.fused_moe": {"fused_experts": fused_experts, "fused_topk": fused_topk},
    "vllm.model_executor.layers.fused_moe.activation": {"MoEActivation": MoEActivation},
    "vllm.model_executor.layers.fused_moe.config": {
        "FusedMoEConfig": FusedMoEConfig,
        "FusedMoEParallelConfig": FusedMoEParallelConfig,
        "RoutingMethodType": RoutingMethodType,
        "biased_moe_quant_config": biased_moe_quant_config,
    },
    "vllm.model_executor.layers.fused_moe.modular_kernel": {
        "FusedMoEActivationFormat": FusedMoEActivationFormat,
        "FusedMoEKernel": FusedMoEKernel,
    },
    "vllm.model_executor.layers.fused_moe.experts": {},
    "vllm.model_executor.layers.fused_moe.experts.triton_moe": {"TritonExperts": TritonExperts},
    "vllm.model_executor.layers.fused_moe.prepare_finalize": {
        "make_moe_prepare_and_finalize_no_dp_ep": make_moe_prepare_and_finalize_no_dp_ep
    },
    "vllm.v1": {},
    "vllm.v1.worker": {},
    "vllm.v1.worker.workspace": {
        "init_workspace_manager": init_workspace_manager,
        "is_workspace_manager_initialized": is_workspace_manager_initialized,
    },
}


def install(monkeypatch: Any, **changes: Any) -> None:
    """Put the package into `sys.modules` for one test; `changes` replace names of it, None removes one."""
    _workspace.clear()
    FusedMoEKernel.built = 0
    for module, names in _MODULES.items():
        stub = types.ModuleType(module)
        stub.__path__ = []  # a package
        kept = {name: changes.get(name, value) for name, value in names.items()}
        vars(stub).update({name: value for name, value in kept.items() if value is not None})
        monkeypatch.setitem(sys.modules, module, stub)


def vllm_root() -> Path | None:
    """Where vLLM's files are, whether it can be imported or not; None if there are none."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places and (Path(places[0]) / SOURCES["fused_experts"]).is_file() else None


def _definition(tree: ast.Module, name: str) -> Any:
    found: Any = tree
    for part in name.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == part)
    return found


def signature_in(text: str, name: str) -> list[str]:
    """Parameters of a function, fields of a dataclass or members of an enum in source text: names, "=" where optional.

    Annotations are left out, and so are the values of defaults, which vLLM takes from elsewhere.
    """
    node = _definition(ast.parse(text), name)
    if isinstance(node, ast.ClassDef):
        fields = [f"{f.target.id}{'=' if f.value else ''}" for f in node.body if isinstance(f, ast.AnnAssign)]
        members = [f.targets[0].id for f in node.body if isinstance(f, ast.Assign)]
        return fields or members
    given = node.args
    names = [arg.arg for arg in [*given.posonlyargs, *given.args]]
    optional = len(given.defaults)
    return [f"{n}{'=' if i >= len(names) - optional else ''}" for i, n in enumerate(names)] + [
        f"*{arg.arg}{'=' if default else ''}" for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
