"""The exchanges of a call in parts, in the order that `overlap` describes: through memory, or through collectives."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .collectives import added_in_order, exchange
from .overlap import begin_op, collect_op, rows_op, send_op
from .tokens import Route, gathered


class Parts(ABC):
    """The peers' tokens part by part, and the peers' sums for this rank's tokens; its own do not travel.

    hidden [T, H] floating and details [T, D] int are given to all ranks when this is made: by each of them, C =
    `capacity` places for each rank. Part p holds the tokens [p * C / parts, (p + 1) * C / parts) of every peer, in the
    order of the ranks. Sums travel in the dtype of the hidden states and are added up in fp32 or wider, in the order of
    the ranks and with the own one, which was not rounded, at its place: by the same code wherever they came through, so
    that memory and collectives give the same bits.

    own_TD  the details [T, D] of this rank's tokens: what is made of them comes after the beginning of the exchange
    parts   how many there are: none on a single rank
    """

    own_TD: Tensor

    def __init__(
        self, hidden_TH: Tensor, details_TD: Tensor, *, rank: int, capacity: int, parts: int, route: Route
    ) -> None:
        self.hidden_TH, self.rank, self.capacity, self.route = hidden_TH, rank, capacity, route
        self.peers = [other for other in range(route.size) if other != rank]
        self.parts = parts if self.peers else 0
        self._cut = parts
        self.num_rows = len(self.peers) * capacity // parts
        self._start(details_TD)

    @abstractmethod
    def _start(self, details_TD: Tensor) -> None: ...

    def _part(self, tensor_RX: Tensor, part: int) -> Tensor:
        """The rows [X, ...] of a part from those of all ranks, [R, ...], any dtype."""
        of_ranks = tensor_RX.unflatten(0, (self.route.size, self._cut, -1))
        return torch.cat([of_ranks[peer, part] for peer in self.peers])

    @abstractmethod
    def rows(self, part: int, *, after: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part; not before `after`, [...] any, is there."""

    @abstractmethod
    def send(self, sums_XH: Tensor, part: int, *, mark: Tensor) -> Tensor:
        """Give back the sums [X, H] of a part, in the dtype of the hidden states.

        Returns `mark`, a small tensor [...] of any dtype, for what has to come later.
        """

    @abstractmethod
    def _collect(self, after: Tensor) -> Tensor:
        """The sums of the peers for this rank's places, [peers * C, H], not before `after`, [...] any, is there."""

    def collect(self, own_TH: Tensor, *, after: Tensor) -> Tensor:
        """The sums of all ranks for this one's tokens, [T, H] in the dtype of the hidden states.

        own [T, H], fp32 or wider, the sum of this rank's own experts; `after` as in `rows`.
        """
        tokens_T = torch.arange(self.hidden_TH.shape[0], device=own_TH.device)  # a slice has a graph of its own if full
        back_RH = self._collect(after)
        sums = [back_RH.index_select(0, tokens_T + number * self.capacity) for number in range(len(self.peers))]
        sums.insert(self.rank, own_TH)
        return added_in_order(sums).to(self.hidden_TH.dtype)


class PartsOfMemory(Parts):
    """Copies beside the GEMMs, through symmetric memory."""

    def _start(self, details_TD: Tensor) -> None:
        key = self._key = str(self.route.workspace)
        self.details_RD = begin_op(self.hidden_TH, details_TD, self.capacity, self._cut, self.route.size, key)
        own_CD = self.details_RD.unflatten(0, (self.route.size, self.capacity))[self.rank]
        self.own_TD = own_CD.index_select(0, torch.arange(details_TD.shape[0], device=details_TD.device))

    def rows(self, part: int, *, after: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part; not before `after`, [...] any, is there."""
        return rows_op(after, self.hidden_TH, part, self.num_rows, self._key), self._part(self.details_RD, part)

    def send(self, sums_XH: Tensor, part: int, *, mark: Tensor) -> Tensor:
        """Give back the sums [X, H] of a part, in the dtype of the hidden states; returns `mark`."""
        return send_op(sums_XH, mark, part, self._key)  # type: ignore[no-any-return]

    def _collect(self, after: Tensor) -> Tensor:
        return collect_op(after, self.hidden_TH, len(self.peers) * self.capacity, self._key)  # type: ignore[no-any-return]


class PartsOfCollectives(Parts):
    """The same parts one after the other, where ranks share no memory; bitwise the same."""

    def _start(self, details_TD: Tensor) -> None:
        self.own_TD = details_TD
        self.hidden_RH, self.details_RD = gathered([self.hidden_TH, details_TD], self.capacity, route=self.route)
        self._sent: list[Tensor] = []

    def rows(self, part: int, *, after: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [X, H] floating and details [X, D] int of a part."""
        return self._part(self.hidden_RH, part), self._part(self.details_RD, part)

    def send(self, sums_XH: Tensor, part: int, *, mark: Tensor) -> Tensor:
        """Give back the sums [X, H] of a part, in the dtype of the hidden states; returns `mark`."""
        splits = [self.capacity // self._cut] * self.route.size
        splits[self.rank] = 0
        self._sent.append(exchange(sums_XH, splits, send=splits, group=self.route.group))
        return mark

    def _collect(self, after: Tensor) -> Tensor:
        if not self.peers:
            return self.hidden_RH[:0]
        parts = [sent.unflatten(0, (len(self.peers), -1)) for sent in self._sent]
        return torch.cat(parts, dim=1).flatten(0, 1)
