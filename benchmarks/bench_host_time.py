"""Host time of one compiled call of a MoE layer's experts outside of a CUDA graph: guards, allocations, launches.

    python -m benchmarks.bench_host_time --shapes qwen3 llada2 --tokens 1 8

The clock is the host's and stops before the device has finished; between stretches of calls the device catches up, so
that a full launch queue is not what is timed. Each variant is compiled on its own: by Inductor's Python wrapper and by
its C++ wrapper, both also without evaluating guards (`skip_guard_eval_unsafe`), and ahead of time by AOTInductor;
beside them stock, and `x + 1`, which shows what any compiled call pays. Where no package of AOTInductor loads, this
dies of a segmentation fault: set LD_PRELOAD to what `g++ -print-file-name=libstdc++.so.6` says.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import diffulex
from diffulex.benching.inputs import make_inputs
from diffulex.benching.layers import Layer, build_layer
from diffulex.benching.peers import compiled
from diffulex.benching.shapes import SHAPES, case_of_shape

STRETCHES, CALLS = 20, 20
Arguments = tuple[Tensor, ...]
Variant = Callable[[Layer, Arguments], AbstractContextManager[Callable[..., object]]]


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


def _compiled(layer: Layer) -> Callable[..., object]:
    return compiled(layer, "topk", early=False).run  # Inductor has no fast launcher for kernels that do


def _inside(state: Callable[[], AbstractContextManager[Any]], *, guards: bool = True) -> Variant:
    @contextlib.contextmanager
    def variant(layer: Layer, arguments: Arguments) -> Iterator[Callable[..., object]]:
        with state():
            run = _compiled(layer)
            run(*arguments)  # what is not compiled yet has no guards that could be skipped
            with torch.compiler.set_stance(skip_guard_eval_unsafe=not guards):
                yield run

    return variant


def _cpp_wrapper() -> AbstractContextManager[Any]:
    return torch._inductor.config.patch(cpp_wrapper=True)


@contextlib.contextmanager
def _ahead(layer: Layer, arguments: Arguments) -> Iterator[Callable[..., object]]:
    program = torch.export.export(layer.with_implementation("grouped_mm"), arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/experts.pt2")
        yield torch._inductor.aoti_load_package(path)


@contextlib.contextmanager
def _plus_one(_: Layer, __: Arguments) -> Iterator[Callable[..., object]]:
    run = torch.compile(lambda hidden_TH: hidden_TH + 1, fullgraph=True, dynamic=False)
    yield lambda hidden_TH, *rest: run(hidden_TH)


VARIANTS: dict[str, Variant] = {
    "Python": _inside(contextlib.nullcontext),
    "no guards": _inside(contextlib.nullcontext, guards=False),
    "C++": _inside(_cpp_wrapper),
    "C++, no guards": _inside(_cpp_wrapper, guards=False),
    "AOTInductor": _ahead,
    "stock": _inside(diffulex.disabled),  # its grouped product has no entry in the C++ wrapper
    "x + 1": _plus_one,
}


def measure(layer: Layer, tokens: int, variant: str) -> float:
    """Host microseconds of a call of the experts at T tokens, compiled for the variant."""
    arguments = make_inputs(layer.case.shape, tokens, sets=1)[0].of("topk")
    torch._dynamo.reset()
    with torch.no_grad(), VARIANTS[variant](layer, arguments) as run:
        return host_micros(lambda: run(*arguments))


def main() -> None:
    """Print a row for each shape and token count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, host microseconds of a call")
    print("shape   tokens " + " ".join(f"{name:>14}" for name in VARIANTS))
    for name in arguments.shapes:
        layer = build_layer(case_of_shape(name), dtype=torch.bfloat16, device=torch.device("cuda"))
        for tokens in arguments.tokens:
            times = [measure(layer, tokens, variant) for variant in VARIANTS]
            print(f"{name:7} {tokens:6} " + " ".join(f"{micros:14.1f}" for micros in times), flush=True)


if __name__ == "__main__":
    main()
