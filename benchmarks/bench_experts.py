"""Time the expert stage of one MoE layer: ours, stock torch.compile over grouped_mm, and the floor, in one process.

    python -m benchmarks.bench_experts --shapes qwen3 --out experts.csv

From given ids and weights to the final [T, H] output, bf16, CUDA-graph replays over rotated inputs, round-robin. Each
cell's output is checked against an fp32 computation on 64 rows before it is timed. The floor is
max(6*T*K*H*I / matrix rate, weight and activation bytes / read rate), with both rates measured in the same run and the
experts counted that the timed ids name. It is an estimate: another kernel may read faster than the one that was timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import diffulex
from benchmarks.shapes import SHAPES, TOKENS, Shape

Inputs = tuple[Tensor, Tensor, Tensor]


def experts_module(shape: Shape) -> nn.Module:
    """transformers' own experts module of a Qwen3-MoE, bf16 on CUDA, weights N(0, 0.02)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        module = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(std=0.02)
    return module


def make_inputs(shape: Shape, tokens: int, sets: int) -> list[Inputs]:
    """`sets` times (hidden [T, H] bf16, ids [T, K] int64, weights [T, K] bf16) with softmax + top-k routing."""
    inputs = []
    for seed in range(sets):
        torch.manual_seed(seed)
        logits_TE = torch.randn(tokens, shape.num_experts, device="cuda")
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(shape.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).bfloat16()
        inputs.append((torch.randn(tokens, shape.hidden, device="cuda").bfloat16(), ids_TK, weights_TK))
    return inputs


def relative_error(module: nn.Module, inputs: Inputs, out_TH: Tensor, rows: int = 64) -> float:
    """Frobenius error of the first rows of out [T, H] against the same experts in fp32, over its norm."""
    hidden_TH, ids_TK, weights_TK = (t[:rows] for t in inputs)
    w13_EJH, w2_EHI = module.gate_up_proj, module.down_proj
    expected = torch.zeros(hidden_TH.shape, device="cuda")
    for k in range(ids_TK.shape[1]):
        for row, expert in enumerate(ids_TK[:, k].tolist()):
            gate_I, up_I = (w13_EJH[expert].float() @ hidden_TH[row].float()).chunk(2)
            slot_H = w2_EHI[expert].float() @ (nn.functional.silu(gate_I) * up_I)
            expected[row] += weights_TK[row, k].float() * slot_H
    return ((out_TH[:rows].float() - expected).norm() / expected.norm()).item()


def capture(function: Callable[..., Tensor], inputs: list[Inputs]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that calls `function` once for each input set."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(2):
            function(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for one in inputs:
            function(*one)
    return graph


def round_robin(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call of each graph, replayed in turn so that all see the same clocks."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values[2:]) for name, values in samples.items()}


def ceilings() -> tuple[float, float]:
    """(matrix FLOP/s of an 8192^3 bf16 product, bytes/s of reading 4 GiB), both measured."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(1 << 30, device="cuda", dtype=torch.float32)

    def seconds(function: Callable[[], object]) -> float:
        function()
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    return 2 * 8192**3 / seconds(lambda: a @ b), big.numel() * 4 / seconds(big.sum)


def floor(shape: Shape, inputs: list[Inputs], *, matrix_rate: float, read_rate: float) -> float:
    """Microseconds a call should take at least: arithmetic or the bytes that have to move, whichever is longer.

    An estimate from measured rates (FLOP/s, bytes/s), averaged over the input sets of one token count.
    """
    hidden, width, hit = shape.hidden, shape.intermediate, sum(ids_TK.unique().numel() for _, ids_TK, _ in inputs)
    tokens, slots = inputs[0][1].shape[0], inputs[0][1].numel()
    bytes_moved = hit / len(inputs) * 3 * hidden * width * 2 + 2 * tokens * hidden * 2
    return max(6 * slots * hidden * width / matrix_rate, bytes_moved / read_rate) * 1e6


def measure(shape: Shape, inputs: list[Inputs]) -> tuple[dict[str, float], dict[str, float]]:
    """(microseconds, relative error) of ours and of stock compiled grouped_mm at one token count."""
    module = experts_module(shape)
    graphs, errors = {}, {}

    def ours(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return module(hidden_TH, ids_TK, weights_TK)

    def stock(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return module(hidden_TH, ids_TK, weights_TK)

    with torch.no_grad():
        for function in (ours, stock):
            torch._dynamo.reset()
            switch = diffulex.disabled() if function is stock else torch.no_grad()
            with switch:
                compiled = torch.compile(function, fullgraph=True, dynamic=False)
                errors[function.__name__] = relative_error(module, inputs[0], compiled(*inputs[0]))
                graphs[function.__name__] = capture(compiled, inputs)
    return round_robin(graphs, len(inputs)), errors


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", default="experts.csv")
    arguments = parser.parse_args()
    matrix_rate, read_rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: {matrix_rate / 1e12:.0f} TFLOP/s, {read_rate / 1e9:.0f} GB/s", flush=True)
    print("shape    tokens    floor     ours    stock  stock/ours  floor/ours  error ours/stock")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "shape", "tokens", "floor_us", "ours_us", "stock_us", "error_ours", "error_stock"])
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                began = time.time()
                inputs = make_inputs(SHAPES[name], tokens, sets=16 if tokens <= 8 else 4 if tokens <= 512 else 2)
                times, errors = measure(SHAPES[name], inputs)
                best = floor(SHAPES[name], inputs, matrix_rate=matrix_rate, read_rate=read_rate)
                ours, stock = times["ours"], times["stock"]
                row = [best, ours, stock, errors["ours"], errors["stock"]]
                writer.writerow([torch.cuda.get_device_name(), name, tokens, *(f"{value:.4g}" for value in row)])
                file.flush()
                print(
                    f"{name:8} {tokens:6} {best:8.1f} {ours:8.1f} {stock:8.1f} {stock / ours:10.2f} {best / ours:11.2f}"
                    f"   {errors['ours']:.1e}/{errors['stock']:.1e}  [{time.time() - began:.0f} s]",
                    flush=True,
                )
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
