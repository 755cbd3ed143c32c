"""What the ranks of a test on several GPUs run: a layer through symmetric memory, beside itself through collectives."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffulex.cli.accuracy import error_ratio
from diffulex.distributed import ParallelConfig
from diffulex.moe import EPFusedMoE, MoESpec
from lowering.spec import RoutingSpec
from tests.support.moe_layers import make_layer, swiglu_experts
from tests.support.rank_cases import expert_results

SPEC = MoESpec(256, RoutingSpec(4), swiglu_experts(16, 256, 128))
CAPACITY = 64


@functools.cache
def _mesh(size: int) -> DeviceMesh:
    return init_device_mesh("cuda", (size,))


def _layers(size: int, exact: bool, chunks: int = 1) -> tuple[Any, Any]:
    """One layer through symmetric memory and the same weights through collectives, bf16."""
    options = {"dispatcher": "static", "max_tokens_per_rank": CAPACITY, "exact": exact, "chunks": chunks}
    device = torch.device("cuda", torch.cuda.current_device())
    layer = EPFusedMoE(SPEC, parallel=ParallelConfig(_mesh(size), **options), device=device, dtype=torch.bfloat16)
    layer.load_full(make_layer(SPEC, dtype=torch.bfloat16).to(device).state_dict())
    other = copy.copy(layer)
    other.dispatcher = copy.copy(layer.dispatcher)
    other.dispatcher.workspace = None
    return layer, other


def naive(rank: int, size: int) -> list[str]:
    """What breaks the ratio rule of the exchange with exact splits, as one graph, beside itself in eager mode."""
    device = torch.device("cuda", torch.cuda.current_device())
    state = make_layer(SPEC, dtype=torch.bfloat16).to(device).state_dict()

    def layer_in(dtype: torch.dtype) -> Any:
        layer = EPFusedMoE(SPEC, parallel=ParallelConfig(_mesh(size)), device=device, dtype=dtype)
        layer.load_full({name: tensor.to(dtype) for name, tensor in state.items()})
        return layer

    eager, exact, compiled = layer_in(torch.bfloat16), layer_in(torch.float64), layer_in(torch.bfloat16)
    torch._dynamo.reset()
    compiled.run_experts = torch.compile(compiled.run_experts, fullgraph=True)
    broken = []
    for seed, counts in enumerate([(64, 64), (7, 500), (0, 5), (1, 0), (0, 0)]):
        hidden_TH, weights_TK, ids_TK = _inputs(rank, counts[rank % 2], seed)
        wanted = expert_results(exact, hidden_TH.double(), weights_TK.double(), ids_TK)
        found, stock = (expert_results(which, hidden_TH, weights_TK, ids_TK) for which in (compiled, eager))
        for name, value in wanted.items():
            told = error_ratio([found[name]], [stock[name]], oracle=[value])
            broken += [f"{name} of {counts}: {told.problem}"] if told.problem else []
    return broken


def _inputs(rank: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    hidden_TH = torch.randn(count, 256, device="cuda", generator=generator).bfloat16()
    weights_TK = torch.rand(count, 4, device="cuda", generator=generator)
    return hidden_TH, weights_TK, torch.randint(-1, 17, (count, 4), device="cuda", generator=generator)


def transport(rank: int, size: int) -> str:
    """How the layer says that its tokens travel."""
    return repr(_layers(size, True)[0])


def eager(rank: int, size: int, exact: bool) -> list[str]:
    """The outputs and gradients that differ, over changing numbers of tokens."""
    layer, other = _layers(size, exact)
    differing = []
    for seed, counts in enumerate([(64, 64), (0, 5), (1, 0), (64, 3), (0, 0)]):
        inputs = _inputs(rank, counts[rank % 2], seed)
        found, wanted = expert_results(layer, *inputs), expert_results(other, *inputs)
        differing += [f"{name} of {counts}" for name, value in wanted.items() if not torch.equal(found[name], value)]
    return differing


def _compiled(layer: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(layer.run_experts, fullgraph=True, dynamic=False)


def replayed(rank: int, size: int, exact: bool, rounds: int, chunks: int = 1) -> list[str]:
    """Where three calls, in a CUDA graph and outside of it, gave another result than collectives outside of graphs.

    Between replays the ranks wait for different times, so that each is ahead of the other now and then, and a call
    outside of the graph comes in, of another layer that shares the memory.
    """
    layer, other = _layers(size, exact, chunks)
    inputs = _inputs(rank, CAPACITY, 0)

    def thrice(run: Callable[..., Tensor]) -> list[Tensor]:
        hidden_TH, *rest = inputs
        outs = []
        for _ in range(3):
            hidden_TH = run(hidden_TH, *rest)
            outs.append(hidden_TH)
        return outs

    with torch.no_grad():
        plain, ours = _compiled(other), _compiled(layer)
        thrice(ours), thrice(plain)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = thrice(ours)
        differing, generator = [], torch.Generator().manual_seed(rank)
        for number in range(rounds):
            for mine, fresh in zip(inputs, _inputs(rank, CAPACITY, number), strict=True):
                mine.copy_(fresh)
            torch.cuda._sleep(int(torch.randint(0, 300_000, (), generator=generator)))
            graph.replay()
            if number % 3 == 0:
                graph.replay()
            found = [out.clone() for out in captured]
            between = thrice(ours)
            wanted, again = thrice(plain), thrice(plain)
            for way, outs in (("graph", found), ("call", between), ("collectives again", again)):
                told = [_rows_that_differ(a, b) for a, b in zip(outs, wanted, strict=True)]
                differing += [f"round {number}, {way}: {', '.join(told)}"] if any(told) else []
    return differing


def _rows_that_differ(found_TH: Tensor, wanted_TH: Tensor) -> str:
    rows = (found_TH != wanted_TH).any(1).nonzero().flatten().tolist()
    return f"{len(rows)} rows from {rows[0]} to {rows[-1]}" if rows else ""


def dispatched_only(rank: int, size: int, rounds: int) -> list[int]:
    """As `replayed`, of a graph that holds a dispatch without its combine, replayed twice in a row."""
    layer, other = _layers(size, True)
    hidden_TH, weights_TK, ids_TK = _inputs(rank, CAPACITY, 0)
    differing, generator = [], torch.Generator().manual_seed(rank)
    with torch.no_grad():
        layer.dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sent = layer.dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
        for number in range(rounds):
            for _ in range(2):
                hidden_TH.copy_(torch.randn(CAPACITY, 256, device="cuda").bfloat16())
                torch.cuda._sleep(int(torch.randint(0, 300_000, (), generator=generator)))
                graph.replay()
            wanted = other.dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
            if not torch.equal(sent.recv_hidden_states, wanted.recv_hidden_states):
                differing.append(number)
    return differing


def without_host(rank: int, size: int, exact: bool, chunks: int = 1) -> str:
    """Nothing, or what torch says of a call that waits for the device: in eager and in compiled code."""
    layer, _ = _layers(size, exact, chunks)
    inputs = _inputs(rank, CAPACITY, 0)
    with torch.no_grad():
        for run in (layer.run_experts, _compiled(layer)):
            run(*inputs)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(*inputs)
            except RuntimeError as error:
                return str(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return ""
