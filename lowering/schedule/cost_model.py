"""Time of one expert GEMM as one sympy expression of the token count, the shape, the schedule and the device.

Three terms: bytes (each expert hit is read once, at the rate the loads in flight can sustain), matrix work (tiles with
their padding, in whole waves over the SMs), and fixed costs per launch and per wave. Routing is taken as uniform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy

from .device import DeviceSpec
from .schedule import GemmShape, Schedule

# T tokens, K experts per token, E experts, D reduction depth, W output width, G weight halves per column, B bytes
T, K, E, D, W, G, B = sympy.symbols("T K E D W G B", positive=True)
BM, BN, BK, WARPS, STAGES = sympy.symbols("BM BN BK WARPS STAGES", positive=True)
SMS, BANDWIDTH, MATRIX, SHARED = sympy.symbols("SMS BANDWIDTH MATRIX SHARED", positive=True)

MEMORY_EFFICIENCY = 0.92
LATENCY = 0.9e-6  # seconds from a load's issue to its data under load
LAUNCH = 2.0e-6  # fixed cost of a kernel: launch, offsets, first loads, tail
WAVE = 0.6e-6  # fixed cost of a program: finding its expert, filling the pipeline, storing


def _matrix_efficiency() -> sympy.Expr:
    """Fraction of the matrix rate of a main loop: wgmma needs 64 rows, wide tiles reuse their operands."""
    columns = BN * G
    reuse = BM * columns / (BM + columns)  # FLOP per operand element
    wide = 0.68 * sympy.Min(1, reuse / 85)
    return sympy.Piecewise((0.22, BM < 32), (0.30, BM < 64), (wide, True))


@functools.cache
def gemm_time() -> sympy.Expr:
    """Seconds of one launch."""
    hit = E * (1 - (1 - K / E) ** T)
    row_tiles = hit * sympy.Max(1, T * K / hit / BM + sympy.Rational(1, 2))
    programs = row_tiles * sympy.ceiling(W / BN)

    shared = (BM + BN * G) * BK * B * STAGES
    registers = 32 * WARPS * (BM * BN * G / (32 * WARPS) + 48)
    resident = sympy.Max(1, sympy.floor(sympy.Min(SHARED / shared, 65_536 / registers, 64 / WARPS)))
    in_flight = BN * G * BK * B * (STAGES - 1)
    rate = sympy.Min(BANDWIDTH * MEMORY_EFFICIENCY, sympy.Min(programs, SMS * resident) * in_flight / LATENCY)
    memory = (hit * W * G * D * B + T * K * (D + W) * B) / rate

    tile_time = 2 * BM * BN * G * D / (MATRIX / SMS * _matrix_efficiency())
    matrix = sympy.Max(1, programs / SMS + sympy.Rational(1, 4)) * tile_time
    return LAUNCH + sympy.Max(memory, matrix) + WAVE * sympy.Max(1, programs / (SMS * resident))


@functools.cache
def _evaluator() -> Callable[..., float]:
    arguments = (T, K, E, D, W, G, B, BM, BN, BK, WARPS, STAGES, SMS, BANDWIDTH, MATRIX, SHARED)
    return sympy.lambdify(arguments, gemm_time(), modules="math", cse=True)


def predict(tokens: int, shape: GemmShape, schedule: Schedule, device: DeviceSpec) -> float:
    """Seconds of one expert GEMM at `tokens` tokens."""
    return float(
        _evaluator()(
            tokens,
            shape.top_k,
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
