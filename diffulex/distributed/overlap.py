"""A layer's exchanges in parts, each beside the expert GEMMs of another part, through a `Workspace`.

A call is one sequence on every rank: `begin`, then for each part `rows_of`, the experts, `send`, and in the end
`collect`. Peers' rows are copied on a stream of their own by plain copies, which the copy engines make: kernels of a
collective would wait for the multiprocessors that a GEMM with one program on each of them holds, or make it wait.

Why that is right. Every part has a place of its own in the buffer, as have the tokens. The barrier in `begin` comes
after every rank's tokens are written, the one in `send` after every rank's sums of that part; the copies come after
these. `collect` comes after all copies of this rank, and its barrier after those of all ranks: like an exchange of the
`Workspace`, a call finds the buffer free and leaves it free. What is under way is the workspace's and not the graph's,
so no compiler sees a tensor that is still being written; each op takes a result of the one before it, so none is moved
within a call. Calls that do not depend on one another may be interleaved by a compiler; `Workspace` refuses those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .symmetric import Workspace, offsets_of, workspace_of

_LIBRARY = torch.library.Library("diffulex_ranks", "FRAGMENT")
_LIBRARY.define("begin(Tensor hidden, Tensor details, int capacity, int chunks, int size, str workspace) -> Tensor")
_LIBRARY.define("rows_of(Tensor after, Tensor hidden, int chunk, int rows, str workspace) -> Tensor")
_LIBRARY.define("send(Tensor sums, int chunk, int size, str workspace) -> Tensor")
_LIBRARY.define("collect(Tensor[] sent, Tensor hidden, int capacity, int size, str workspace) -> Tensor")


def bytes_in_parts(capacity: int, row_bytes: int, *, top_k: int, size: int) -> int:
    """What a call needs of a workspace at most: tokens, ids and weights, and sums of all tokens of at least fp32."""
    parts = ((capacity, row_bytes), (capacity, 16 * top_k), (size * capacity, 2 * row_bytes))
    spare = 64 * 256  # parts begin at multiples of 256 bytes
    return offsets_of([(sizes, torch.uint8) for sizes in parts])[1] + spare


class Flight:
    """What is under way of one call: the rows of each part that arrive, and the sums that come back."""

    def __init__(self, space: Workspace, hidden_TH: Tensor, details_TD: Tensor, *, capacity: int, chunks: int) -> None:
        self.space, self.handle = space, space.handle
        self.rank, self.size = space.handle.rank, space.handle.world_size
        self.count, self.chunks = capacity // chunks, chunks  # tokens of a rank in a part
        self.side = torch.cuda.Stream() if hidden_TH.is_cuda else None
        self.hidden, wide = hidden_TH.shape[1], torch.promote_types(hidden_TH.dtype, torch.float32)
        self.tokens = ((capacity, self.hidden), hidden_TH.dtype)
        self.details = ((capacity, details_TD.shape[1]), details_TD.dtype)
        self.sums = ((self.size * self.count, self.hidden), wide)
        self.offsets = space.offsets([self.tokens, self.details, *[self.sums] * chunks])
        self.rows: list[Tensor] = []
        self.back: list[Tensor] = []
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


def begin(space: Workspace, hidden_TH: Tensor, details_TD: Tensor, *, capacity: int, chunks: int) -> Tensor:
    """Give tokens to all ranks: hidden [T, H] floating; returns the details [ranks * C, D] int of all, C = capacity."""
    space.check_free()
    flight = Flight(space, hidden_TH, details_TD, capacity=capacity, chunks=chunks)
    for number, tensor in enumerate((hidden_TH, details_TD)):
        own, tokens = flight.view(flight.rank, number), tensor.shape[0]
        own[:tokens].copy_(tensor)
        if tokens < capacity:
            own[tokens:].zero_()
    flight.handle.barrier()
    every = range(flight.size)
    flight.rows = [hidden_TH.new_empty(flight.sums[0]) for _ in range(chunks)]
    with flight.beside():
        for chunk, rows in enumerate(flight.rows):
            for source, part in zip(every, rows.chunk(flight.size), strict=True):
                part.copy_(flight.view(source, 0)[chunk * flight.count : (chunk + 1) * flight.count])
            flight.arrivals.append(flight.mark())
    space.flight = flight
    return torch.cat([flight.view(rank, 1) for rank in every])


def rows_of(space: Workspace, chunk: int) -> Tensor:
    """The tokens of a part, rank after rank: [X, H] in their dtype, for X = ranks * C / chunks."""
    flight: Flight = space.flight
    flight.arrived(flight.arrivals[chunk])
    return flight.rows[chunk]


def send(space: Workspace, sums_XH: Tensor, *, chunk: int) -> None:
    """Give sums of a part, [X, H] fp32 or wider for X = ranks * C / chunks, back to the ranks of their tokens."""
    flight: Flight = space.flight
    rank, count = flight.rank, flight.count
    start, stop = rank * count, (rank + 1) * count
    own, back = flight.view(rank, 2 + chunk), torch.empty_like(sums_XH)
    own[:start].copy_(sums_XH[:start])
    own[stop:].copy_(sums_XH[stop:])
    back[start:stop].copy_(sums_XH[start:stop])  # on this stream: the sums may be gone by the time of the other
    flight.handle.barrier()
    with flight.beside():
        for source in range(flight.size):
            if source != rank:
                back[source * count : (source + 1) * count].copy_(flight.view(source, 2 + chunk)[start:stop])
    flight.back.append(back)
    flight.arrivals.append(flight.mark())


def collect(space: Workspace, *, dtype: torch.dtype) -> Tensor:
    """The sums of all ranks for this one's tokens, added up in the order of the ranks: [C, H] in a floating dtype."""
    flight: Flight = space.flight
    out = flight.back[0].new_empty(flight.tokens[0], dtype=dtype)
    for back, part, event in zip(flight.back, out.split(flight.count), flight.arrivals[flight.chunks :], strict=True):
        flight.arrived(event)
        first, *others = back.chunk(flight.size)
        for other in others[:-1]:
            first = first + other
        part.copy_(first) if not others else torch.add(first, others[-1], out=part)
    flight.handle.barrier()
    space.flight = None
    return out


