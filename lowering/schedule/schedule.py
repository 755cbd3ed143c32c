"""A schedule is data: tile shape, warps and pipeline depth of one expert GEMM, and the rows it is for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, order=True)
class Schedule:
    """Launch parameters of one expert GEMM. Blocks in elements; `block_n` counts output columns (gated: two halves)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_memory(self, *, gated: bool, element_size: int) -> int:
        """Bytes of shared memory for the pipelined operand tiles."""
        rows = self.block_m + self.block_n * (2 if gated else 1)
        return rows * self.block_k * element_size * self.num_stages

    def accumulators_per_thread(self, *, gated: bool) -> int:
        """fp32 accumulator registers a thread holds."""
        return self.block_m * self.block_n * (2 if gated else 1) // (32 * self.num_warps)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """One expert GEMM: E experts, reduction depth, output width, gated (two weight halves per column), bytes."""

    num_experts: int
    depth: int
    width: int
    gated: bool
    element_size: int = 2


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Schedules of GEMMs that share one routing, and the largest row count N = T*K they are for (None: any)."""

    max_rows: int | None
    schedules: tuple[Schedule, ...]

    def __str__(self) -> str:
        bound = "more rows" if self.max_rows is None else f"up to {self.max_rows} rows"
        return f"{bound}: {' and '.join(map(str, self.schedules))}"
