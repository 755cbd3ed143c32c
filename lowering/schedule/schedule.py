"""A schedule is data: tile shape, warps and pipeline depth of one expert GEMM, and the rows it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import Reason, ReasonCode


@dataclasses.dataclass(frozen=True, order=True)
class Loop:
    """What of a schedule changes the kernel's text, and not only its constants.

    tma       one program an SM takes tile after tile; weights, and A where its rows are consecutive, come through
              tensor descriptors (sm_90 and newer), both halves of gated weights in one
    flatten   the next tile's first loads are issued before a tile is stored (tma)
    subtiles  1 or 2 parts of a tile's columns are stored one after the other (tma)
    grouped   row tiles of an expert share columns of weights in groups (always so with tma)
    specialized  some warps load and others multiply (tma, tiles of 192 rows, see `Schedule.specialized`)
    split_k   the last tiles, at most half as many as SMs, go in pieces of their reduction (specialized); how a row is
              summed then follows from the rows of all experts
    """

    tma: bool = False
    flatten: bool = False
    subtiles: int = 1
    grouped: bool = False
    specialized: bool = False
    split_k: bool = False

    def __str__(self) -> str:
        words = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is True]
        return " ".join([*words, *([f"/{self.subtiles}"] if self.subtiles > 1 else [])])


PLAIN = Loop()
SPECIALIZED_EXPERTS = 256  # whose places fit into what shared memory operands leave free
SPLIT_DEPTH = 8192  # of a reduction whose last tiles are worth pieces: less is over before partial sums are added
MOST_PIECES = 3  # of a tile then: as fast as more
SPECIALIZED_ROWS = 192  # of a tile whose warps are specialised: three groups of four warps, of 64 rows each


@dataclasses.dataclass(frozen=True, order=True)
class Schedule:
    """Launch parameters of one expert GEMM. Blocks in elements; `block_n` counts output columns (gated: two halves).

    group_m: row tiles of an expert that share a column of weights before the next one, where the order is grouped.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    loop: Loop = PLAIN
    group_m: int = 8

    def shared_memory(self, *, gated: bool, element_size: int) -> int:
        """Bytes of shared memory: the pipelined operand tiles, and the one stored beside them in a flattened loop."""
        rows = self.block_m + self.block_n * (2 if gated else 1)
        stored = self.block_m * self.block_n // self.loop.subtiles if self.loop.flatten else 0
        return (rows * self.block_k * self.num_stages + stored) * element_size

    def accumulators_per_thread(self, *, gated: bool) -> int:
        """fp32 accumulator registers a thread holds."""
        return self.block_m * self.block_n * (2 if gated else 1) // (32 * self.num_warps)

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        if self.loop == PLAIN:
            return tile
        return f"{tile} {self.loop} g{self.group_m}"

    def without_tma(self) -> Schedule:
        """The same tiles, one a program, with operands loaded by pointers."""
        return dataclasses.replace(self.without_specialized(), loop=Loop(grouped=True))

    def ungrouped(self) -> Schedule:
        """The same tiles, one a program, by pointers and in no groups: for rows that have no order."""
        return dataclasses.replace(self.without_specialized(), loop=PLAIN)

    @classmethod
    def specialized(cls, *, gated: bool, split_k: bool = False) -> Schedule:
        """The schedule with specialised warps; `num_warps` counts those that multiply."""
        loop = Loop(tma=True, specialized=True, split_k=split_k)
        return cls(SPECIALIZED_ROWS, 128 if gated else 256, 64, 12, 4, loop)

    def without_split_k(self) -> Schedule:
        """The same tiles, each in one piece."""
        return dataclasses.replace(self, loop=dataclasses.replace(self.loop, split_k=False))

    def without_specialized(self) -> Schedule:
        """The nearest schedule whose warps all load and multiply."""
        if not self.loop.specialized:
            return self
        loop = Loop(tma=True, flatten=True, subtiles=2 if self.block_n == 256 else 1)
        group_m = 8 if self.block_n == 256 else 16  # as others of that width have
        return dataclasses.replace(self, block_m=128, num_warps=8, loop=loop, group_m=group_m)

    @property
    def launched_warps(self) -> int:
        """Warps that a kernel is launched with: specialised ones add those of the other groups themselves."""
        return 4 if self.loop.specialized else self.num_warps


LOOP_FIELDS = tuple(field.name for field in dataclasses.fields(Loop))
FIELDS = (*(field.name for field in dataclasses.fields(Schedule) if field.name != "loop"), *LOOP_FIELDS)


