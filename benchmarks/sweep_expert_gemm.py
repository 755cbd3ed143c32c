"""Time schedules of the two expert GEMMs: the data the cost model is calibrated and judged by.

    python -m benchmarks.sweep_expert_gemm --shapes qwen3 mixtral --out sweep.csv
    python -m benchmarks.sweep_expert_gemm --best 12 --out sweep.csv    only those that the cost model ranks first

One CSV row per (shape, stage, tokens, schedule): median microseconds of CUDA-graph replays over rotated routings, so
that weights come from memory and not from L2.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import multiprocessing
import statistics
import time

import torch

from diffulex.benching.shapes import SHAPES, TOKENS, Shape
from lowering.schedule.cost_model import predict
from lowering.schedule.device import DeviceSpec, device_spec
from lowering.schedule.plan import candidates
from lowering.schedule.schedule import PLAIN, GemmShape, Loop, Schedule
from lowering.templates import eager, standalone
from lowering.templates.render import ExpertGemmVariant

ROUTINGS = 8
FIELDS = tuple(field.name for field in dataclasses.fields(Schedule) if field.name != "loop")
LOOP_FIELDS = tuple(field.name for field in dataclasses.fields(Loop))


def gemm_shape(shape: Shape, stage: str) -> GemmShape:
    """The GEMM of a stage, "up" or "down"."""
    if stage == "up":
        return GemmShape(shape.num_experts, shape.hidden, shape.intermediate, True)
    return GemmShape(shape.num_experts, shape.intermediate, shape.hidden, False)


def _variant(stage: str) -> ExpertGemmVariant:
    if stage == "up":
        return ExpertGemmVariant(gather=True, scatter=False, bias=False, act="silu(g) * u")
    return ExpertGemmVariant(gather=False, scatter=True, bias=False)


def _tensors(shape: Shape, stage: str, tokens: int, device: str) -> dict[str, torch.Tensor]:
    rows, options = tokens * shape.top_k, {"device": device, "dtype": torch.bfloat16}
    e, h, i = shape.num_experts, shape.hidden, shape.intermediate
    sizes = ((tokens, h), (e, 2 * i, h), (rows, i)) if stage == "up" else ((rows, i), (e, h, i), (rows, h))
    a, w, out = (torch.empty(size, **options) for size in sizes)
    if device != "meta":
        a.normal_()
        w.normal_(std=0.02)
    index = {"device": device, "dtype": torch.int32}
    return {"A": a, "W": w, "OUT": out, "ORDER": torch.empty(rows, **index), "OFFSETS": torch.empty(e + 1, **index)}


def _precompile(job: tuple[str, str, int, Schedule]) -> str:
    name, stage, tokens, schedule = job
    shape = SHAPES[name]
    tensors = _tensors(shape, stage, tokens, "meta")
    variant = _variant(stage).scheduled(schedule, depth=tensors["A"].shape[1])
    width = tensors["OUT"].shape[1]
    top_k = shape.top_k if stage == "up" else 1
    constants = eager.gemm_constants(shape.num_experts, top_k, width=width, schedule=schedule)
    constants["INDEX_DTYPE"] = eager.index_type(tensors["OUT"])
    try:
        kernel = standalone.compile_only(
            variant.source(),
            tensors,
            name=variant.name,
            constants=constants,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )
    except Exception as error:  # a schedule the compiler refuses is a result, printed with its reason
        return f"{job}: {type(error).__name__} {error}"
    shared, limit = kernel.metadata.shared, device_spec().shared_memory
    return "" if shared <= limit else f"{job}: {shared} bytes of shared memory of {limit}"


def _routings(shape: Shape, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    routings = []
    for seed in range(ROUTINGS):
        torch.manual_seed(seed)
        ids = torch.randn(tokens, shape.num_experts, device="cuda").topk(shape.top_k, dim=-1).indices.reshape(-1)
        counts = torch.bincount(ids, minlength=shape.num_experts)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        routings.append((torch.argsort(ids, stable=True).int(), offsets))
    return routings


def _time(run: object, calls: int) -> float:
    """Median microseconds per call of a captured loop of `calls` calls over the routings."""
    for index in range(2):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            run(index % ROUTINGS)
    samples = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(samples[2:])


def _measure(name: str, stage: str, tokens: int, schedules: list[Schedule], writer: object, deadline: float) -> None:
    shape = SHAPES[name]
    tensors, routings = _tensors(shape, stage, tokens, "cuda"), _routings(shape, tokens)
    reference = None
    for schedule in schedules:
        if time.time() > deadline:
            print("deadline reached", name, stage, tokens, flush=True)
            return

        def run(index: int, schedule: Schedule = schedule) -> torch.Tensor:
            order, offsets = routings[index]
            if stage == "up":
                return eager.moe_expert_up(
                    tensors["A"], tensors["W"], None, order, offsets, act="silu(g) * u", schedule=schedule
                )
            return eager.moe_expert_down(tensors["A"], tensors["W"], None, order, offsets, schedule=schedule)

        try:
            out = run(0).float()
            reference = out if reference is None else reference
            error = ((out - reference).norm() / reference.norm()).item()
            micros = _time(run, 16 if tokens <= 2048 else 4)
        except Exception as error_:  # a schedule the device refuses is a result, printed with its reason
            print(name, stage, tokens, schedule, type(error_).__name__, str(error_)[:100], flush=True)
            continue
        writer.writerow([name, stage, tokens, *_values(schedule), f"{micros:.2f}", f"{error:.1e}"])


def schedule_of(row: dict[str, str]) -> Schedule:
    """The schedule of a CSV row."""
    loop = Loop(**{name: type(getattr(PLAIN, name))(int(row[name])) for name in LOOP_FIELDS})
    return Schedule(**{name: int(row[name]) for name in FIELDS}, loop=loop)


def _values(schedule: Schedule) -> list[int]:
    return [*(getattr(schedule, name) for name in FIELDS), *(int(getattr(schedule.loop, name)) for name in LOOP_FIELDS)]


def _worth(shape: Shape, stage: str, tokens: int, *, device: DeviceSpec, best: int) -> list[Schedule]:
    """All schedules but those with tiles far from the rows an expert gets, which cannot win and cost device time."""
    rows, gemm = tokens * shape.top_k, gemm_shape(shape, stage)
    found = candidates(gemm, device)
    if best:
        return sorted(found, key=lambda schedule: predict(rows, gemm, schedule=schedule, device=device))[:best]
    own = max(1.0, rows / shape.num_experts)
    return [schedule for schedule in found if min(64, own / 8) <= schedule.block_m <= max(16, 4 * own)]


def main() -> None:
    """Parse arguments, compile in parallel, time, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--best", type=int, default=0, help="only so many schedules, the model's first; 0: all")
    parser.add_argument("--out", default="sweep.csv")
    parser.add_argument("--seconds", type=float, default=400)
    arguments = parser.parse_args()
    began = time.time()
    device = device_spec()
    jobs = [
        (name, stage, tokens, schedule)
        for name in arguments.shapes
        for tokens in arguments.tokens
        for stage in ("up", "down")
        for schedule in _worth(SHAPES[name], stage, tokens, device=device, best=arguments.best)
    ]
    unique = {(j[0], j[1], j[3], j[2] >= 16): j for j in jobs}
    with multiprocessing.get_context("spawn").Pool(16) as pool:
        problems = [line for line in pool.imap_unordered(_precompile, list(unique.values()), chunksize=4) if line]
    print(device, len(jobs), "cells,", len(unique), "kernels compiled in", f"{time.time() - began:.0f} s", flush=True)
    print("\n".join(problems[:20]))
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "stage", "tokens", *FIELDS, *LOOP_FIELDS, "us", "error"])
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                for stage in ("up", "down"):
                    schedules = [j[3] for j in jobs if j[:3] == (name, stage, tokens)]
                    _measure(name, stage, tokens, schedules, writer, began + arguments.seconds)
                    file.flush()
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
