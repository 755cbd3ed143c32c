"""Many who compile the same block first, at once: threads of this process, or processes that share an empty cache.

Run as a program, it prints the digests of 8 threads or of 8 processes, JSON. The graph calls kernels of ATen and ours
alone, so that no C++ is compiled; everything else is Inductor's.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import diffulex  # noqa: F401  captures the block

COUNT = 8
SECONDS = 120
ops = torch.ops.diffulex


def block(hidden_TH: Tensor, logits_TE: Tensor, w13_EJH: Tensor, w2_EHI: Tensor) -> Tensor:
    """[T, H] in the dtype of hidden."""
    weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, 2)
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, 4)
    gate_NI, up_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, 2).chunk(2, -1)
    act_NI = torch.nn.functional.silu(gate_NI) * up_NI
    return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)


def inputs() -> list[Tensor]:
    """hidden [3, 8], logits [3, 4] and the weights of 4 experts, fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((3, 8), (3, 4), (4, 12, 8), (4, 8, 6))]


def digest(call: Callable[..., Tensor]) -> str:
    """sha256 of what the call gives, the graph of it captured whole."""
    with torch.no_grad():
        return hashlib.sha256(call(*inputs()).numpy().tobytes()).hexdigest()


def of_threads(count: int = COUNT) -> list[str]:
    """Digests of threads that call one compiled function first, all at once."""
    compiled, barrier = torch.compile(block, fullgraph=True), threading.Barrier(count)
    found: list[str] = []

    def work() -> None:
        barrier.wait()
        found.append(digest(compiled))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    return found


def of_processes(count: int = COUNT) -> list[str]:
    """Digests of processes that compile the block first, all at once.

    Forked when all is imported, and nothing but another function compiled.
    """
    torch.compile(torch.mm, fullgraph=True)(torch.ones(2, 2), torch.ones(2, 2))
    torch._dynamo.reset()
    counters.clear()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()

    def work() -> None:
        barrier.wait()
        told = digest(torch.compile(block, fullgraph=True))
        results.put((told, dict(counters["inductor"])))

    processes = [context.Process(target=work, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    found, counts = zip(*(results.get(timeout=SECONDS) for _ in processes), strict=True)
    assert any(count.get("fxgraph_cache_miss") for count in counts), "someone compiled it first"
    return list(found)


def main() -> None:
    """`threads` or `processes`, and what eager mode gives."""
    torch.set_num_threads(1)  # a child of a fork has no pool of threads
    how = {"threads": of_threads, "processes": of_processes}[sys.argv[1]]
    with torch.no_grad():
        wanted = block(*inputs())
    print(json.dumps({"found": how(), "eager": hashlib.sha256(wanted.numpy().tobytes()).hexdigest()}))
    sys.stdout.flush()
    os._exit(0)  # not after a thread that hangs


if __name__ == "__main__":
    main()
