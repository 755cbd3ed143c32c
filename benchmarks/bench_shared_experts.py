"""Time a layer with a shared expert two ways: library products beside the experts' kernels, or tiles in those kernels.

    python -m benchmarks.bench_shared_experts --out shared_experts.csv

From given ids and weights to the [T, H] sum of both, bf16, torch.compile with CUDA-graph replays over rotated inputs,
round-robin. "alone" is the routed part without any shared expert. The two ways are checked against each other. From
where on experts have many rows there is one way only.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import diffulex  # noqa: F401  the lowerings
import lowering.ops as ops
from diffulex.benching.inputs import make_inputs
from diffulex.benching.shapes import SHAPES, Shape
from diffulex.benching.timing import capture, round_robin
from lowering.inductor import shared_lowerings

_ACT = "silu(g) * u"
TOKENS = (1, 8, 32, 64, 128, 256, 512)
# the most row tiles a shared expert may have in the experts' kernels
WAYS = {"beside": -1, "within": math.inf}


class Layer:
    """Routed weights [E, J, H], [E, H, I], and a shared expert as wide as one of them: [I, H] twice, [H, I]."""

    def __init__(self, shape: Shape) -> None:
        hidden, width = shape.hidden, shape.intermediate
        self.num_experts = shape.num_experts

        def weight(*size: int) -> Tensor:
            return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)

        self.w13_EJH, self.w2_EHI = (
            weight(shape.num_experts, 2 * width, hidden),
            weight(shape.num_experts, hidden, width),
        )
        self.w1_SH, self.w3_SH, self.w2_HS = weight(width, hidden), weight(width, hidden), weight(hidden, width)

    def alone(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The routed experts [T, H] for hidden [T, H] bf16, ids [T, K] int64, weights [T, K] bf16."""
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, self.num_experts)
        act_NI = ops.moe_expert_up(hidden_TH, self.w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], _ACT)
        return ops.moe_combine(ops.moe_expert_down(act_NI, self.w2_EHI, None, order_N, offsets_E1), weights_TK)

    def both(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """With the shared expert, [T, H], for the same arguments."""
        gate_TS, up_TS = functional.linear(hidden_TH, self.w1_SH), functional.linear(hidden_TH, self.w3_SH)
        shared_TH = functional.linear(functional.silu(gate_TS) * up_TS, self.w2_HS)
        return self.alone(hidden_TH, ids_TK, weights_TK) + shared_TH


def measure(shape: Shape, tokens: int) -> dict[str, float]:
    """Microseconds of each way at one token count."""
    layer = Layer(shape)
    inputs = [one.of("topk") for one in make_inputs(shape, tokens, sets=8 if tokens <= 8 else 2)]
    functions: dict[str, tuple[Callable[..., Tensor], float]] = {"alone": (layer.alone, -1)}
    functions |= {name: (layer.both, most) for name, most in WAYS.items()}
    graphs, results = {}, {}
    with torch.no_grad():
        for name, (function, most) in functions.items():
            torch._dynamo.reset()
            with mock.patch.object(shared_lowerings, "MAX_ROW_TILES", most), torch._inductor.utils.fresh_cache():
                compiled = torch.compile(function, fullgraph=True, dynamic=False)
                results[name] = compiled(*inputs[0]).float()
            graphs[name] = capture(compiled, inputs)
    off = (results["within"] - results["beside"]).norm() / results["beside"].norm()
    assert off < 0.01, f"the two ways differ by {off:.3g}"
    return round_robin(graphs, len(inputs))


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llada2", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", default="shared_experts.csv")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; microseconds\nshape    tokens    alone   beside   within")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "shape", "tokens", "alone_us", "beside_us", "within_us"])
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                times = measure(SHAPES[name], tokens)
                writer.writerow([torch.cuda.get_device_name(), name, tokens, *(f"{us:.4g}" for us in times.values())])
                print(f"{name:8} {tokens:6} " + " ".join(f"{us:8.1f}" for us in times.values()), flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
