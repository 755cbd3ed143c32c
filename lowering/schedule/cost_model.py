"""Time of one expert GEMM as one sympy expression of the row count, the shape, the schedule and the device.

Three terms: bytes (from memory once, or once a row tile where the order of the tiles leaves nothing of an expert in L2,
at the rate the loads in flight can sustain, and on top of it what L2 has for an expert's next row tile; or from L2 once
a tile, if that takes longer), matrix work (tiles with their padding, in whole waves over the SMs), and fixed costs per
launch and per tile. Routing is taken as uniform, but for weights that are read again with each row tile: orders of the
tiles that avoid it cost next to nothing, and save much once routing is skewed. Schedules are compared by `score`, which
adds what skewed routing and a late begin would cost.

The floor of a GEMM is what its bytes take, moved once at the nominal bandwidth, or its FLOP at the nominal rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy

from ..report import Cost
from .device import DeviceSpec
from .schedule import GemmShape, Schedule

# N rows (slots), E experts, D reduction depth, W output width, G weight halves per column, B bytes per element
N, E, D, W, G, B = sympy.symbols("N E D W G B", positive=True)
BM, BN, BK, WARPS, STAGES = sympy.symbols("BM BN BK WARPS STAGES", positive=True)
TMA, FLATTEN, GROUPED, SPECIALIZED = sympy.symbols("TMA FLATTEN GROUPED SPECIALIZED", nonnegative=True)  # 0 or 1
SMS, BANDWIDTH, MATRIX, SHARED, L2 = sympy.symbols("SMS BANDWIDTH MATRIX SHARED L2", positive=True)

# What the hardware does to the ideal formulas; fitted by benchmarks/calibrate_cost_model.py to measured sweeps, but for
# `again_rate`, which leaves the least error in one of them where experts have one to four row tiles.
CONSTANTS = {
    "memory_efficiency": 0.95,  # of the nominal bandwidth, for streamed weights
    "latency": 9.58e-07,  # seconds from a load's issue to its data under load
    "launch": 5.04e-06,  # seconds a kernel costs whatever it does
    "wave": 4.16e-07,  # seconds a program costs: finding its expert, filling the pipeline, storing
    "step": 3.2e-08,  # seconds a step of the main loop costs beyond its bytes and FLOP: barriers, addresses
    "rows16": 1,  # of the matrix rate with 16-row tiles
    "rows32": 0.776,  # with 32-row tiles
    "rows64": 0.613,  # with tiles that wgmma takes
    "reuse": 43.2,  # FLOP per operand element from which loads no longer bound the main loop
    "shallow": 0.947,  # factor for pipelines of 3 stages against 4
    "imbalance": 0.198,  # of a wave lost at the end
    "overlap": 0.209,  # of the shorter of memory and matrix time that is not hidden
    "short_rows": 0.949,  # of the rate of loads whose rows are shorter than 256 bytes
    "l2_rate": 1.85,  # of the bandwidth of memory, from L2
    "again_rate": 6.0,  # of the bandwidth of memory, for weights that L2 has for an expert's next row tile
    "l2_share": 1.25,  # of L2 that an expert's weights can have and still be there for its next row tile
    "grouped": 1.75e-07,  # seconds a program's place in the grouped order costs
    "descriptors": 1.62e-06,  # seconds until a kernel has made its tensor descriptors, or its count of tiles is zero
    "tma_rate": 2.58,  # matrix rate with tensor descriptors against pointers
    "tma_step": 1.97,  # of `step` with tensor descriptors
    "flatten_rate": 0.95,  # matrix rate of a flattened loop
    "flatten_tile": 0.000545,  # of what a tile costs beyond its loop, in a flattened loop
    "specialized_rate": 0.71,  # of the matrix rate with specialised warps
    "specialized_memory": 0.93,  # of the rate of loads
    "specialized_overlap": 0.09,  # `overlap` there; steps and tiles cost nothing beyond their bytes and FLOP
    "specialized_rest": 0.25,  # row tiles of an expert there, beside whole ones
}
# One token's kernels, of which the second begins while the first runs: seconds each, and of the nominal bandwidth;
# from four layers on an H200, within 2 % (`benchmarks/NOTES.md`).
VECTOR_LAUNCH = 1.97e-06
VECTOR_EFFICIENCY = 0.922
# Row tiles that skewed routing adds, of those that all rows but a first tile make: about so for loads as 1 / rank.
_SKEW = sympy.Rational(1, 4)
# What `score` adds, by cells that were timed with uniform and skewed routing and by layers in CUDA graphs, on H200s
# (`benchmarks/NOTES.md`): so much of the share of row tiles that a Zipf law adds, where programs are few waves, so that
# one more shows; and the seconds that a GEMM for many rows loses where others begin early, see `inductor.early`.
SKEW_WEIGHT = 0.2
LATE = 3.5e-6
_CONSTANT = {name: sympy.Symbol(name, positive=True) for name in CONSTANTS}


def _matrix_efficiency() -> sympy.Expr:
    """Fraction of the matrix rate of a main loop: wgmma needs 64 rows, wide tiles reuse their operands."""
    c = _CONSTANT
    columns = BN * G
    reuse = BM * columns / (BM + columns)  # FLOP per operand element
    rows = sympy.Piecewise((c["rows16"], BM < 32), (c["rows32"], BM < 64), (c["rows64"], True))
    depth = sympy.Piecewise((c["shallow"], STAGES < 4), (1, True))
    loop = (1 + TMA * (c["tma_rate"] - 1)) * (1 + FLATTEN * (c["flatten_rate"] - 1))
    usual = rows * depth * loop * sympy.Min(1, reuse / c["reuse"])
    return sympy.Piecewise((c["specialized_rate"], SPECIALIZED > 0), (usual, True))


def _hit() -> sympy.Expr:
    """Experts that have a row."""
    return E * (1 - (1 - 1 / E) ** N)


def _bytes_moved(experts: Any) -> sympy.Expr:
    """Bytes from and to memory, with the weights of so many experts (of one as often as it is read)."""
    return experts * W * G * D * B + N * (D + W) * B


def _rest() -> sympy.Expr:
    """Row tiles of an expert beside whole ones, on average."""
    return sympy.Piecewise((_CONSTANT["specialized_rest"], SPECIALIZED > 0), (sympy.Rational(1, 2), True))


def _flop(rows: Any, width: Any) -> sympy.Expr:
    return 2 * rows * width * G * D


def _row_tiles() -> sympy.Expr:
    """Row tiles of all experts."""
    return _hit() * sympy.Max(1, N / _hit() / BM + _rest())


def _resident() -> sympy.Expr:
    """Programs of an SM at a time."""
    shared = (BM + BN * G) * BK * B * STAGES
    registers = 32 * WARPS * (BM * BN * G / (32 * WARPS) + 48)
    several = sympy.Max(1, sympy.floor(sympy.Min(SHARED / shared, 65_536 / registers, 64 / WARPS)))
    return sympy.Piecewise((1, TMA > 0), (several, True))


@functools.cache
def gemm_time() -> sympy.Expr:
    """Seconds of one launch, in the symbols above and the fitted constants."""
    c = _CONSTANT
    hit, row_tiles, resident = _hit(), _row_tiles(), _resident()
    programs = row_tiles * sympy.ceiling(W / BN)

    kept = sympy.Or(GROUPED > 0, c["l2_share"] * L2 > W * G * D * B)
    in_flight = BN * G * BK * B * (STAGES - 1)
    reading = sympy.Piecewise((hit * sympy.ceiling(W / BN), kept), (programs, True))  # from memory, at a time
    reading = sympy.Min(reading, SMS * resident)
    rate = sympy.Min(BANDWIDTH * c["memory_efficiency"], reading * in_flight / c["latency"])
    rate *= sympy.Piecewise((c["specialized_memory"], SPECIALIZED > 0), (c["short_rows"], BK * B < 256), (1, True))
    read_again = row_tiles + _SKEW * sympy.Max(0, N - BM) / BM
    from_memory = _bytes_moved(sympy.Piecewise((hit, kept), (read_again, True)))
    again = sympy.Piecewise(((row_tiles - hit) * W * G * D * B / (BANDWIDTH * c["again_rate"]), kept), (0, True))
    from_l2 = programs * (BN * G + BM) * D * B
    memory = sympy.Max(from_memory / rate + again, from_l2 / (BANDWIDTH * c["l2_rate"]))

    # specialised warps multiply 64 rows each, and not those that have none
    multiplied = sympy.Piecewise((sympy.Min(BM, N / row_tiles + 32), SPECIALIZED > 0), (BM, True))
    tile_time = _flop(multiplied, BN) / (MATRIX / SMS * _matrix_efficiency())
    matrix = sympy.Max(1, programs / SMS + c["imbalance"]) * tile_time
    waves = sympy.Max(1, programs / (SMS * resident))
    step = c["step"] * (1 + TMA * (c["tma_step"] - 1)) * sympy.ceiling(D / BK)
    tile = c["wave"] * (1 + FLATTEN * (c["flatten_tile"] - 1)) + GROUPED * (1 - TMA) * c["grouped"]
    waiting = sympy.Piecewise((0, SPECIALIZED > 0), ((step + tile) * waves, True))
    overlap = sympy.Piecewise((c["specialized_overlap"], SPECIALIZED > 0), (c["overlap"], True))
    work = sympy.Max(memory, matrix) + overlap * sympy.Min(memory, matrix)
    return c["launch"] + TMA * c["descriptors"] + work + waiting


def _more_tiles() -> sympy.Expr:
    """The share of row tiles that routing by a Zipf law, loads as 1 / rank, adds to those of uniform routing.

    The r-th expert has max(1, N / (r H_E BM) + rest) of them, H_E the sum of 1 / r; summed up by H_r = log r + 0.5772 +
    1 / (2 r). All experts count as hit: where few rows leave some out, Zipf routing leaves out more, and adds less than
    this.
    """
    rest = _rest()

    def harmonic(count: sympy.Expr) -> sympy.Expr:
        return sympy.log(count) + sympy.EulerGamma.evalf() + 1 / (2 * count)

    first = N / (harmonic(E) * BM)
    several = sympy.Min(E, first / (1 - rest))  # experts with more than one
    tiles = sympy.Piecewise((first * harmonic(several) + rest * several + E - several, several > 1), (E, True))
    return sympy.Max(0, tiles / (E * sympy.Max(1, N / (E * BM) + rest)) - 1)


def _added_by_skew() -> sympy.Expr:
    """Of the time, what `score` adds: SKEW_WEIGHT more min(1, 2 / waves)^6; the power lets it fade beyond two waves."""
    waves = _row_tiles() * sympy.ceiling(W / BN) / (SMS * _resident())
    return SKEW_WEIGHT * _more_tiles() * sympy.Min(1, 2 / waves) ** 6


_SCHEDULE = (BM, BN, BK, WARPS, STAGES, TMA, FLATTEN, GROUPED, SPECIALIZED)
_DEVICE = (SMS, BANDWIDTH, MATRIX, SHARED, L2)
ARGUMENTS = (N, E, D, W, G, B, *_SCHEDULE, *_DEVICE)


def arguments(rows: int, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> tuple[float, ...]:
    """The values of `ARGUMENTS`."""
    loop = schedule.loop
    return (
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
        int(loop.tma),
        int(loop.flatten),
        int(loop.grouped or loop.tma),
        int(loop.specialized),
        device.num_sms,
        device.bandwidth,
        device.matrix_rate,
        device.shared_memory,
        device.l2_size,
    )


@functools.cache
def _evaluator() -> Callable[..., tuple[float, float]]:
    """(seconds, of them what skew adds) of the values of `ARGUMENTS`."""
    # constants as arguments: putting numbers into the expression takes sympy longer than all the rest
    both = gemm_time(), _added_by_skew()
    function = sympy.lambdify((*ARGUMENTS, *_CONSTANT.values()), both, modules="math", cse=True)
    return lambda *values: function(*values, *CONSTANTS.values())


def predict(rows: int, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> float:
    """Seconds of one expert GEMM over `rows` rows."""
    return float(_evaluator()(*arguments(rows, shape, schedule=schedule, device=device))[0])


def score(rows: int, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> float:
    """What schedules for `rows` rows are compared by, in seconds: `predict`, and what the row tiles that skewed routing
    adds, and a kernel for many rows among others that begin early, would cost.
    """
    # of pointers, too: early or not, these and descriptors are compared by their time
    many_rows = schedule.block_m >= 128 and shape.element_size == 2 and device.capability >= (9, 0)
    seconds, skew = _evaluator()(*arguments(rows, shape, schedule=schedule, device=device))
    return float(seconds * (1 + skew)) + (LATE if many_rows else 0.0)


@functools.cache
def _least() -> Callable[..., tuple[float, float, float]]:
    """(bytes, FLOP, seconds of the floor) of the values of `ARGUMENTS`."""
    least_bytes, flop = _bytes_moved(_hit()), _flop(N, W)
    floor = sympy.Max(least_bytes / BANDWIDTH, flop / MATRIX)
    function: Callable[..., tuple[float, float, float]] = sympy.lambdify(
        ARGUMENTS, (least_bytes, flop, floor), modules="math"
    )
    return function


def cost(rows: int, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> Cost | None:
    """What the model says of one expert GEMM; None without rows, and in dtypes other than those it was fitted to."""
    if rows < 1 or shape.element_size != 2:
        return None
    least_bytes, flop, floor = _least()(*arguments(rows, shape, schedule=schedule, device=device))
    predicted = predict(rows, shape, schedule=schedule, device=device)
    return Cost(device.name, rows, float(least_bytes), float(flop), floor_us=floor * 1e6, predicted_us=predicted * 1e6)


def vector_cost(top_k: int, shape: GemmShape, *, device: DeviceSpec) -> Cost | None:
    """What becomes of one token's GEMM as products with vectors, which read an expert for each of its slots.

    A shared expert beside it is not counted. None in dtypes other than those that this was fitted to.
    """
    if shape.element_size != 2:
        return None
    halves = 2 if shape.gated else 1
    least_bytes = 2.0 * top_k * (shape.width * halves * shape.depth + shape.depth + shape.width)
    flop = 2.0 * top_k * shape.width * halves * shape.depth
    streamed = least_bytes / device.bandwidth
    floor, predicted = max(streamed, flop / device.matrix_rate), VECTOR_LAUNCH + streamed / VECTOR_EFFICIENCY
    return Cost(device.name, top_k, least_bytes, flop, floor_us=floor * 1e6, predicted_us=predicted * 1e6)
