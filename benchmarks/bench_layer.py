"""Time a whole MoE layer, router product and norm included: with variants of the compiler, and stock torch.compile.

    python -m benchmarks.bench_layer --out layer.csv

From hidden states to hidden states plus the layer's output and their RMS norm, bf16, CUDA-graph replays over rotated
inputs, round-robin. `early`: every generated kernel begins before the last one has ended, as under
mode="reduce-overhead". `split`: so, with a product of the library in front of the router. `alone`, with --alone: those
of our templates begin early, Inductor's own do not. `off`: none does. Stops before a cell that would go past --seconds,
and names what was left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

import diffulex
import lowering.ops as ops
from benchmarks.bench_route_dispatch import ROUTERS, stock_route
from diffulex.benching.layers import experts_module
from diffulex.benching.shapes import SHAPES
from diffulex.benching.timing import capture, round_robin
from lowering.spec import RoutingSpec

Outputs = tuple[Tensor, Tensor]


def router_of(name: str) -> RoutingSpec:
    """The router that is timed with a shape: its own where there is one, else a softmax."""
    return ROUTERS.get(name, RoutingSpec(top_k=SHAPES[name].top_k))


def layer(spec: RoutingSpec, experts: nn.Module, *, stock: bool) -> Callable[..., Outputs]:
    """The function that is timed: hidden [T, H] bf16, gate [E, H] bf16, bias [E] fp32, scale [H] bf16 -> two [T, H]."""

    def run(hidden_TH: Tensor, gate_EH: Tensor, bias_E: Tensor, scale_H: Tensor) -> Outputs:
        logits_TE = nn.functional.linear(hidden_TH, gate_EH)
        if stock:
            weights_TK, ids_TK = stock_route(spec, logits_TE.float(), bias_E)
        else:
            bias = bias_E if spec.score == "sigmoid" else None
            weights_TK, ids_TK = ops.moe_route(logits_TE, bias, None, *spec.op_args())
        out_TH = hidden_TH + experts(hidden_TH, ids_TK, weights_TK.to(hidden_TH.dtype))
        float_TH = out_TH.float()
        norm_TH = float_TH * torch.rsqrt(float_TH.square().mean(-1, keepdim=True) + 1e-6)
        return out_TH, norm_TH.to(out_TH.dtype) * scale_H

    return run


@contextlib.contextmanager
def compiling(variant: str) -> Iterator[None]:
    """The state in which a variant is compiled and captured."""
    from lowering.inductor import _compat, route_linear_lowerings

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if variant == "stock":
            stack.enter_context(diffulex.disabled())
        if variant in ("alone", "split"):  # no configuration says so: not to be served from a cache
            stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        if variant == "split":
            stack.enter_context(mock.patch.object(route_linear_lowerings, "MOST_TOKENS", -1))
        if variant == "alone":
            stack.enter_context(mock.patch.object(_compat, "begin_early", return_value=None))
            stack.enter_context(mock.patch.object(_compat.TritonKernel, "_enable_pdl_codegen", return_value=False))
        yield


def measure(name: str, tokens: int, *, variants: list[str], experts: nn.Module) -> tuple[dict[str, float], bool]:
    """Microseconds of each variant, and whether `early` gives the same residual sums as `off`, bitwise."""
    shape, spec = SHAPES[name], router_of(name)
    torch.manual_seed(0)
    gate_EH = 0.02 * torch.randn(shape.num_experts, shape.hidden, device="cuda")
    parameters = (gate_EH.bfloat16(), 0.1 * torch.randn(shape.num_experts, device="cuda"))
    scale_H = torch.ones(shape.hidden, device="cuda").bfloat16()
    sets = 16 if tokens <= 8 else 4 if tokens <= 512 else 2
    hidden = [torch.randn(tokens, shape.hidden, device="cuda").bfloat16() for _ in range(sets)]
    inputs = [(hidden_TH, *parameters, scale_H) for hidden_TH in hidden]
    graphs, outs = {}, {}
    for variant in variants:
        torch._dynamo.reset()
        function = layer(spec, experts, stock=variant == "stock")
        options = {"triton.enable_pdl": variant in ("early", "split", "alone")}
        with compiling(variant):
            compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
            outs[variant] = compiled(*inputs[0])[0].clone()
            graphs[variant] = capture(compiled, inputs)
    return round_robin(graphs, len(inputs)), torch.equal(outs["early"], outs["off"])


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--alone", action="store_true", help="also with Inductor's own kernels as ever")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--out", default="layer.csv")
    arguments = parser.parse_args()
    variants = ["early", "split", *(["alone"] if arguments.alone else []), "off", "stock"]
    began, longest, left_out = time.time(), 0.0, []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds", flush=True)
    print(
        "shape    tokens "
        + " ".join(f"{variant:>8}" for variant in variants)
        + "  split-early  off-early  stock/early  equal"
    )
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "shape", "tokens", *(f"{variant}_us" for variant in variants), "equal"])
        for name in arguments.shapes:
            torch.cuda.empty_cache()
            experts = experts_module(SHAPES[name])
            for tokens in arguments.tokens:
                started = time.time()
                if started - began + longest > arguments.seconds:
                    left_out.append(f"{name} {tokens}")
                    continue
                times, equal = measure(name, tokens, variants=variants, experts=experts)
                longest = max(longest, time.time() - started)
                cells = " ".join(f"{times[variant]:8.1f}" for variant in variants)
                apart, gained = (times[variant] - times["early"] for variant in ("split", "off"))
                ratio = times["stock"] / times["early"]
                seconds = f"[{time.time() - started:.0f} s]"
                print(
                    f"{name:8} {tokens:6} {cells} {apart:12.1f} {gained:10.1f} {ratio:12.2f}  {equal}  {seconds}",
                    flush=True,
                )
                row = [f"{times[variant]:.4g}" for variant in variants]
                writer.writerow([torch.cuda.get_device_name(), name, tokens, *row, equal])
                file.flush()
            del experts
    print(f"left out: {', '.join(left_out) or 'nothing'}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
