"""What exchanges take by the bytes that cross links, on the host and on the device, for `simulate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .symmetric import MOST_BYTES

# Seconds of the probe on the hosts that the constants of `Host` are of: the median of their rows.
REFERENCE_PROBE = 0.605e-3


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes per second that a rank sends, and receives, at the same time; seconds until an exchange gets going.

    Within a node: two H200 with 18 NVLinks between them, torch 2.11, in CUDA graphs. Between nodes nothing was
    measured: 400 Gbit/s a rank is what such clusters have by their data sheets, and the start is taken as twice as
    long.

    inside_bandwidth   of an all-to-all by NCCL (67 MB across in 257 us, 134 MB in 507)
    large_bandwidth    of what is large, behind `large_start` seconds (537 MB across in 1649 us, 1880 MB in 5650: whole
                       ways back, less what stays on the device)
    gather_bandwidth   of an all-gather, and of an all-reduce, by NCCL (67 MB in 292 us, 134 MB in 552)
    memory_bandwidth   of a peer's memory, read by a copy (67 MB in 228 us)
    inside_latency     of a collective (4 KB in 9.8 us)
    memory_latency     of an exchange through memory (4 KB in 9.0 us)
    reduce_latency     of an all-reduce (0.5 MB in 19 us)
    """

    ranks_per_node: int = 8
    inside_bandwidth: float = 265e9
    between_bandwidth: float = 50e9
    inside_latency: float = 10e-6
    between_latency: float = 20e-6
    large_bandwidth: float = 345e9
    large_start: float = 120e-6
    gather_bandwidth: float = 245e9
    memory_bandwidth: float = 295e9
    memory_latency: float = 9e-6
    reduce_latency: float = 15e-6

    def inside(self, num_bytes: float) -> float:
        """Seconds of an all-to-all that takes so many bytes across within a node, without its start."""
        return min(num_bytes / self.inside_bandwidth, self.large_start + num_bytes / self.large_bandwidth)

    def by_memory(self, ranks: int, num_bytes: float, *, most: int = MOST_BYTES) -> bool:
        """Whether ranks of one node exchange so many bytes each through memory, as the dispatcher `static` does."""
        return 1 < ranks <= self.ranks_per_node and num_bytes <= most


@dataclasses.dataclass(frozen=True)
class Host:
    """Seconds that the host takes for `naive`, which no CUDA graph holds: calls in a row wait for it or for the device.

    before    from the counts on the host until rows travel: the device has nothing to do
    dispatch  the way out alone, at least
    combine   the way back alone, at least
    call      a whole call, at least

    For a host that takes `REFERENCE_PROBE` for the probe of `benchmarks/bench_parallel.py`; `at` for another one. What
    `simulate --fit-naive` prints of the measurements on two H200.
    """

    before: float = 0.188e-3
    dispatch: float = 0.972e-3
    combine: float = 0.285e-3
    call: float = 1.64e-3

    def at(self, probe: float) -> Host:
        """The same steps on a host that takes so many seconds for the probe."""
        return Host(*(seconds * (probe / REFERENCE_PROBE) for seconds in dataclasses.astuple(self)))


def exchange_seconds(sent: Sequence[Sequence[float]], links: Links, *, starts: int = 1, gather: bool = False) -> float:
    """Seconds until sent[a][b] bytes have gone from each rank a to each rank b, in `starts` exchanges by collectives.

    Both kinds of links are busy at once, in both directions at once; the slowest rank counts.
    """
    ranks = len(sent)
    if ranks == 1:
        return 0.0
    slowest = 0.0
    for rank in range(ranks):
        near = _neighbours(rank, ranks, links)
        out_near = sum(sent[rank][other] for other in near if other != rank)
        in_near = sum(sent[other][rank] for other in near if other != rank)
        out_far = sum(sent[rank][other] for other in range(ranks) if other not in near)
        in_far = sum(sent[other][rank] for other in range(ranks) if other not in near)
        inside = max(out_near, in_near)
        times = [starts * links.inside_latency + (inside / links.gather_bandwidth if gather else links.inside(inside))]
        if len(near) < ranks:
            times.append(starts * links.between_latency + max(out_far, in_far) / links.between_bandwidth)
        slowest = max(slowest, *times)
    return slowest


def _neighbours(rank: int, ranks: int, links: Links) -> range:
    """The ranks of a rank's node, itself included."""
    first = rank - rank % links.ranks_per_node
    return range(first, min(first + links.ranks_per_node, ranks))


def to_shares(num_bytes: float, shares: Sequence[float]) -> list[list[float]]:
    """Bytes from each rank to each, where every rank sends so many, spread by the shares."""
    return [[num_bytes * share for share in shares] for _ in shares]


def reduce_seconds(num_bytes: float, ranks: int, *, links: Links) -> float:
    """Seconds of an all-reduce of so many bytes; a ring is as fast as its slowest link."""
    if ranks == 1:
        return 0.0
    across = ranks > links.ranks_per_node
    bandwidth = links.between_bandwidth if across else links.gather_bandwidth
    latency = links.reduce_latency + (links.between_latency if across else 0.0)
    return latency + 2 * (ranks - 1) / ranks * num_bytes / bandwidth
