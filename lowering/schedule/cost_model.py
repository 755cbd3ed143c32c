"""Time of one expert GEMM as one sympy expression of the row count, the shape, the schedule and the device.

Three terms: bytes (each expert hit is read once, at the rate the loads in flight can sustain), matrix work (tiles with
their padding, in whole waves over the SMs), and fixed costs per launch and per wave. Routing is taken as uniform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy

from .device import DeviceSpec
from .schedule import GemmShape, Schedule

# N rows (slots), E experts, D reduction depth, W output width, G weight halves per column, B bytes per element
N, E, D, W, G, B = sympy.symbols("N E D W G B", positive=True)
BM, BN, BK, WARPS, STAGES = sympy.symbols("BM BN BK WARPS STAGES", positive=True)
SMS, BANDWIDTH, MATRIX, SHARED = sympy.symbols("SMS BANDWIDTH MATRIX SHARED", positive=True)

# What the hardware does to the ideal formulas; fitted by benchmarks/calibrate_cost_model.py to measured sweeps.
CONSTANTS = {
    "memory_efficiency": 0.95,  # of the nominal bandwidth, for streamed weights
    "latency": 1.02e-06,  # seconds from a load's issue to its data under load
    "launch": 4.27e-06,  # seconds a kernel costs whatever it does
    "wave": 3.85e-07,  # seconds a program costs: finding its expert, filling the pipeline, storing
    "step": 4.16e-08,  # seconds a step of the main loop costs beyond its bytes and FLOP: barriers, addresses
    "rows16": 0.675,  # of the matrix rate with 16-row tiles
    "rows32": 0.473,  # with 32-row tiles
    "rows64": 0.501,  # with tiles that wgmma takes
    "reuse": 67.7,  # FLOP per operand element from which loads no longer bound the main loop
    "shallow": 0.944,  # factor for pipelines of 3 stages against 4
    "imbalance": 0.18,  # of a wave lost at the end
    "overlap": 0.137,  # of the shorter of memory and matrix time that is not hidden
}
_CONSTANT = {name: sympy.Symbol(name, positive=True) for name in CONSTANTS}


def _matrix_efficiency() -> sympy.Expr:
    """Fraction of the matrix rate of a main loop: wgmma needs 64 rows, wide tiles reuse their operands."""
    c = _CONSTANT
    columns = BN * G
    reuse = BM * columns / (BM + columns)  # FLOP per operand element
    rows = sympy.Piecewise((c["rows16"], BM < 32), (c["rows32"], BM < 64), (c["rows64"], True))
    depth = sympy.Piecewise((c["shallow"], STAGES < 4), (1, True))
    return rows * depth * sympy.Min(1, reuse / c["reuse"])


@functools.cache
def gemm_time() -> sympy.Expr:
    """Seconds of one launch, in the symbols above and the fitted constants."""
    c = _CONSTANT
    hit = E * (1 - (1 - 1 / E) ** N)
    row_tiles = hit * sympy.Max(1, N / hit / BM + sympy.Rational(1, 2))
    programs = row_tiles * sympy.ceiling(W / BN)

    shared = (BM + BN * G) * BK * B * STAGES
    registers = 32 * WARPS * (BM * BN * G / (32 * WARPS) + 48)
    resident = sympy.Max(1, sympy.floor(sympy.Min(SHARED / shared, 65_536 / registers, 64 / WARPS)))
    in_flight = BN * G * BK * B * (STAGES - 1)
    rate = sympy.Min(BANDWIDTH * c["memory_efficiency"], sympy.Min(programs, SMS * resident) * in_flight / c["latency"])
    memory = (hit * W * G * D * B + N * (D + W) * B) / rate

    tile_time = 2 * BM * BN * G * D / (MATRIX / SMS * _matrix_efficiency())
    matrix = sympy.Max(1, programs / SMS + c["imbalance"]) * tile_time
    steps = c["step"] * sympy.ceiling(D / BK) * sympy.Max(1, programs / (SMS * resident))
    work = steps + sympy.Max(memory, matrix) + c["overlap"] * sympy.Min(memory, matrix)
    return c["launch"] + work + c["wave"] * sympy.Max(1, programs / (SMS * resident))


ARGUMENTS = (N, E, D, W, G, B, BM, BN, BK, WARPS, STAGES, SMS, BANDWIDTH, MATRIX, SHARED)


@functools.cache
def _evaluator() -> Callable[..., float]:
    values = {symbol: CONSTANTS[name] for name, symbol in _CONSTANT.items()}
    return sympy.lambdify(ARGUMENTS, gemm_time().subs(values), modules="math", cse=True)


def predict(rows: int, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> float:
    """Seconds of one expert GEMM over `rows` rows."""
    return float(
        _evaluator()(
            rows,
            shape.num_experts,
            shape.depth,
            shape.width,
            2 if shape.gated else 1,
            shape.element_size,
            schedule.block_m,
            schedule.block_n,
            schedule.block_k,
            schedule.num_warps,
            schedule.num_stages,
            device.num_sms,
            device.bandwidth,
            device.matrix_rate,
            device.shared_memory,
        )
    )