def numbers_of(schedule: Schedule) -> tuple[int, ...]:
    """A schedule as whole numbers in the order of `FIELDS`, for what is written to a file."""
    return tuple(int(getattr(schedule.loop if name in LOOP_FIELDS else schedule, name)) for name in FIELDS)


def schedule_of(numbers: Sequence[int]) -> Schedule:
    """The schedule of such numbers."""
    given = dict(zip(FIELDS, numbers, strict=True))
    loop = Loop(**{name: type(getattr(PLAIN, name))(given.pop(name)) for name in LOOP_FIELDS})
    return Schedule(loop=loop, **given)


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """One expert GEMM: E experts, reduction depth, output width, gated (two weight halves per column), bytes.

    descriptors: whether its operands can be read through tensor descriptors, where the device has them.
    rows_follow: whether all rows of its weights follow one another, as specialised warps take them.
    accumulators: fp32 registers of a thread that its tiles may take, beside what else the kernel keeps.
    """

    num_experts: int
    depth: int
    width: int
    gated: bool
    element_size: int = 2
    descriptors: bool = True
    accumulators: int = 128
    rows_follow: bool = True

    @classmethod
    def of_weight(
        cls, sizes: tuple[int, ...], strides: tuple[int, ...], *, gated: bool, element_size: int
    ) -> GemmShape:
        """That of weights [E, J, H]; a gated activation takes two of its rows for a column."""
        num_experts, rows, depth = sizes
        descriptors = tma_refusal("W", sizes, strides=strides, element_size=element_size) is None
        follow = strides[-1] == 1 and strides[0] == rows * strides[1]
        width = rows // 2 if gated else rows
        return cls(num_experts, depth, width, gated, element_size, descriptors, rows_follow=follow)

    @property
    def specialized(self) -> Schedule:
        """The schedule with specialised warps that is planned for this shape, where it is for it."""
        return Schedule.specialized(gated=self.gated, split_k=self.depth >= SPLIT_DEPTH)

    def unlike_specialized(self) -> tuple[str, ...]:
        """What of this shape the schedule with specialised warps is not for."""
        schedule = self.specialized
        found = {
            f"in {self.element_size} bytes": self.element_size != 2,
            "not through descriptors": not self.descriptors,
            f"of {self.num_experts} experts": not 0 < self.num_experts <= SPECIALIZED_EXPERTS,
            "of weight rows that do not follow one another": not self.rows_follow,
            f"{self.depth} deep": self.depth == 0 or self.depth % schedule.block_k != 0,
            f"{self.width} wide": self.width % schedule.block_n != 0,
        }
        return tuple(words for words, holds in found.items() if holds)


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Schedules of GEMMs that share one routing, and the largest row count N = T*K they are for (None: any)."""

    max_rows: int | None
    schedules: tuple[Schedule, ...]

    def __str__(self) -> str:
        bound = "more rows" if self.max_rows is None else f"up to {self.max_rows} rows"
        return f"{bound}: {' and '.join(map(str, self.schedules))}"


TMA_ALIGNMENT = 16  # bytes, of a tensor's begin and of all its strides but the last


def is_transposed(strides: tuple[int | None, ...]) -> bool:
    """Whether not the last but the dimension before it is consecutive in memory, in a tensor of any shape [E, J, H]."""
    return strides[-1] != 1 and strides[-2] == 1


def tma_refusal(
    name: str, sizes: tuple[int | None, ...], *, strides: tuple[int | None, ...], element_size: int
) -> Reason | None:
    """Why a tensor of any shape [E, J, H] cannot be read through a tensor descriptor, or None.

    One with three dimensions, a weight, may be transposed. None among the sizes: symbolic; among the strides: not
    known to be a multiple of 16 bytes.
    """
    if len(strides) == 3 and is_transposed(strides):
        sizes, strides = (sizes[0], sizes[2], sizes[1]), (strides[0], strides[2], strides[1])
    if strides[-1] != 1:
        return Reason(ReasonCode.LAYOUT, f"rows of {name} are not consecutive in memory, strides {strides}")
    for size, stride in zip(sizes[:-1], strides[:-1], strict=True):
        if stride is None or stride * element_size % TMA_ALIGNMENT:
            return Reason(
                ReasonCode.ALIGNMENT, f"strides {strides} of {name}, not all multiples of {TMA_ALIGNMENT} bytes"
            )
        if stride == 0 and size != 1:
            return Reason(ReasonCode.LAYOUT, f"rows of {name} lie on one another, strides {strides}")
    return None
