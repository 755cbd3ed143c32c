"""The contract of token dispatchers: `dispatch`, then the experts, then `combine`; the order is enforced."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lowering._checks import check_device, check_float, check_int, check_shape
from lowering.errors import MoERangeError, MoEStageError

from ...distributed.parallel import ParallelConfig
from ...distributed.placement import ExpertPlacement
from ...distributed.static_sizes import mark_static
from ..metadata import DispatcherStage

M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """What a dispatcher is made for.

    parallel        the group, capacity and exactness
    num_experts     E of the model
    top_k           K of every call
    max_tokens      most tokens of one call, None for any number
    rows_per_token  what the caller makes of a token before `dispatch`: more than one where slots travel as tokens
    row_bytes       bytes of the hidden states of one row, None if not known: then "static" sets no memory aside
    """

    parallel: ParallelConfig
    num_experts: int
    top_k: int
    max_tokens: int | None = None
    rows_per_token: int = 1
    row_bytes: int | None = None

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of each rank."""
        return self.parallel.experts_of(self.num_experts)


@dataclasses.dataclass(frozen=True)
class DispatcherOutput(Generic[M]):
    """What a rank received: R rows, each with k expert ids (1 or K, by backend).

    metadata               for `combine`
    recv_hidden_states     [R, H] floating
    recv_local_expert_ids  [R, k] int32, rows of this rank's weights; outside [0, E of this rank) means none
    recv_weights           [R, k] floating, the weights of those slots; `combine` applies them, the experts do not
    """

    metadata: M
    recv_hidden_states: Tensor
    recv_local_expert_ids: Tensor
    recv_weights: Tensor


