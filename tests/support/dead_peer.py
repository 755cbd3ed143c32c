"""Ranks of an expert-parallel layer, one of which ends or stands still in the middle; prints how others fared, JSON.

python -m tests.support.dead_peer naive|static|tp killed|frozen
"""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from diffulex.distributed import ParallelConfig
from diffulex.moe import MoESpec, build_moe_block  # noqa: F401  the layers are registered
from lowering.spec import RoutingSpec
from tests.support.moe_layers import swiglu_experts

RANKS, DEAD, TIMEOUT = 3, 1, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "naive": {"mode": "ep"},
    "static": {"mode": "ep", "dispatcher": "static", "max_tokens_per_rank": 8},
    "tp": {"mode": "tp"},
}


def _rank(rank: int, store: str, how: str, end: str, results: Any) -> None:
    torch.set_num_threads(1)
    limit = dt.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    from diffulex.moe.layer import EPFusedMoE, TPFusedMoE

    spec = MoESpec(8, RoutingSpec(2), swiglu_experts(6, 8, 4))
    parallel = ParallelConfig(init_device_mesh("cpu", (RANKS,)), **OPTIONS[how])
    layer = {"ep": EPFusedMoE, "tp": TPFusedMoE}[parallel.mode](spec, parallel=parallel)
    hidden_TH = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer(hidden_TH)
        dist.barrier()
        if rank == DEAD:
            os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
        start = time.monotonic()
        try:
            layer(hidden_TH)
            told = {"error": ""}
        except RuntimeError as error:
            told = {"error": f"{type(error).__name__}: {error}"[:400]}
    results.put({"rank": rank, "seconds": time.monotonic() - start, **told})
    results.close()
    results.join_thread()
    os._exit(0)  # without a goodbye to the group


def main() -> None:
    """How each of the others ended, within the limit and some seconds."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        store = os.path.join(folder, "store")
        ranks = [context.Process(target=_rank, args=(rank, store, *sys.argv[1:], results)) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        for _ in range(RANKS - 1):
            print(json.dumps(results.get(timeout=TIMEOUT + 60)))
        ranks[DEAD].kill()


if __name__ == "__main__":
    main()
