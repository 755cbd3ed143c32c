"""A layer's exchanges in parts, each beside expert GEMMs that do not need it, through a `Workspace`.

Half of the work of two ranks, and less of more, is on tokens that need not travel: a rank's own. So a call is, on every
rank: `begin`; the first GEMM of the own tokens, while the peers' rows arrive; for each part of the peers' tokens
`rows_of`, their experts, `send`; the second GEMM of the own tokens, while the last sums come back; `collect`. Weights
are read once for the own tokens and once for each part. Peers' rows are copied on a stream of their own by plain
copies, which the copy engines make: kernels of a collective would wait for the multiprocessors that a GEMM with one
program on each of them holds, or make it wait. For that reason what a kernel does, writing into the buffer and the
barriers, is on the stream of the GEMMs.

Why that is right. Every part has a place of its own in the buffer, as have the tokens. The barrier in `begin` comes
after every rank's tokens are written, the one in `send` after every rank's sums of that part; the copies come after
these. `collect` comes after all copies of this rank, and its barrier after those of all ranks: like an exchange of the
`Workspace`, a call finds the buffer free and leaves it free. What is under way is the workspace's and not the graph's,
so no compiler sees a tensor that is still being written; each op takes a result of what comes before it, and what comes
next one of it (`send` hands on a small tensor for that alone), so none is moved within a call. Calls that do not depend
on one another keep the order of the program, as all exchanges do (`order_pass`); `Workspace` refuses a program that
interleaves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowering.ops._library import ORDERING_OPS

from .exchange_ops import NAMESPACE, define
from .symmetric import Workspace, offsets_of, workspace_of


def bytes_in_parts(capacity: int, row_bytes: int, *, top_k: int, size: int) -> int:
    """What a call needs of a workspace at most: tokens, ids and weights, and sums of all peers' tokens."""
    parts = ((capacity, row_bytes), (capacity, 16 * top_k), ((size - 1) * capacity, row_bytes))
    spare = 64 * 256  # parts begin at multiples of 256 bytes
    return offsets_of([(sizes, torch.uint8) for sizes in parts])[1] + spare


