"""What travels between the stages of a MoE layer, as frozen records: routing, exchange between ranks, execution.

With DIFFULEX_DEBUG=1 each record checks its shapes, dtypes and devices when it is made, and nothing waits for the
device; without it, making one costs what a dataclass costs.
"""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from lowering import ops
from lowering._checks import check_device, check_float, check_int, check_shape
from lowering.errors import MoERangeError
from lowering.settings import SETTINGS

from .topk.output import TopKOutput


class DispatcherStage(enum.Enum):
    """Where a token dispatcher stands: it takes tokens, owes results for those it sent away, or has given them back."""

    INITIAL = "initial"
    DISPATCHED = "dispatched"
    COMBINED = "combined"


def _check_devices(where: str, record: object, first: str, *others: str) -> None:
    for name in others:  # by name: Dynamo does not look into `vars` of a frozen dataclass
        check_device(where, (first, getattr(record, first)), (name, getattr(record, name)))


@dataclasses.dataclass(frozen=True)
class RouterMetadata:
    """What the router decided about T tokens.

    router_logits  [T, columns of the router] floating
    topk_ids       [T, K] int32 or int64; those outside [0, E) choose no expert
    topk_weights   [T, K] floating
    """

    router_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def __post_init__(self) -> None:
        if SETTINGS.debug:
            self.check()

    def check(self) -> None:
        """Raise `MoEShapeError`, `MoEDtypeError` or `MoEDeviceError` where the tensors do not belong together."""
        where = "RouterMetadata"
        check_shape(where, "topk_ids", self.topk_ids, (None, None))
        num_tokens, top_k = self.topk_ids.shape
        check_shape(where, "topk_weights", self.topk_weights, (num_tokens, top_k))
        check_shape(where, "router_logits", self.router_logits, (num_tokens, None))
        check_int(where, "topk_ids", self.topk_ids)
        check_float(where, "topk_weights", self.topk_weights)
        check_float(where, "router_logits", self.router_logits)
        _check_devices(where, self, "topk_ids", "topk_weights", "router_logits")

    @classmethod
    def empty(
        cls, num_experts: int, top_k: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RouterMetadata:
        """The record of a rank without tokens, which still takes part in the exchange.

        router_logits [0, E] in `dtype`, topk_ids [0, K] int32, topk_weights [0, K] fp32.
        Raises `MoERangeError` unless 0 < top_k <= num_experts.
        """
        if not 0 < top_k <= num_experts:
            raise MoERangeError.of(
                "RouterMetadata.empty",
                expected=f"0 < top_k <= {num_experts} experts",
                got=f"top_k={top_k}",
                hint="Pass the numbers of the layer.",
            )
        return cls(
            router_logits=torch.empty(0, num_experts, device=device, dtype=dtype),
            topk_ids=torch.empty(0, top_k, device=device, dtype=torch.int32),
            topk_weights=torch.empty(0, top_k, device=device, dtype=torch.float32),
        )

    @classmethod
    def from_topk_output(cls, output: TopKOutput) -> RouterMetadata:
        """The record of a router's output: logits [T, E] floating, ids [T, K] int32, weights [T, K] fp32."""
        return cls(output.router_logits, output.ids, output.weights)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.topk_ids.shape[1]


@dataclasses.dataclass(frozen=True)
class DispatchMetadata:
    """What a rank sent to the others and received from them, R rows received in all; the way back needs it.

    num_tokens          T tokens of this rank
    splits_2R           [2, ranks] int64 on the CPU: rows sent to each rank, and rows received from each, R in all
    recv_hidden_states  [R, H] floating
    recv_local_expert   [R] int32 or int64, the expert's number on this rank; outside means none
    recv_token_indices  [R] int32 or int64, the token on the rank that sent it
    recv_weights        [R] floating
    """

    num_tokens: int
    splits_2R: Tensor
    recv_hidden_states: Tensor
    recv_local_expert: Tensor
    recv_token_indices: Tensor
    recv_weights: Tensor

    def __post_init__(self) -> None:
        if SETTINGS.debug:
            self.check()

    def check(self) -> None:
        """Raise the error of the catalogue that says what does not fit: shapes, dtypes, devices, splits.

        Compiled code does not look at the values of the splits.
        """
        where, rows = "DispatchMetadata", self.total_recv_slots
        check_shape(where, "recv_hidden_states", self.recv_hidden_states, (None, None))
        check_shape(where, "splits", self.splits_2R, (2, None))
        check_int(where, "splits", self.splits_2R)
        check_device(where, ("the host", torch.empty(0, device="cpu")), ("splits", self.splits_2R))
        if not torch.compiler.is_compiling():
            self._check_splits(where)
        if self.num_tokens < 0:
            raise MoERangeError.of(where, expected="num_tokens >= 0", got=str(self.num_tokens), hint="Count tokens.")
        for name in ("recv_local_expert", "recv_token_indices", "recv_weights"):
            check_shape(where, name, getattr(self, name), (rows,))
        check_int(where, "recv_local_expert", self.recv_local_expert)
        check_int(where, "recv_token_indices", self.recv_token_indices)
        check_float(where, "recv_hidden_states", self.recv_hidden_states)
        check_float(where, "recv_weights", self.recv_weights)
        names = ("recv_hidden_states", "recv_local_expert", "recv_token_indices", "recv_weights")
        _check_devices(where, self, *names)

    def _check_splits(self, where: str) -> None:
        if min((*self.send_splits, *self.recv_splits), default=0) < 0 or sum(self.recv_splits) != self.total_recv_slots:
            raise MoERangeError.of(
                where,
                expected=f"splits of which none is negative, and {self.total_recv_slots} rows received",
                got=f"{self.send_splits} sent and {self.recv_splits} received",
                hint="Both list all ranks of the group in order.",
            )

    @property
    def send_splits(self) -> tuple[int, ...]:
        """Rows sent to each rank."""
        return tuple(self.splits_2R[0].tolist())

    @property
    def recv_splits(self) -> tuple[int, ...]:
        """Rows received from each rank."""
        return tuple(self.splits_2R[1].tolist())

    @property
    def total_recv_slots(self) -> int:
        """R."""
        return self.recv_hidden_states.shape[0]


@dataclasses.dataclass(frozen=True)
class ExpertExecutionMetadata:
    """The N = T*K slots in the order the experts work through them; slot n belongs to token n // K.

    sorted_slot_ids   [N] int32, slots by expert, stable; slots of no expert last
    packed_token_ids  [N] int32, their tokens
    seg_indptr        [E+1] int32, where each expert's rows begin; the last entry counts the slots of any expert
    top_k             K
    """

    sorted_slot_ids: Tensor
    packed_token_ids: Tensor
    seg_indptr: Tensor
    top_k: int

    def __post_init__(self) -> None:
        if SETTINGS.debug:
            self.check()

    def check(self) -> None:
        """Raise the error of the catalogue that says what does not fit: shapes, dtypes, devices, K."""
        where = "ExpertExecutionMetadata"
        check_shape(where, "sorted_slot_ids", self.sorted_slot_ids, (None,))
        check_shape(where, "packed_token_ids", self.packed_token_ids, (self.sorted_slot_ids.shape[0],))
        check_shape(where, "seg_indptr", self.seg_indptr, (None,))
        for name in ("sorted_slot_ids", "packed_token_ids", "seg_indptr"):
            check_int(where, name, getattr(self, name))
        _check_devices(where, self, "sorted_slot_ids", "packed_token_ids", "seg_indptr")
        if self.top_k < 1 or self.sorted_slot_ids.shape[0] % self.top_k or self.seg_indptr.shape[0] < 2:
            raise MoERangeError.of(
                where,
                expected="top_k >= 1 that divides the number of slots, and at least one expert",
                got=f"top_k={self.top_k}, {self.num_slots} slots, {self.num_experts} experts",
                hint="Make it with ExpertExecutionMetadata.from_topk_ids.",
            )

    @classmethod
    def from_topk_ids(cls, topk_ids: Tensor, num_experts: int) -> ExpertExecutionMetadata:
        """Sort the slots of ids [T, K] int32 or int64 by expert, with `diffulex::moe_dispatch`."""
        order_N, token_N, offsets_E1 = ops.moe_dispatch(topk_ids, num_experts)
        return cls(order_N, token_N, offsets_E1, topk_ids.shape[1])

    @property
    def num_slots(self) -> int:
        """N."""
        return self.sorted_slot_ids.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.seg_indptr.shape[0] - 1
