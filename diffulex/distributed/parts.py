"""The exchanges of a call in parts, in the order that `overlap` describes: through memory, or through collectives."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .collectives import added_in_order
from .overlap import begin_op, collect_op, rows_op, send_op
from .tokens import Route, gathered, rows_back


class Parts(ABC):
    """Tokens of all ranks part by part, and their sums back.

    hidden [T, H] floating and details [T, D] int are given to all ranks when this is made: by each of them, C =
    `capacity` places for each rank. Part p holds the tokens [p * C / chunks, (p + 1) * C / chunks) of every rank.
    """

    def __init__(self, hidden_TH: Tensor, details_TD: Tensor, *, capacity: int, chunks: int, route: Route) -> None:
        self.hidden_TH, self.capacity, self.chunks, self.route = hidden_TH, capacity, chunks, route
        self.num_rows = route.size * capacity // chunks
        self.sent: list[Tensor] = []
        self._start(details_TD)

    @abstractmethod
    def _start(self, details_TD: Tensor) -> None: ...

    def part(self, tensor_RX: Tensor, chunk: int) -> Tensor:
        """The rows [X, ...] of a part from those of all, [R, ...], any dtype."""
        return tensor_RX.unflatten(0, (self.route.size, self.chunks, -1))[:, chunk].flatten(0, 1)

    @abstractmethod
    def rows(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part."""

    @abstractmethod
    def send(self, sums_XH: Tensor, chunk: int) -> None:
        """Give back the sums [X, H] of a part, fp32 or wider."""

    @abstractmethod
    def collect(self) -> Tensor:
        """The sums of all ranks for this one's places, [C, H] in the floating dtype of the hidden states."""


class PartsOfMemory(Parts):
    """Copies beside the GEMMs, through symmetric memory."""

    def _start(self, details_TD: Tensor) -> None:
        key = self._key = str(self.route.workspace)
        self.details_RD = begin_op(self.hidden_TH, details_TD, self.capacity, self.chunks, self.route.size, key)

    def rows(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part."""
        after = self.sent[-1] if self.sent else self.details_RD
        rows_XH = rows_op(after, self.hidden_TH, chunk, self.num_rows, self._key)
        return rows_XH, self.part(self.details_RD, chunk)

    def send(self, sums_XH: Tensor, chunk: int) -> None:
        """Give back the sums [X, H] of a part, fp32 or wider."""
        self.sent.append(send_op(sums_XH, chunk, self.route.size, self._key))

    def collect(self) -> Tensor:
        """The sums of all ranks for this one's places, [C, H] in the floating dtype of the hidden states."""
        return collect_op(  # type: ignore[no-any-return]
            self.sent, self.hidden_TH, self.capacity, self.route.size, self._key
        )


class PartsOfCollectives(Parts):
    """The same parts one after the other, where ranks share no memory; bitwise the same."""

    def _start(self, details_TD: Tensor) -> None:
        self.hidden_RH, self.details_RD = gathered([self.hidden_TH, details_TD], self.capacity, route=self.route)

    def rows(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part."""
        return self.part(self.hidden_RH, chunk), self.part(self.details_RD, chunk)

    def send(self, sums_XH: Tensor, chunk: int) -> None:
        """Give back the sums [X, H] of a part, fp32 or wider."""
        self.sent.append(added_in_order(rows_back(sums_XH, self.route).chunk(self.route.size)))

    def collect(self) -> Tensor:
        """The sums of all ranks for this one's places, [C, H] in the floating dtype of the hidden states."""
        return torch.cat(self.sent).to(self.hidden_TH.dtype)