class Flight:
    """What is under way of one call: the rows of each part of the peers' tokens, and the sums that come back.

    rows      a tensor [peers * C / parts, H] for each part, in the dtype of the hidden states
    back      [peers, C, H], the peers' sums for this rank's tokens
    arrivals  an event behind the copies of each of the rows, then of each part of the sums
    """

    def __init__(self, space: Workspace, hidden_TH: Tensor, details_TD: Tensor, *, capacity: int, parts: int) -> None:
        self.space, self.handle = space, space.handle
        self.rank, self.size = space.handle.rank, space.handle.world_size
        self.peers = [rank for rank in range(self.size) if rank != self.rank]
        self.count, self.parts = capacity // parts, parts  # tokens of a rank in a part
        self.side = torch.cuda.Stream() if hidden_TH.is_cuda else None
        hidden, dtype = hidden_TH.shape[1], hidden_TH.dtype
        self.tokens = ((capacity, hidden), dtype)
        self.details = ((capacity, details_TD.shape[1]), details_TD.dtype)
        self.sums = ((len(self.peers) * self.count, hidden), dtype)
        self.offsets = space.offsets([self.tokens, self.details, *[self.sums] * parts])
        self.rows = [hidden_TH.new_empty(self.sums[0]) for _ in range(parts)]
        self.back = hidden_TH.new_empty(len(self.peers), capacity, hidden)
        self.arrivals: list[Any] = []

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Work that begins after what the current stream has by now, and does not hold up what comes after."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield

    def mark(self) -> Any:
        """An event behind what the side stream has by now; None on a CPU."""
        if self.side is None:
            return None
        event = torch.cuda.Event()
        event.record(self.side)
        return event

    def arrived(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def view(self, rank: int, number: int) -> Tensor:
        """A part of a rank's buffer, [X, Y] in its dtype: tokens, details, then sums of each part."""
        sizes, dtype = (self.tokens, self.details, self.sums)[min(number, 2)]
        return self.space.view(rank, sizes, dtype=dtype, offset=self.offsets[number])

    def span(self, number: int) -> slice:
        """The `number`-th run of as many rows as a rank has in a part."""
        return slice(number * self.count, (number + 1) * self.count)


def begin(space: Workspace, hidden_TH: Tensor, details_TD: Tensor, *, capacity: int, parts: int) -> Tensor:
    """Give tokens to the peers: hidden [T, H] floating; returns the details [ranks * C, D] int of all, C = capacity.

    The details of places without a token are zeros; their hidden states are whatever was there.
    """
    space.check_free()
    flight = Flight(space, hidden_TH, details_TD, capacity=capacity, parts=parts)
    own, own_details, tokens = flight.view(flight.rank, 0), flight.view(flight.rank, 1), hidden_TH.shape[0]
    own[:tokens].copy_(hidden_TH)
    own_details[:tokens].copy_(details_TD)
    own_details[tokens:].zero_()
    flight.handle.barrier()
    with flight.beside():
        for part, rows in enumerate(flight.rows):
            for number, source in enumerate(flight.peers):
                rows[flight.span(number)].copy_(flight.view(source, 0)[flight.span(part)])
            flight.arrivals.append(flight.mark())
    space.flight = flight
    return torch.cat([flight.view(rank, 1) for rank in range(flight.size)])


def rows_of(space: Workspace, part: int) -> Tensor:
    """The tokens of a part, peer after peer: [X, H] in their dtype, for X = peers * C / parts."""
    flight: Flight = space.flight
    flight.arrived(flight.arrivals[part])
    return flight.rows[part]


def send(space: Workspace, sums_XH: Tensor, *, part: int) -> None:
    """Give sums of a part, [X, H] in the dtype of the tokens for X = peers * C / parts, back to the ranks of these."""
    flight: Flight = space.flight
    flight.view(flight.rank, 2 + part).copy_(sums_XH)  # on this stream: they may be gone by the time of the other
    flight.handle.barrier()
    with flight.beside():
        for number, source in enumerate(flight.peers):
            place = flight.rank - (source < flight.rank)  # of this rank among the peers of that one
            flight.back[number, flight.span(part)].copy_(flight.view(source, 2 + part)[flight.span(place)])
    flight.arrivals.append(flight.mark())


def collect(space: Workspace) -> Tensor:
    """The sums of all peers for this one's places, [R, H] in the dtype of the tokens, for R = peers * C."""
    flight: Flight = space.flight
    for event in flight.arrivals[flight.parts :]:
        flight.arrived(event)
    flight.handle.barrier()
    space.flight = None
    return flight.back.flatten(0, 1)


def _begin_op(hidden: Tensor, details: Tensor, capacity: int, parts: int, size: int, workspace: str) -> Tensor:
    return begin(workspace_of(workspace), hidden, details, capacity=capacity, parts=parts)


def _begin_fake(hidden: Tensor, details: Tensor, capacity: int, parts: int, size: int, workspace: str) -> Tensor:
    return details.new_empty(size * capacity, details.shape[1])


def _rows_op(after: Tensor, hidden: Tensor, part: int, rows: int, workspace: str) -> Tensor:
    return rows_of(workspace_of(workspace), part)


def _rows_fake(after: Tensor, hidden: Tensor, part: int, rows: int, workspace: str) -> Tensor:
    return hidden.new_empty(rows, hidden.shape[1])


def _send_op(sums: Tensor, mark: Tensor, part: int, workspace: str) -> Tensor:
    send(workspace_of(workspace), sums, part=part)
    return mark.clone()


def _send_fake(sums: Tensor, mark: Tensor, part: int, workspace: str) -> Tensor:
    return torch.empty_like(mark)


def _collect_op(after: Tensor, hidden: Tensor, rows: int, workspace: str) -> Tensor:
    return collect(workspace_of(workspace))


def _collect_fake(after: Tensor, hidden: Tensor, rows: int, workspace: str) -> Tensor:
    return hidden.new_empty(rows, hidden.shape[1])


begin_op = define(
    "begin(Tensor hidden, Tensor details, int capacity, int parts, int size, str workspace) -> Tensor",
    _begin_op,
    fake=_begin_fake,
)
rows_op = define(
    "rows_of(Tensor after, Tensor hidden, int part, int rows, str workspace) -> Tensor", _rows_op, fake=_rows_fake
)
send_op = define("send(Tensor sums, Tensor mark, int part, str workspace) -> Tensor", _send_op, fake=_send_fake)
collect_op = define(
    "collect(Tensor after, Tensor hidden, int rows, str workspace) -> Tensor", _collect_op, fake=_collect_fake
)
ORDERING_OPS.update(f"{NAMESPACE}::{name}" for name in ("rows_of", "collect"))
