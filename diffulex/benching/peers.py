"""Who is timed: a registry of peers, each an adapter from a layer to a function of one input set."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowering.errors import MoEOptionError, MoEUnsupportedError, Reason, ReasonCode
from lowering.spec import ExpertSpec
from lowering.state import disabled

from .check import free_memory
from .inputs import Inputs, route
from .layers import Layer

Prepared = tuple[Tensor, ...]
# batched_mm gathers the weights of all T * K slots: it runs where they fit into this, and into half of what is free
MOST_GATHERED_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Runner:
    """A function that returns [T, H], and what makes its arguments of an input set, outside of what is timed."""

    run: Callable[..., Tensor]
    prepare: Callable[[Inputs], Prepared]


def _nothing(*_args: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run the experts of a layer.

    build    makes its runner for a layer and a source of `inputs.SOURCES`
    absent   why it cannot run here in a dtype, whatever the layer
    refuses  why it does not run a layer at a token count
    state    entered where it is built, compiled and captured
    """

    name: str
    device: str
    build: Callable[[Layer, str], Runner]
    absent: Callable[[torch.dtype], Reason | None] = _nothing
    refuses: Callable[[Layer, int], Reason | None] = _nothing
    state: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def _transformers(layer: Layer, source: str, *, implementation: str) -> Runner:
    """An experts implementation of transformers' interface; routing, where it is timed, is plain torch."""
    module, top_k, dtype = layer.with_implementation(implementation), layer.case.shape.top_k, layer.dtype

    def from_topk(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return module(hidden_TH, ids_TK, weights_TK)

    def from_logits(hidden_TH: Tensor, logits_TE: Tensor) -> Tensor:
        weights_TK, ids_TK = route(logits_TE, top_k, dtype=dtype)
        return module(hidden_TH, ids_TK, weights_TK)

    return Runner(from_topk if source == "topk" else from_logits, lambda one: one.of(source))


def _eager(implementation: str) -> Callable[[Layer, str], Runner]:
    return lambda layer, source: _transformers(layer, source, implementation=implementation)


def compiled(layer: Layer, source: str, *, early: bool = True) -> Runner:
    """transformers' grouped_mm under torch.compile: diffulex where it is on, stock Inductor where it is not.

    early: kernels may begin early. Those of diffulex do under `mode="reduce-overhead"`, for which the CUDA graphs that
    are timed stand. Not for stock: torch 2.11 lets kernels read ahead of their wait what was written in place before,
    here the order of the slots, so that indices are out of bounds now and then.
    """
    runner = _transformers(layer, source, implementation="grouped_mm")
    options: dict[str, str | int | bool | Callable[..., Any]] = {"triton.enable_pdl": early}
    return dataclasses.replace(runner, run=torch.compile(runner.run, fullgraph=True, dynamic=False, options=options))


def _no_kernels(_dtype: torch.dtype) -> Reason | None:
    """Without generated kernels the graph would be stock's, or the ops' own kernels, which are not there for speed."""
    from ..cli.env import generation_refusal

    return generation_refusal()


def _no_stock(dtype: torch.dtype) -> Reason | None:
    """A compiled grouped_mm asks the host in other dtypes and on other devices: no CUDA graph can hold that."""
    if dtype != torch.bfloat16:
        return Reason(ReasonCode.DTYPE, f"torch's grouped product has a kernel for bfloat16 alone, not for {dtype}")
    major, minor = torch.cuda.get_device_capability()
    if major not in (9, 10):
        return Reason(
            ReasonCode.CAPABILITY, f"torch's grouped product has a kernel for sm_90, not for sm_{major}{minor}"
        )
    return None


def vllm(layer: Layer, source: str) -> Runner:
    """vLLM's `fused_experts`, given weights in fp32 and ids in int32 as its own router makes them; and that router."""
    from ..integrations.vllm import VllmFusedExperts, vllm_fused_topk

    experts, weights, top_k = VllmFusedExperts(layer.case.spec), layer.weights(), layer.case.shape.top_k

    def from_topk(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return experts.within(hidden_TH, weights_TK, ids_TK, experts=weights)

    if source == "topk":
        return Runner(from_topk, lambda one: (one.hidden_TH, one.ids_TK.int(), one.weights_TK.float()))
    fused_topk = vllm_fused_topk()

    def from_logits(hidden_TH: Tensor, logits_TE: Tensor) -> Tensor:
        weights_TK, ids_TK = fused_topk(hidden_TH, logits_TE, top_k)
        return from_topk(hidden_TH, ids_TK, weights_TK)

    return Runner(from_logits, lambda one: one.of(source))


def _no_vllm(_dtype: torch.dtype) -> Reason | None:
    return _vllm_refusal(ExpertSpec(1, 1, 1, "silu(g) * u"), ReasonCode.ABSENT)


def _vllm_refuses(layer: Layer, _tokens: int) -> Reason | None:
    if layer.case.spec.transposed:
        return Reason(ReasonCode.LAYOUT, "vLLM's kernel reads weights [E, out, in], not their transposes")
    return _vllm_refusal(layer.case.spec, ReasonCode.OPTION)


def _vllm_refusal(spec: ExpertSpec, code: ReasonCode) -> Reason | None:
    """What the adapter says where vLLM is absent, has other signatures, or no counterpart of the experts."""
    from ..integrations.vllm import VllmFusedExperts, vllm_fused_topk

    try:
        VllmFusedExperts(spec)
        vllm_fused_topk()
    except MoEUnsupportedError as error:
        return Reason(code, str(error))
    return None


def gathered_bytes(layer: Layer, tokens: int) -> int:
    """Bytes that batched_mm gathers at T tokens: the matrices of T * K experts."""
    spec = layer.case.spec
    matrices = 3 if spec.gated else 2
    return tokens * layer.case.shape.top_k * matrices * spec.hidden_size * spec.intermediate_size * layer.dtype.itemsize


def _too_large(layer: Layer, tokens: int) -> Reason | None:
    needed, most = gathered_bytes(layer, tokens), min(MOST_GATHERED_BYTES, free_memory(layer.device) // 2)
    if needed <= most:
        return None
    return Reason(
        ReasonCode.MEMORY, f"gathers {needed / 2**30:.1f} GiB of weights, at most {most / 2**30:.1f} GiB are allowed"
    )


def _stock(layer: Layer, source: str) -> Runner:
    return compiled(layer, source, early=False)


PEERS = (
    Peer("diffulex", "cuda", compiled, absent=_no_kernels),
    Peer("stock", "cuda", _stock, absent=_no_stock, state=disabled),
    Peer("vllm", "cuda", vllm, absent=_no_vllm, refuses=_vllm_refuses),
    Peer("diffulex", "cpu", _eager("diffulex")),
    Peer("eager", "cpu", _eager("eager")),
    Peer("grouped_mm", "cpu", _eager("grouped_mm")),
    Peer("batched_mm", "cpu", _eager("batched_mm"), refuses=_too_large),
)


def choose(
    names: Sequence[str] | None, *, device: torch.device, dtype: torch.dtype
) -> tuple[list[Peer], dict[str, Reason]]:
    """The peers of these names on a device, in their order there; without names all that run, and why others do not.

    A name that is unknown, or of a peer that cannot run, is an error of the catalogue; so is a device where none can.
    """
    here = {peer.name: peer for peer in PEERS if peer.device == device.type}
    for name in names or ():
        if name not in here:
            raise MoEOptionError.of(
                "--peers", expected=f"peers on {device.type}: {', '.join(here)}", got=repr(name), hint="Leave it out."
            )
    wanted = list(here) if names is None else [name for name in here if name in names]
    reasons = {name: reason for name in wanted if (reason := here[name].absent(dtype)) is not None}
    if reasons and (names is not None or len(reasons) == len(wanted)):
        name, reason = next(iter(reasons.items()))
        raise MoEUnsupportedError.of(
            f"--peers {name}",
            expected="a peer that runs here",
            got=str(reason),
            hint="Install what it needs, or leave it out.",
        )
    return [here[name] for name in wanted if name not in reasons], reasons
