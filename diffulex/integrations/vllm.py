"""vLLM's fused experts as implementations of a MoE layer: `moe_gemm_impl="vllm"` and `"vllm_modular"`.

Both call vLLM's public functions on the layer's own weights; nothing is copied and nothing falls back. vLLM is imported
when such a layer is built, and what is called is compared with the signatures this was written for (vLLM 0.33), so that
a release which changed them is an error that says what is missing, not a wrong call.

"vllm" is `fused_experts`, an op that torch.compile takes into its graph. "vllm_modular" is `FusedMoEKernel` around
`TritonExperts`, which takes more activations but leaves the graph, as it allocates from a workspace of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowering.activation import canonical
from lowering.errors import MoEDtypeError, MoEUnsupportedError
from lowering.reference.moe_block import ExpertWeights
from lowering.spec import ExpertSpec

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_DEVICES = ("cuda", "xpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# formula -> name in vLLM's `MoEActivation`
_PLAIN = {
    "silu(g) * u": "SILU",
    "gelu(g) * u": "GELU",
    "gelu_tanh(g) * u": "GELU_TANH",
    "silu(g)": "SILU_NO_MUL",
    "gelu(g)": "GELU_NO_MUL",
    "gelu_tanh(g)": "GELU_TANH_NO_MUL",
    "square(relu(g))": "RELU2_NO_MUL",
}
_CLAMPED = "silu(min(g, {limit})) * max(min(u, {limit}), -{limit})"
_OAI = "(max(min(u, {limit}), -{limit}) + 1.0) * (min(g, {limit}) * sigmoid(min(g, {limit}) * {alpha}))"


@dataclasses.dataclass(frozen=True)
class _Activation:
    """Member of `MoEActivation`, and what the kernel is told beside it."""

    name: str
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None


def _unsupported(impl: str, *, expected: str, got: str, hint: str) -> BaseException:
    return MoEUnsupportedError.of(f"moe_gemm_impl={impl!r}", expected=expected, got=got, hint=hint)


def _activation(impl: str, spec: ExpertSpec) -> _Activation:
    """The counterpart of the spec's formula and layout in vLLM, or `MoEUnsupportedError`."""
    act, modular = canonical(spec.act), impl == "vllm_modular"
    numbers = dict.fromkeys(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", act))
    oai = [
        (float(limit), float(alpha))
        for limit in numbers
        for alpha in numbers
        if canonical(_OAI.format(limit=limit, alpha=alpha)) == act
    ]
    clamped = [float(limit) for limit in numbers if canonical(_CLAMPED.format(limit=limit)) == act]
    found = None
    if spec.interleaved:
        found = _Activation("SWIGLUOAI") if oai[:1] == [(7.0, 1.702)] else None
    elif act in _PLAIN:
        found = _Activation(_PLAIN[act])
    elif modular and oai:
        found = _Activation("SWIGLUOAI_UNINTERLEAVE", limit=oai[0][0], alpha=oai[0][1], beta=1.0)
    elif modular and clamped:
        found = _Activation("SILU", limit=clamped[0])
    if found is None:
        layout = "interleaved" if spec.interleaved else "one half after the other"
        raise _unsupported(  # type: ignore[misc]
            impl,
            expected="an activation and a layout of w13 that vLLM's kernel has",
            got=f"{spec.act!r}, {layout}",
            hint="moe_gemm_impl='triton' takes every formula and layout.",
        )
    return found


class _Vllm:
    """The names of vLLM that an adapter calls, checked when it is made."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def module(self, name: str) -> Any:
        """A module of vLLM, or `MoEUnsupportedError` with the reason it cannot be imported."""
        try:
            return importlib.import_module(name)
        except Exception as error:  # vLLM looks for devices and libraries at import, which fails in many ways
            raise _unsupported(  # type: ignore[misc]
                self.impl,
                expected=f"vLLM with {name}",
                got=f"{type(error).__name__}: {error}",
                hint="Install vllm 0.33 for this device, or use moe_gemm_impl='triton'.",
            ) from error

    def take(self, module: str, name: str, *parameters: str) -> Any:
        """A function or class that has these parameters, or `MoEUnsupportedError` naming what is missing."""
        found = getattr(self.module(module), name, None)
        if found is None:
            raise self._differs(f"{module}.{name}", "nothing of that name")
        if parameters:
            present = inspect.signature(found).parameters
            missing = [parameter for parameter in parameters if parameter not in present]
            if missing:
                raise self._differs(f"{module}.{name}{parameters}", f"no {', '.join(missing)} in {tuple(present)}")
        return found

    def member(self, module: str, name: str, member: str) -> Any:
        """A member of an enum, or `MoEUnsupportedError`."""
        found = getattr(self.take(module, name), member, None)
        if found is None:
            raise self._differs(f"{module}.{name}.{member}", "no such member")
        return found

    def _differs(self, expected: str, got: str) -> Any:
        version = getattr(self.module("vllm"), "__version__", "of unknown version")
        return _unsupported(
            self.impl,
            expected=expected,
            got=f"vLLM {version} with {got}",
            hint="The adapter is written for vllm 0.33; use that, or moe_gemm_impl='triton'.",
        )


def _check(impl: str, hidden_TH: Tensor, experts: ExpertWeights) -> None:
    if hidden_TH.dtype not in _DTYPES:
        raise MoEDtypeError.of(
            f"moe_gemm_impl={impl!r}",
            expected="hidden states in fp32, fp16 or bf16",
            got=str(hidden_TH.dtype),
            hint="vLLM has no kernel for it; 'naive' and 'triton' do.",
        )
    if hidden_TH.device.type not in _DEVICES:
        raise _unsupported(  # type: ignore[misc]
            impl,
            expected=f"a device of {_DEVICES}",
            got=str(hidden_TH.device),
            hint="vLLM's kernels are Triton; use 'triton' here, which runs the ops' CPU kernels.",
        )
    tensors = (hidden_TH, experts.w13_EJH, experts.w2_EHI, experts.b13_EJ, experts.b2_EH)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise _unsupported(  # type: ignore[misc]
            impl,
            expected="a call under torch.no_grad(), or tensors that ask for no gradient",
            got="a tensor that requires a gradient",
            hint="vLLM's kernels have no backward; train with moe_gemm_impl='triton'.",
        )


def _mapped(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(ids [T, K] int32 with E for every id outside [0, E), map [E+1] int32 with -1 for E): vLLM skips those slots."""
    valid_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    map_E1 = torch.arange(num_experts + 1, device=ids_TK.device, dtype=torch.int32)
    map_E1 = torch.where(map_E1 < num_experts, map_E1, -1)
    return torch.where(valid_TK, ids_TK, num_experts).to(torch.int32), map_E1


class _VllmExperts(ABC):
    """The experts through a kernel of vLLM, which takes the arguments of `_call`."""

    impl: str
    _activation: Any

    def __call__(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """Weighted experts [T, H] in the dtype of hidden [T, H]; weights [T, K] floating, ids [T, K] int."""
        _check(self.impl, hidden_TH, experts)
        if hidden_TH.shape[0] == 0:
            return torch.zeros_like(hidden_TH)
        mapped_TK, map_E1 = _mapped(ids_TK, experts.w13_EJH.shape[0])
        return self._call(
            experts,
            hidden_states=hidden_TH.contiguous(),
            w1=experts.w13_EJH,
            w2=experts.w2_EHI,
            topk_weights=weights_TK.float(),
            topk_ids=mapped_TK,
            activation=self._activation,
            apply_router_weight_on_input=False,
            global_num_experts=map_E1.shape[0],
            expert_map=map_E1,
        )

    @abstractmethod
    def _call(self, experts: ExpertWeights, **arguments: Any) -> Tensor: ...


class VllmFusedExperts(_VllmExperts):
    """`vllm...fused_moe.fused_experts` on a layer's weights."""

    impl = "vllm"

    def __init__(self, spec: ExpertSpec) -> None:
        vllm = _Vllm(self.impl)
        self._fused_experts = vllm.take(
            _FUSED_MOE,
            "fused_experts",
            "hidden_states",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "activation",
            "apply_router_weight_on_input",
            "global_num_experts",
            "expert_map",
            "quant_config",
        )
        activation = _activation(self.impl, spec)
        self._activation = vllm.member(f"{_FUSED_MOE}.activation", "MoEActivation", activation.name)
        self._biased: Callable[..., Any] | None = None
        if spec.bias:
            self._biased = vllm.take(f"{_FUSED_MOE}.config", "biased_moe_quant_config", "w1_bias", "w2_bias")

    def within(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """As a call, with nothing converted and no map of experts: hidden [T, H] contiguous, weights [T, K] fp32, ids
        [T, K] int32 that are all in [0, E); others would be read out of bounds.
        """
        _check(self.impl, hidden_TH, experts)
        return self._call(
            experts,
            hidden_states=hidden_TH,
            w1=experts.w13_EJH,
            w2=experts.w2_EHI,
            topk_weights=weights_TK,
            topk_ids=ids_TK,
            activation=self._activation,
            apply_router_weight_on_input=False,
        )

    def _call(self, experts: ExpertWeights, **arguments: Any) -> Tensor:
        quant = None if self._biased is None else self._biased(w1_bias=experts.b13_EJ, w2_bias=experts.b2_EH)
        return self._fused_experts(**arguments, quant_config=quant)


class VllmModularExperts(_VllmExperts):
    """vLLM's modular kernel on a layer's weights: `FusedMoEKernel` of `TritonExperts` on one device.

    The kernel is built at the first call, when device and dtype are known, and again when they change.
    """

    impl = "vllm_modular"

    def __init__(self, spec: ExpertSpec) -> None:
        vllm = _Vllm(self.impl)
        config, kernel = f"{_FUSED_MOE}.config", f"{_FUSED_MOE}.modular_kernel"
        self._vllm, self._spec = vllm, spec
        self._form = _activation(self.impl, spec)
        self._activation = vllm.member(f"{_FUSED_MOE}.activation", "MoEActivation", self._form.name)
        self._moe_config = vllm.take(
            config,
            "FusedMoEConfig",
            "num_experts",
            "experts_per_token",
            "hidden_dim",
            "intermediate_size",
            "num_local_experts",
            "num_logical_experts",
            "activation",
            "device",
            "routing_method",
            "moe_parallel_config",
            "in_dtype",
            "has_bias",
            "swiglu_limit",
            "swiglu_alpha",
            "swiglu_beta",
        )
        self._parallel = vllm.member(config, "FusedMoEParallelConfig", "make_no_parallel")
        self._routing = vllm.member(config, "RoutingMethodType", "Unspecified")
        gate = ("w1_bias", "w2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
        self._quant = vllm.take(config, "biased_moe_quant_config", *gate)
        self._experts = vllm.take(f"{_FUSED_MOE}.experts.triton_moe", "TritonExperts", "moe_config", "quant_config")
        self._prepare = vllm.take(
            f"{_FUSED_MOE}.prepare_finalize", "make_moe_prepare_and_finalize_no_dp_ep", "use_monolithic"
        )
        self._kernel = vllm.take(kernel, "FusedMoEKernel", "prepare_finalize", "fused_experts")
        self._format = vllm.member(kernel, "FusedMoEActivationFormat", "Standard")
        self._has_workspace = vllm.take("vllm.v1.worker.workspace", "is_workspace_manager_initialized")
        self._init_workspace = vllm.take("vllm.v1.worker.workspace", "init_workspace_manager", "device")
        self._built: dict[tuple[Any, ...], Any] = {}

    @torch.compiler.disable(reason="vLLM's modular kernel allocates from a workspace of its own")
    def _call(self, experts: ExpertWeights, **arguments: Any) -> Tensor:
        kernel = self._kernel_for(arguments["hidden_states"], arguments["topk_ids"].shape[1], experts)
        return kernel.apply(**arguments)

    def _kernel_for(self, hidden_TH: Tensor, top_k: int, experts: ExpertWeights) -> Any:
        key = (hidden_TH.device, hidden_TH.dtype, top_k, id(experts.b13_EJ), id(experts.b2_EH))
        if key not in self._built:
            self._built = {key: self._build(hidden_TH, top_k, experts)}
        return self._built[key]

    def _build(self, hidden_TH: Tensor, top_k: int, experts: ExpertWeights) -> Any:
        form, device = self._form, hidden_TH.device
        if not self._has_workspace():
            self._init_workspace(device=device)
        num_experts = experts.w13_EJH.shape[0]
        config = self._moe_config(
            num_experts=num_experts + 1,
            experts_per_token=top_k,
            hidden_dim=experts.w2_EHI.shape[1],
            intermediate_size=experts.w2_EHI.shape[2],
            num_local_experts=num_experts,
            num_logical_experts=num_experts + 1,
            activation=self._activation,
            device=device,
            routing_method=self._routing,
            moe_parallel_config=self._parallel(),
            in_dtype=hidden_TH.dtype,
            has_bias=experts.b13_EJ is not None,
            swiglu_limit=form.limit,
            swiglu_alpha=form.alpha,
            swiglu_beta=form.beta,
        )
        supported, reason = self._experts.is_supported_config(self._experts, config, None, None, self._format)
        if not supported:
            raise _unsupported(  # type: ignore[misc]
                "vllm_modular",
                expected="a layer that vLLM's TritonExperts takes",
                got=str(reason),
                hint="moe_gemm_impl='triton' has no such limit.",
            )
        quant = self._quant(
            w1_bias=experts.b13_EJ,
            w2_bias=experts.b2_EH,
            gemm1_alpha=form.alpha,
            gemm1_beta=form.beta,
            gemm1_clamp_limit=form.limit,
        )
        return self._kernel(
            prepare_finalize=self._prepare(use_monolithic=False),
            fused_experts=self._experts(moe_config=config, quant_config=quant),
        )


def vllm_fused_topk() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """vLLM's router for softmax with renormalised weights, checked as the experts are.

    It takes hidden [T, H] and logits [T, E] floating, and K; it returns weights [T, K] fp32 and ids [T, K] int32.
    """
    names = ("hidden_states", "gating_output", "topk", "renormalize")
    fused_topk = _Vllm("vllm").take(_FUSED_MOE, "fused_topk", *names)

    def routed(hidden_TH: Tensor, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK, *_ = fused_topk(
            hidden_states=hidden_TH, gating_output=logits_TE, topk=top_k, renormalize=True
        )
        return weights_TK, ids_TK

    return routed


def vllm_experts(impl: str, spec: ExpertSpec) -> VllmFusedExperts | VllmModularExperts:
    """The adapter for `impl`, "vllm" or "vllm_modular".

    Raises `MoEUnsupportedError` where vLLM is absent, cannot be imported here, has other signatures, or has no
    counterpart of the spec's activation and layout; the message holds the reason.
    """
    return VllmModularExperts(spec) if impl == "vllm_modular" else VllmFusedExperts(spec)
