"""Time routing and dispatch of one MoE layer: ours, its two halves, and stock torch.compile of the same steps.

    python -m benchmarks.bench_route_dispatch --out route_dispatch.csv

From fp32 logits to weights, slot order and expert offsets, CUDA-graph replays over rotated inputs, round-robin. Qwen3's
router takes the softmax, LLaDA2's the sigmoid with a bias, 4 of 8 groups and a factor.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable

import torch
from torch import Tensor

import diffulex
import lowering.ops as ops
from diffulex.benching.shapes import SHAPES, TOKENS
from diffulex.benching.timing import capture, round_robin
from lowering.spec import RoutingSpec

ROUTERS = {
    "qwen3": RoutingSpec(top_k=8),
    "llada2": RoutingSpec(top_k=8, score="sigmoid", n_group=8, topk_group=4, eps=1e-20, scale=2.5),
}
Routed = tuple[Tensor, ...]


def stock_route(spec: RoutingSpec, logits_TE: Tensor, bias_E: Tensor) -> Routed:
    """What a model written in plain torch does for logits [T, E] fp32: weights [T, K] fp32 and ids [T, K] int64."""
    if spec.score == "softmax":
        scores_TE = logits_TE.softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(spec.top_k, dim=-1)
    else:
        scores_TE = logits_TE.sigmoid()
        grouped_TGS = (scores_TE + bias_E).view(len(logits_TE), spec.n_group, -1)
        best_TG = grouped_TGS.topk(2, dim=-1).values.sum(-1).topk(spec.topk_group, dim=-1).indices
        kept_TG = torch.zeros(len(logits_TE), spec.n_group, device=logits_TE.device).scatter(1, best_TG, 1.0)
        ids_TK = grouped_TGS.masked_fill(kept_TG.unsqueeze(-1) == 0, float("-inf")).flatten(1).topk(spec.top_k).indices
        weights_TK = scores_TE.gather(1, ids_TK)
    return weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.eps) * spec.scale, ids_TK


def stock(spec: RoutingSpec, logits_TE: Tensor, bias_E: Tensor) -> Routed:
    """`stock_route`, then weights, order, offsets in plain torch."""
    num_experts = logits_TE.shape[1]
    weights_TK, ids_TK = stock_route(spec, logits_TE, bias_E)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    return weights_TK, order_N, torch.histc(sorted_N.int(), num_experts, 0, num_experts - 1).cumsum(0)


def functions(spec: RoutingSpec) -> dict[str, Callable[[Tensor, Tensor, Tensor], Routed]]:
    """What is timed: functions of logits [T, E] fp32, bias [E] fp32 and ids [T, K] int32."""

    def route(logits_TE: Tensor, bias_E: Tensor) -> Routed:
        bias = bias_E if spec.score == "sigmoid" else None
        return ops.moe_route(logits_TE, bias, None, *spec.op_args())

    def both(logits_TE: Tensor, bias_E: Tensor, ids_TK: Tensor) -> Routed:
        weights_TK, ids_TK = route(logits_TE, bias_E)
        return weights_TK, *ops.moe_dispatch(ids_TK, logits_TE.shape[1])

    return {
        "both": both,
        "route": lambda logits_TE, bias_E, ids_TK: route(logits_TE, bias_E),
        "dispatch": lambda logits_TE, bias_E, ids_TK: ops.moe_dispatch(ids_TK, logits_TE.shape[1]),
        "stock": lambda logits_TE, bias_E, ids_TK: stock(spec, logits_TE, bias_E),
    }


def measure(name: str, tokens: int) -> dict[str, float]:
    """Microseconds of each function at one token count."""
    spec, num_experts = ROUTERS[name], SHAPES[name].num_experts
    inputs = []
    for seed in range(16 if tokens <= 512 else 4):
        torch.manual_seed(seed)
        logits_TE = torch.randn(tokens, num_experts, device="cuda")
        bias_E = 0.1 * torch.randn(num_experts, device="cuda")
        inputs.append((logits_TE, bias_E, logits_TE.topk(spec.top_k).indices.int()))
    graphs = {}
    for title, function in functions(spec).items():
        torch._dynamo.reset()
        switch = diffulex.disabled() if title == "stock" else torch.no_grad()
        with switch, torch.no_grad():
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            compiled(*inputs[0])
            graphs[title] = capture(compiled, inputs)
    return round_robin(graphs, len(inputs))


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", default="route_dispatch.csv")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; microseconds\nshape    tokens     both    route dispatch    stock")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "shape", "tokens", "both_us", "route_us", "dispatch_us", "stock_us"])
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                times = measure(name, tokens)
                writer.writerow([torch.cuda.get_device_name(), name, tokens, *(f"{us:.4g}" for us in times.values())])
                print(f"{name:8} {tokens:6} " + " ".join(f"{us:8.1f}" for us in times.values()), flush=True)


if __name__ == "__main__":
    main()
