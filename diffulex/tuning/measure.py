"""On the GPU: kernels compiled in parallel, then checked against one another and timed in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowering.schedule.schedule import PLAIN, Schedule
from lowering.templates import eager, standalone

from ..benching.inputs import count_of_sets, draw_logits
from ..benching.timing import capture, round_robin
from .cells import Cell, act_of, tensors_of

Job = tuple[Cell, Schedule]
_ROUNDS = 11
_MOST_PROCESSES = 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one cell: seconds of each schedule that is right, its distance from the first one's result in that one's norm,
    and why the others have no time.
    """

    seconds: dict[Schedule, float]
    errors: dict[Schedule, float]
    refused: dict[Schedule, str]


class Measure(Protocol):
    """What times schedules; the first one of a cell is what the others are compared with."""

    def prepare(self, jobs: Sequence[Job], *, deadline: float) -> dict[Job, str]:
        """Compile kernels, for as long as there is time; those that cannot be, with the reason."""

    def time(self, cell: Cell, schedules: Sequence[Schedule]) -> Timing:
        """Times of those that compute the same as the first one."""


def tolerance(cell: Cell) -> float:
    """What two right results may differ by in norm: each is rounded once, after sums in fp32 in an order of its own."""
    summed: float = cell.gemm.depth**0.5 * torch.finfo(torch.float32).eps
    return 4 * max(torch.finfo(cell.dtype).eps, summed)


def kernel_of(job: Job) -> tuple[object, ...]:
    """Equal for jobs that come to one kernel: of the row count, triton looks at whether it is 1 or a multiple of 16."""
    cell, schedule = job
    wide = cell.rows * cell.gemm.width >= 2**31
    forms = cell.rows == 1, cell.rows % 16 == 0, stays_in_place(cell, schedule)
    return cell.case, cell.stage, cell.dtype, schedule, forms, wide


def compile_job(job: Job, *, most_shared: int) -> str:
    """Compile one kernel for the active device, into triton's cache; why that fails, or nothing."""
    cell, schedule = job
    shape, up, spec = cell.gemm, cell.stage == "up", cell.case.spec
    tensors = {name: tensor for name, tensor in tensors_of(cell, "meta").items() if tensor is not None}
    by_slot = stays_in_place(cell, schedule)
    if by_slot:
        tensors["IDS"] = torch.empty(1, cell.rows, dtype=torch.int64, device="meta")
    else:
        for name, size in (("ORDER", cell.rows), ("OFFSETS", shape.num_experts + 1)):
            tensors[name] = torch.empty(size, dtype=torch.int32, device="meta")
    tensors["OUT"] = torch.empty(cell.rows, shape.width, dtype=cell.dtype, device="meta")
    variant = (
        eager.up_variant(cell.dtype, act=act_of(cell), bias=spec.bias, interleaved=spec.interleaved)
        if up
        else eager.down_variant(cell.dtype, bias=spec.bias)
    )
    variant = dataclasses.replace(variant, by_slot=by_slot)
    variant = variant.scheduled(schedule, depth=shape.depth, strides=tensors["W"].stride())
    top_k = cell.case.shape.top_k if up else 1
    constants = eager.gemm_constants(shape.num_experts, top_k, width=shape.width, schedule=schedule)
    constants |= eager.index_constants(tensors, schedule)
    if schedule.loop.specialized:
        refused = eager.specialized_refusal(variant, shape)
        if refused is not None:
            return str(refused)
        tensors |= eager.specialized_arguments(tensors, schedule, gather=up, programs=1)
    from triton.errors import TritonError

    try:
        kernel = standalone.compile_only(
            variant.source(),
            tensors,
            name=variant.name,
            constants=constants,
            num_warps=schedule.launched_warps,
            num_stages=schedule.num_stages,
        )
    except (TritonError, RuntimeError) as error:  # of Triton's front end and ptxas, and of its passes; ours are not
        return f"{type(error).__name__}: {str(error)[:200]}"
    shared = kernel.metadata.shared
    return "" if shared <= most_shared else f"{shared} bytes of shared memory of {most_shared}"


