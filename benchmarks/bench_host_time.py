"""Host time of one compiled call of a MoE layer's experts outside of a CUDA graph: guards, allocations, launches.

    python -m benchmarks.bench_host_time --shapes qwen3 llada2 --tokens 1 8

The clock is the host's and stops before the device has finished; between stretches of calls the device catches up, so
that a full launch queue is not what is timed. Each variant is compiled on its own: with diffulex by Inductor's Python
wrapper and by its C++ wrapper, and stock by the former.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch

import diffulex
from diffulex.benching.inputs import make_inputs
from diffulex.benching.layers import Layer, build_layer
from diffulex.benching.peers import compiled
from diffulex.benching.shapes import SHAPES, case_of_shape

STRETCHES, CALLS = 20, 20


def host_micros(call: Callable[[], object]) -> float:
    """Median host microseconds of one call."""
    times = []
    for _ in range(STRETCHES):
        torch.cuda.synchronize()
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times[CALLS:]) * 1e6


def measure(layer: Layer, tokens: int, *, stock: bool, cpp_wrapper: bool) -> float:
    """Host microseconds of a call of the experts at T tokens, compiled for the variant."""
    hidden_TH, ids_TK, weights_TK = make_inputs(layer.case.shape, tokens, sets=1)[0].of("topk")
    torch._dynamo.reset()
    side = diffulex.disabled() if stock else contextlib.nullcontext()
    with torch.no_grad(), side, torch._inductor.config.patch(cpp_wrapper=cpp_wrapper):
        run = compiled(layer, "topk", early=False).run  # Inductor has no fast launcher for kernels that do
        return host_micros(lambda: run(hidden_TH, ids_TK, weights_TK))


def main() -> None:
    """Print a row for each shape and token count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    arguments = parser.parse_args()
    # stock's grouped product has no entry in the C++ wrapper
    variants = [(False, False), (False, True), (True, False)]
    print(f"{torch.cuda.get_device_name()}, host microseconds of a call; C++: Inductor's C++ wrapper")
    print("shape   tokens  diffulex  diffulex C++     stock")
    for name in arguments.shapes:
        layer = build_layer(case_of_shape(name), dtype=torch.bfloat16, device=torch.device("cuda"))
        for tokens in arguments.tokens:
            times = [measure(layer, tokens, stock=stock, cpp_wrapper=cpp) for stock, cpp in variants]
            print(f"{name:7} {tokens:6} {times[0]:9.1f} {times[1]:13.1f} {times[2]:9.1f}", flush=True)


if __name__ == "__main__":
    main()
