"""Kernels that begin while the one before them still runs (programmatic dependent launch), and when they do.

A kernel launched with that attribute may start once every program of the kernel before it in the stream has let its
dependents go or has ended; what the other wrote, and that it has read everything, holds only after a wait. Each of our
templates, rendered with EARLY, waits and then lets its own dependents go, ahead of its first access to memory and of
any return. What is before the wait is index arithmetic, but for one kernel, see below. From this follows:

- Nothing is read before it was written, and no buffer that is used again is written while it is still read.
- A kernel that has ended, or has let its dependents go, had waited: all kernels before the last one have ended, too.
  So a wait for the last one is a wait for all, whoever wrote a buffer.
- Kernels without the attribute (cuBLAS, torch's own, memory copies) begin when everything before them has ended.

All this takes that whatever begins early in the stream waits. The kernels that Inductor generates in such a graph do,
by `_compat.begin_early`. Under `enable_pdl` alone they would not always: where `_compat` does not know an Inductor's
methods, nothing of ours begins early there.

Weights are read after the wait, too: in a graph with an optimizer step the kernel before may have written them. Ahead
of it they are read, with the ids, by one token's second GEMM alone (`vectors`). Nothing in the graph writes to these
weights; what wrote them before it, or the ids in it, had ended when the first GEMM had waited, as it has when this
begins. PTX promises to see what was written to whoever waits; that a kernel which begins later sees it, too, is how
caches of these devices work: what is written is in L2 by then, and L1 is empty when a kernel begins.

Inductor's C++ launcher knows no launch attributes, so such kernels are launched from Python. A CUDA graph pays for that
once; a graph of which Inductor then makes none (it changes its inputs, say) pays at every call. Without CUDA graphs
only those begin early who asked for it by `torch._inductor.config.triton.enable_pdl`. Both settings are in the keys of
Inductor's caches.
"""

from __future__ import annotations

import torch

from ..schedule.schedule import Schedule
from . import _compat

_CAPABILITY = (9, 0)


def begins_early(device: torch.device) -> bool:
    """Whether our kernels of the graph being lowered begin early on `device`, a CUDA device."""
    triton = _compat.config.triton
    wanted = _compat.knows_launches() if triton.enable_pdl else triton.cudagraphs
    return wanted and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _CAPABILITY


def gemm_begins_early(schedule: Schedule, device: torch.device) -> bool:
    """`begins_early` for an expert GEMM.

    Those for many rows do not: beside a kernel that still runs, their programs, one for each SM, gain nothing, and lose
    up to 2 % (one layer like Qwen3-30B-A3B's, at 4096 tokens on an H100, at 2048 on an H200; `benchmarks/NOTES.md`).
    """
    many_rows = schedule.loop.tma and schedule.block_m >= 128
    return not many_rows and begins_early(device)


def told(early: bool) -> str:
    """What the report of a lowered op says about it."""
    return ", begins early" if early else ""