class OnGpu:
    """`Measure` on the current CUDA device under one of `inputs.ROUTINGS`, with a pool of processes that compile."""

    def __init__(self, pool: Any, *, most_shared: int, routing: str) -> None:
        self._pool, self._compile = pool, functools.partial(compile_job, most_shared=most_shared)
        self._routing = routing

    def prepare(self, jobs: Sequence[Job], *, deadline: float) -> dict[Job, str]:
        """Compile kernels, for as long as there is time; those that cannot be, with the reason."""
        kernels = {kernel_of(job): job for job in jobs}
        results, problems = self._pool.imap(self._compile, kernels.values()), {}
        for kernel in kernels:
            try:
                left = max(0.0, deadline - time.monotonic())
                problems[kernel] = results.next(timeout=min(left, threading.TIMEOUT_MAX))
            except multiprocessing.TimeoutError:
                break  # there is no time to measure either
        return {job: problem for job in jobs if (problem := problems.get(kernel_of(job)))}

    def time(self, cell: Cell, schedules: Sequence[Schedule]) -> Timing:
        """Times of those that compute the same as the first one."""
        tensors = tensors_of(cell, "cuda")
        seeded = [torch.Generator("cuda").manual_seed(seed) for seed in range(count_of_sets(cell.tokens))]
        routings = [draw_routing(cell, self._routing, generator=generator) for generator in seeded]
        pool = torch.cuda.graph_pool_handle()
        calls = {schedule: functools.partial(launch, cell, tensors, schedule=schedule) for schedule in schedules}
        errors, refused = compare(cell, calls, routing=routings[0])
        graphs = {schedule: capture(calls[schedule], routings, pool=pool) for schedule in errors}
        times = round_robin(graphs, len(routings), rounds=_ROUNDS)
        del graphs, pool
        torch.cuda.empty_cache()  # the next cell has other sizes
        return Timing({schedule: micros * 1e-6 for schedule, micros in times.items()}, errors, refused)


@contextlib.contextmanager
def on_gpu(most_shared: int, *, routing: str) -> Iterator[OnGpu]:
    """`OnGpu` with a process for each CPU, up to a number that memory allows for."""
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield OnGpu(pool, most_shared=most_shared, routing=routing)


def stays_in_place(cell: Cell, schedule: Schedule) -> bool:
    """Whether a compiled graph leaves the slots of the cell as they are: one token's."""
    return cell.tokens == 1 and cell.rows <= cell.gemm.num_experts and schedule.loop == PLAIN


def launch(
    cell: Cell,
    tensors: dict[str, Any],
    ids_TK: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor | None,
    *,
    schedule: Schedule,
) -> Tensor:
    """The GEMM over ids [T, K] int64, their ORDER [N] and OFFSETS [E+1] int32: [N, I] or [N, H] in the cell's dtype."""
    a, weight, bias = tensors["A"], tensors["W"], tensors["BIAS"]
    if stays_in_place(cell, schedule):
        order_N, offsets_E1 = ids_TK, None
    if cell.stage == "down":
        return eager.moe_expert_down(a, weight, bias, order_N, offsets_E1, schedule=schedule)
    interleaved = cell.case.spec.interleaved
    return eager.moe_expert_up(
        a, weight, bias, order_N, offsets_E1, act=act_of(cell), interleaved=interleaved, schedule=schedule
    )


def compare(
    cell: Cell, calls: Mapping[Schedule, Callable[..., Tensor]], *, routing: tuple[Tensor, ...]
) -> tuple[dict[Schedule, float], dict[Schedule, str]]:
    """(distances from the first one's result [N, Y] in its norm, in any floating dtype, of those that are right; what
    is wrong with the others). Where the first one does not run or is not finite, none is right.
    """
    errors: dict[Schedule, float] = {}
    refused: dict[Schedule, str] = {}
    reference = None
    for schedule, call in calls.items():
        try:
            out = call(*routing).float()
            reference = out if reference is None else reference
            error = float((out - reference).norm() / reference.norm())
        except Exception as error_:  # whatever a launch raises; after a fault on the device all others say so too
            refused[schedule] = f"{type(error_).__name__}: {str(error_)[:200]}"
        else:
            if error <= tolerance(cell):
                errors[schedule] = error
            else:
                refused[schedule] = f"differs from the planned schedule's result by {error:.1e} of its norm"
        if reference is None or not errors:
            break
    return errors, refused


def draw_routing(cell: Cell, routing: str, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T, K] int64, ORDER [N] and OFFSETS [E+1] int32) of tokens that choose their experts by one of
    `inputs.ROUTINGS`, on the generator's device.

    A token's ids ascend, so that the slots of one token, which may stay in place, have the order of sorted ones.
    """
    shape = cell.case.shape
    logits_TE = draw_logits(routing, cell.tokens, shape=shape, generator=generator)
    ids_TK = logits_TE.topk(shape.top_k, dim=-1).indices.sort(dim=-1).values
    counts_E = torch.bincount(ids_TK.reshape(-1), minlength=shape.num_experts)
    offsets_E1 = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0)).int()
    return ids_TK, torch.argsort(ids_TK.reshape(-1), stable=True).int(), offsets_E1
