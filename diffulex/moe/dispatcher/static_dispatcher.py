"""The dispatcher of static shapes: no size depends on the routing, the host reads nothing, nothing is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowering import ops
from lowering.errors import Reason, ReasonCode

from ...distributed.collectives import added_in_order
from ...distributed.overlap import bytes_in_parts
from ...distributed.parts import Parts, PartsOfCollectives, PartsOfMemory
from ...distributed.symmetric import MOST_BYTES, MOST_SLOT_BYTES, Workspace, offsets_of, workspace_for
from ...distributed.tokens import Route, bytes_to_ranks, packed, rows_back, slots_back, tokens_to_ranks, unpacked
from .base_dispatcher import DispatcherOutput, ExchangePlan, TokenDispatcher

if TYPE_CHECKING:
    from ..layer.experts import Begun


@dataclasses.dataclass(frozen=True)
class StaticDispatchMetadata:
    """What `combine` needs, for a capacity of C tokens a rank and R = ranks * C received rows.

    num_tokens    T tokens of this rank
    slot_ranks    [T, K] int32, the rank of each slot's expert; -1 for none
    weights       [T, K] floating
    recv_weights  [R, K] floating, with gradient
    recv_rows     [R, K] int32, the rows of this rank's experts, -1 for none
    """

    num_tokens: int
    slot_ranks: Tensor
    weights: Tensor
    recv_weights: Tensor
    recv_rows: Tensor


class StaticDispatcher(TokenDispatcher[StaticDispatchMetadata]):
    """Every token travels once per rank, whatever its experts, into a place fixed by its rank and its number.

    Capacity: a rank brings at most C = `plan.max_tokens` tokens to a call, and each rank keeps room for C of every
    rank, for all of them may choose its experts. So nothing is ever dropped; a call with more tokens is refused. As
    that room is exchanged whole, the exchange is an all-gather of [C, H]; rows of no local expert are skipped by the
    grouped GEMMs. The way back is of slots [R, K, H] (`exact`, which equals a single rank's result bitwise, as far as
    no sum follows from the rows of other experts, and so do the gradients of the experts; that of the hidden states
    adds up per rank, not per slot): all of them by a collective, through symmetric memory those alone that their rank
    has a use for. Or it is one all-to-all of sums [R, H], which are made in fp32 and rounded once to the dtype of the
    slots, and added up in fp32 again.

    Each exchange goes through symmetric memory where the ranks have it and the exchange is small enough to gain by it,
    through a collective else; `transport` says which, and why. Ranks agree on it when the dispatcher is made, by all of
    them together.

    workspace  the memory, None where no exchange goes through it
    refusals   why "dispatch" and "combine", and "parts" where there are chunks, do not, None where they do
    """

    def __init__(self, plan: ExchangePlan) -> None:
        super().__init__(plan)
        assert plan.max_tokens is not None, "ParallelConfig.check asks for max_tokens_per_rank"
        self.exact, self.chunks = plan.parallel.exact, plan.parallel.chunks
        parts = max(1, self.chunks - 1)  # of the peers' tokens
        self.capacity = -(-plan.max_tokens // parts) * parts
        self.workspace, self.refusals = self._reserve()

    def _reserve(self) -> tuple[Workspace | None, dict[str, Reason | None]]:
        """The memory for the exchanges that are small enough, of what the plan says that tokens will be."""
        row_bytes = self.plan.row_bytes
        if row_bytes is None:
            unknown = Reason(ReasonCode.OPTION, "the plan does not say how large a token is")
            return None, dict.fromkeys(("dispatch", "combine", *self._in_parts), unknown)
        needs = {"dispatch": bytes_to_ranks(self.capacity, row_bytes, top_k=self.plan.top_k)}
        rows = self.size * self.capacity * (self.plan.top_k if self.exact else 1)
        needs["combine"] = offsets_of([((rows, row_bytes), torch.uint8)])[1]
        most = {"dispatch": MOST_BYTES, "combine": MOST_SLOT_BYTES if self.exact else MOST_BYTES}
        refusals = {
            name: Reason(ReasonCode.SCHEDULE, f"a collective is for {need} bytes") if need > most[name] else None
            for name, need in needs.items()
        }
        for name in self._in_parts:  # they gain by what overlaps, however many bytes there are
            needs[name] = bytes_in_parts(self.capacity, row_bytes, top_k=self.plan.top_k, size=self.size)
            refusals[name] = None
        while wanted := {name: need for name, need in needs.items() if refusals[name] is None}:
            largest = max(wanted.values())
            found = workspace_for(self.plan.parallel.group, self.plan.parallel.mesh.device_type, num_bytes=largest)
            if not isinstance(found, Reason):
                return found, refusals
            # there may be memory for the others: on all ranks, which were told the same reason
            refusals |= {name: found for name, need in wanted.items() if need == largest}
        return None, refusals

    @property
    def _in_parts(self) -> tuple[str, ...]:
        return ("parts",) if self.chunks > 1 else ()

    @property
    def transport(self) -> str:
        """How exchanges travel, and why not through symmetric memory where they do not."""
        return "; ".join(
            f"{name} by {'symmetric memory' if reason is None else f'collectives ({reason})'}"
            for name, reason in self.refusals.items()
        )

    def _route(self, name: str, needed: int) -> Route:
        """Through the memory where the plan reserved it and it is large enough for the call, which all ranks make."""
        space = self.workspace
        through = space is not None and self.refusals[name] is None and needed <= space.num_bytes
        return Route(self.group, self.size, space.key if space is not None and through else None)

    def _dispatch(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatcherOutput[StaticDispatchMetadata]:
        slot_ranks_TK, slot_rows_TK = self._chosen(self._known(ids_TK))
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        recv_RH, weights_RK, places_RK = tokens_to_ranks(
            hidden_TH,
            weights_TK.detach() if self.exact else weights_TK,  # applied where they are; what travels is for the record
            self._places(slot_ranks_TK, slot_rows_TK),
            capacity=self.capacity,
            route=self._route("dispatch", bytes_to_ranks(self.capacity, row_bytes, top_k=self.plan.top_k)),
        )
        rows_RK = self._rows(places_RK)
        metadata = StaticDispatchMetadata(hidden_TH.shape[0], slot_ranks_TK, weights_TK, weights_RK, rows_RK)
        return DispatcherOutput(metadata, recv_RH, rows_RK, weights_RK)

    def _places(self, ranks_TK: Tensor, rows_TK: Tensor) -> Tensor:
        """What travels of a choice: the number of a row among those of all ranks, and one more, for zeros are none."""
        return torch.where(rows_TK >= 0, ranks_TK * self.most_rows + rows_TK + 1, 0)

    def _rows(self, places_RK: Tensor) -> Tensor:
        """Rows of this rank's weights [R, K] int32, -1 for none."""
        first = self.rank * self.most_rows + 1
        inside_RK = (places_RK >= first) & (places_RK < first + self.most_rows)
        return torch.where(inside_RK, places_RK - first, -1).int()

    def run_in_parts(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, first: Callable[[Tensor, Tensor], Begun]
    ) -> Tensor:
        """`dispatch`, experts and `combine` in parts: this rank's own tokens, and chunks - 1 parts of the peers'.

        hidden [T, H] floating, ids [T, K] int, weights [T, K] floating; `first` begins with the slots [X * K, H] of
        rows [X, H] and ids [X, K] int32. `overlap` says what comes in which order, and why. Returns [T, H] in the dtype
        of hidden; not differentiable. Errors as `dispatch`.
        """
        if self._pending is not None:
            raise self._out_of_order("run_in_parts", "`combine` of the tokens dispatched before")
        self._check(hidden_TH, ids_TK, weights_TK)
        exchange = self._parts(hidden_TH, packed(self._places(*self._chosen(self._known(ids_TK))), weights_TK))
        places_TK, _ = unpacked(exchange.own_TD, weights_TK.dtype)
        rows_TK = self._rows(places_TK)
        own = first(hidden_TH, rows_TK)
        after, mark = own.done, own.mark
        for part in range(exchange.parts):
            rows_XH, details_XD = exchange.rows(part, after=after)
            places_XK, weights_XK = unpacked(details_XD, weights_TK.dtype)
            rows_XK = self._rows(places_XK)
            theirs = first(rows_XH, rows_XK)
            sums_XH = self._sums(theirs.rest(theirs.mark), weights_XK, rows_XK)
            after = mark = exchange.send(sums_XH, part, mark=mark)
        slots_NH = own.rest(mark)
        wide = torch.promote_types(slots_NH.dtype, torch.float32)  # compiled code converts what it loads
        return exchange.collect(self._sums(slots_NH.to(wide), weights_TK, rows_TK), after=slots_NH)

    def _sums(self, slots_NH: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
        """The weighted sums of this rank's experts; told which these are, compiled code leaves the other slots out."""
        return ops.moe_combine(slots_NH, weights_TK, rows_TK, self.num_local_experts)

    def _parts(self, hidden_TH: Tensor, details_TD: Tensor) -> Parts:
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        needed = bytes_in_parts(self.capacity, row_bytes, top_k=self.plan.top_k, size=self.size)
        route = self._route("parts", needed)
        kind = PartsOfMemory if route.workspace is not None else PartsOfCollectives
        return kind(hidden_TH, details_TD, rank=self.rank, capacity=self.capacity, parts=self.chunks - 1, route=route)

    def _num_slots(self, metadata: StaticDispatchMetadata) -> int:
        return self.size * self.capacity * self.plan.top_k

    def _combine(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        return self._of_slots(slots_NH, metadata) if self.exact else self._of_sums(slots_NH, metadata)

    def _route_back(self, rows: Tensor) -> Route:
        return self._route("combine", rows.shape[0] * rows.shape[1] * rows.element_size())

    def _of_slots(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        """Each slot's result from the rank of its expert, and zeros where there is none."""
        ranks_N = metadata.slot_ranks.reshape(-1)
        slot_N = torch.arange(ranks_N.shape[0], device=ranks_N.device)
        place_N = torch.where(ranks_N >= 0, ranks_N.long() * (self.capacity * self.plan.top_k) + slot_N, -1)
        back_NH = slots_back(slots_NH, place_N, route=self._route_back(slots_NH))
        return ops.moe_combine(back_NH, metadata.weights)

    def _of_sums(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        """A sum per token and rank, rounded once, added up in the order of the ranks in fp32 or wider."""
        sums_RH = self._sums(slots_NH, metadata.recv_weights, metadata.recv_rows)
        sums_CH = added_in_order(rows_back(sums_RH, self._route_back(sums_RH)).chunk(self.size))
        tokens_T = torch.arange(metadata.num_tokens, device=sums_CH.device)  # a slice has a graph of its own when full
        return sums_CH.index_select(0, tokens_T).to(slots_NH.dtype)