class TokenDispatcher(ABC, Generic[M]):
    """Sends tokens to the ranks of their experts (`dispatch`) and the experts' results back (`combine`), in turns.

    Every rank of the group takes part in every call, with or without tokens. Slots whose id is no expert go nowhere
    and contribute nothing. Differentiable, unless a backend says otherwise; then every rank asks for gradients or none.
    """

    def __init__(self, plan: ExchangePlan) -> None:
        parallel, placement = plan.parallel, plan.placement
        self.plan = plan
        self.group, self.size, self.rank = parallel.group.group_name, parallel.size, parallel.rank
        self.num_experts, self.num_local_experts = plan.num_experts, len(placement.owned[self.rank])
        device = parallel.mesh.device_type  # said here: the layer may be made on the meta device
        ranks, rows = placement.ranks_of(self.num_experts, self.rank), placement.rows_of(self.num_experts)
        self.most_rows, most = max(map(len, placement.owned)), max(map(len, ranks))
        self.num_copies = torch.tensor([len(of_expert) for of_expert in ranks], device=device)
        padded = [[*of_expert, *of_expert[:1] * (most - len(of_expert))] for of_expert in ranks]
        self.ranks_of_expert = torch.tensor(padded, dtype=torch.int32, device=device)
        self.rows_of_expert = torch.tensor(rows, dtype=torch.int32, device=device)
        mark_static(self.num_copies, self.ranks_of_expert, self.rows_of_expert)
        # Two attributes instead of one stage: what a call reads is the same before every call, so compiled code stays.
        self._pending: M | None = None
        self._combined = False

    @property
    def stage(self) -> DispatcherStage:
        """INITIAL before the first call, DISPATCHED while results are owed, COMBINED after they were given back."""
        if self._pending is not None:
            return DispatcherStage.DISPATCHED
        return DispatcherStage.COMBINED if self._combined else DispatcherStage.INITIAL

    @property
    def transport(self) -> str:
        """How tokens travel, for people."""
        return "collectives"

    def dispatch(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> DispatcherOutput[M]:
        """Send tokens to their experts: hidden [T, H] floating, ids [T, K] int32 or int64, weights [T, K] floating.

        Raises `MoEStageError` while results of another `dispatch` are owed, `MoEShapeError`, `MoEDtypeError` or
        `MoEDeviceError` where the tensors do not fit one another, `MoERangeError` for more tokens than
        `plan.max_tokens`. All before anything is sent: the other ranks then wait for this one.
        """
        if self._pending is not None:
            raise self._out_of_order("dispatch", "`combine` of the tokens dispatched before")
        self._check(hidden_TH, ids_TK, weights_TK)
        output = self._dispatch(hidden_TH, ids_TK, weights_TK)
        self._pending = output.metadata
        return output

    def combine(self, slots_NH: Tensor, metadata: M) -> Tensor:
        """Send results back: the weighted sum of each token's experts, [T, H] in the dtype of the slots.

        slots [R * k, H] floating: results of the experts without weights, k for each received row, in order.
        metadata: that of the `dispatch` before. Raises `MoEStageError` for another one, or none, and `MoEShapeError`,
        `MoEDtypeError` or `MoEDeviceError` for other slots than that call asked for; results are owed as before.
        """
        if self._pending is None:
            raise self._out_of_order("combine", "`dispatch`")
        if metadata is not self._pending:
            raise self._out_of_order("combine", "the metadata of the last `dispatch`")
        where = f"{type(self).__name__}.combine"
        check_shape(where, "slots", slots_NH, (self._num_slots(metadata), None))
        check_float(where, "slots", slots_NH)
        self._check_device(where, "slots", slots_NH)
        self._pending, self._combined = None, True
        return self._combine(slots_NH, metadata)

    def reset(self) -> None:
        """Forget what is owed, after an error between `dispatch` and `combine`; on every rank of the group."""
        self._pending = None

    @abstractmethod
    def _dispatch(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> DispatcherOutput[M]: ...

    @abstractmethod
    def _combine(self, slots_NH: Tensor, metadata: M) -> Tensor: ...

    @abstractmethod
    def _num_slots(self, metadata: M) -> int:
        """R * k, the slots that `combine` takes."""

    def _known(self, ids_TK: Tensor) -> Tensor:
        """Ids [T, K] int64 with E for all that are no expert: an index into the tables."""
        outside_TK = (ids_TK < 0) | (ids_TK >= self.num_experts)
        return torch.where(outside_TK, self.num_experts, ids_TK).long()

    def _chosen(self, known_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of each slot of this rank's tokens, and the row of its expert there: [T, K] int32, -1 for none.

        known [T, K] int64 of `_known`. A token's number among the tokens says which copy of an expert it goes to, where
        this rank has none.
        """
        if self.ranks_of_expert.shape[1] == 1:
            ranks_TK = self.ranks_of_expert[:, 0][known_TK]
        else:
            row_T1 = torch.arange(known_TK.shape[0], device=known_TK.device).unsqueeze(1)
            token_T1 = row_T1 // self.plan.rows_per_token
            ranks_TK = self.ranks_of_expert[known_TK, token_T1 % self.num_copies[known_TK]]
        return ranks_TK, self.rows_of_expert[ranks_TK.long(), known_TK]  # none: the last rank, which has no such row

    def _check(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        where, tokens, top_k = type(self).__name__, hidden_TH.shape[0], self.plan.top_k
        check_shape(where, "hidden", hidden_TH, (None, None))
        for name, tensor in (("ids", ids_TK), ("weights", weights_TK)):
            check_shape(where, name, tensor, (tokens, top_k))
        check_float(where, "hidden", hidden_TH)
        check_int(where, "ids", ids_TK)
        check_float(where, "weights", weights_TK)
        for name, tensor in (("hidden", hidden_TH), ("ids", ids_TK), ("weights", weights_TK)):
            self._check_device(where, name, tensor)
        most, per_token = self.plan.max_tokens, self.plan.rows_per_token
        if most is not None and tokens > most:
            raise MoERangeError.of(
                where,
                expected=f"at most {most // per_token} tokens",
                got=str(tokens // per_token),
                hint="No token is ever dropped: raise max_tokens_per_rank on all ranks, or split the batch.",
            )

    def _check_device(self, where: str, name: str, tensor: Tensor) -> None:
        check_device(where, ("the mesh", self.ranks_of_expert), (name, tensor))

    def _out_of_order(self, call: str, wanted: str) -> BaseException:
        return MoEStageError.of(
            f"{type(self).__name__}.{call}",
            expected=f"{wanted} first",
            got=f"a dispatcher in stage {self.stage.name}",
            hint="Calls go in turns; after an error between them, call reset() on every rank.",
        )