def _begin_op(hidden: Tensor, details: Tensor, capacity: int, chunks: int, size: int, workspace: str) -> Tensor:
    return begin(workspace_of(workspace), hidden, details, capacity=capacity, chunks=chunks)


def _begin_fake(hidden: Tensor, details: Tensor, capacity: int, chunks: int, size: int, workspace: str) -> Tensor:
    return details.new_empty(size * capacity, details.shape[1])


def _rows_op(after: Tensor, hidden: Tensor, chunk: int, rows: int, workspace: str) -> Tensor:
    return rows_of(workspace_of(workspace), chunk)


def _rows_fake(after: Tensor, hidden: Tensor, chunk: int, rows: int, workspace: str) -> Tensor:
    return hidden.new_empty(rows, hidden.shape[1])


def _send_op(sums: Tensor, chunk: int, size: int, workspace: str) -> Tensor:
    send(workspace_of(workspace), sums, chunk=chunk)
    return sums.new_empty(0)


def _send_fake(sums: Tensor, chunk: int, size: int, workspace: str) -> Tensor:
    return sums.new_empty(0)


def _collect_op(sent: Sequence[Tensor], hidden: Tensor, capacity: int, size: int, workspace: str) -> Tensor:
    return collect(workspace_of(workspace), dtype=hidden.dtype)


def _collect_fake(sent: Sequence[Tensor], hidden: Tensor, capacity: int, size: int, workspace: str) -> Tensor:
    return hidden.new_empty(capacity, hidden.shape[1])


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "begin": (_begin_op, _begin_fake),
    "rows_of": (_rows_op, _rows_fake),
    "send": (_send_op, _send_fake),
    "collect": (_collect_op, _collect_fake),
}
for _name, (_function, _fake) in _OPS.items():
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffulex_ranks::{_name}", _fake, lib=_LIBRARY)

begin_op: Any = torch.ops.diffulex_ranks.begin.default
rows_op: Any = torch.ops.diffulex_ranks.rows_of.default
send_op: Any = torch.ops.diffulex_ranks.send.default
collect_op: Any = torch.ops.diffulex_ranks.collect.default
