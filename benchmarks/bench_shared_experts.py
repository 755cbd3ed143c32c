"""Time a layer with a shared expert two ways: a dense MLP beside the routed experts, or one more expert among them.

    python -m benchmarks.bench_shared_experts --out shared_experts.csv

From given ids and weights to the [T, H] sum of both, bf16, torch.compile with CUDA-graph replays over rotated inputs,
round-robin. "alone" is the routed part without any shared expert. The two ways are checked against each other.
"""

from __future__ import annotations

import argparse
import csv

import torch
from torch import Tensor
from torch.nn import functional

import diffulex  # noqa: F401  the lowerings
import lowering.ops as ops
from benchmarks.bench_experts import Inputs, capture, make_inputs, round_robin
from benchmarks.shapes import SHAPES, TOKENS, Shape

_ACT = "silu(g) * u"


class Layer:
    """Routed weights of E experts and one shared expert behind them, in one tensor each: [E+1, J, H], [E+1, H, I]."""

    def __init__(self, shape: Shape) -> None:
        count, hidden, width = shape.num_experts + 1, shape.hidden, shape.intermediate
        factory = {"device": "cuda", "dtype": torch.bfloat16}
        self.num_experts = shape.num_experts
        self.w13_EJH = torch.empty(count, 2 * width, hidden, **factory).normal_(std=0.02)
        self.w2_EHI = torch.empty(count, hidden, width, **factory).normal_(std=0.02)

    def alone(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The routed experts [T, H] for hidden [T, H] bf16, ids [T, K] int64, weights [T, K] bf16."""
        return self._experts(hidden_TH, ids_TK, weights_TK, self.num_experts)

    def beside(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The shared expert as a dense MLP: [T, H] for hidden [T, H] bf16, ids [T, K] int64, weights [T, K] bf16."""
        routed_TH = self._experts(hidden_TH, ids_TK, weights_TK, self.num_experts)
        gate_TI, up_TI = functional.linear(hidden_TH, self.w13_EJH[-1]).chunk(2, dim=1)
        return routed_TH + functional.linear(functional.silu(gate_TI) * up_TI, self.w2_EHI[-1])

    def among(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The shared expert as expert E of weight 1: [T, H] for the same arguments."""
        ids_TS = torch.cat((ids_TK, torch.full_like(ids_TK[:, :1], self.num_experts)), 1)
        weights_TS = torch.cat((weights_TK, torch.ones_like(weights_TK[:, :1])), 1)
        return self._experts(hidden_TH, ids_TS, weights_TS, self.num_experts + 1)

    def _experts(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, count: int) -> Tensor:
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, count)
        top_k = ids_TK.shape[1]
        act_NI = ops.moe_expert_up(hidden_TH, self.w13_EJH[:count], None, order_N, offsets_E1, top_k, _ACT)
        slots_NH = ops.moe_expert_down(act_NI, self.w2_EHI[:count], None, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, weights_TK)


def measure(shape: Shape, tokens: int) -> dict[str, float]:
    """Microseconds of each way at one token count."""
    layer = Layer(shape)
    inputs: list[Inputs] = make_inputs(shape, tokens, sets=8 if tokens <= 8 else 2)
    graphs, results = {}, {}
    with torch.no_grad():
        for name in ("alone", "beside", "among"):
            torch._dynamo.reset()
            compiled = torch.compile(getattr(layer, name), fullgraph=True, dynamic=False)
            results[name] = compiled(*inputs[0]).float()
            graphs[name] = capture(compiled, inputs)
    off = (results["among"] - results["beside"]).norm() / results["beside"].norm()
    assert off < 0.01, f"the two ways differ by {off:.3g}"
    return round_robin(graphs, len(inputs))


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llada2", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", default="shared_experts.csv")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; microseconds\nshape    tokens    alone   beside    among")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "shape", "tokens", "alone_us", "beside_us", "among_us"])
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                times = measure(SHAPES[name], tokens)
                writer.writerow([torch.cuda.get_device_name(), name, tokens, *(f"{us:.4g}" for us in times.values())])
                print(f"{name:8} {tokens:6} " + " ".join(f"{us:8.1f}" for us in times.values()), flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
