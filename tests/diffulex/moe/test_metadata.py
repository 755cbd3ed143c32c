"""The records between the stages: what they hold, and that debug mode refuses what does not belong together."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.moe import metadata
from diffulex.moe.metadata import DispatcherStage, DispatchMetadata, ExpertExecutionMetadata, RouterMetadata
from diffulex.moe.topk import TopKOutput
from lowering.errors import MoEDeviceError, MoEDtypeError, MoERangeError, MoEShapeError
from lowering.settings import Settings
from tests.support.inputs import sort_slots


@pytest.fixture(autouse=True)
def _debug(monkeypatch):
    monkeypatch.setattr(metadata, "SETTINGS", Settings(debug=True))


def router(tokens=3, experts=5, top_k=2, **changes):
    fields = {
        "router_logits": torch.zeros(tokens, experts),
        "topk_ids": torch.zeros(tokens, top_k, dtype=torch.int32),
        "topk_weights": torch.zeros(tokens, top_k),
    }
    return RouterMetadata(**{**fields, **changes})


def dispatch(**changes):
    fields = {
        "num_tokens": 4,
        "splits_2R": torch.tensor([[3, 1], [2, 1]]),
        "recv_hidden_states": torch.zeros(3, 8),
        "recv_local_expert": torch.zeros(3, dtype=torch.int32),
        "recv_token_indices": torch.zeros(3, dtype=torch.int64),
        "recv_weights": torch.zeros(3),
    }
    return DispatchMetadata(**{**fields, **changes})


def execution(**changes):
    fields = {
        "sorted_slot_ids": torch.zeros(6, dtype=torch.int32),
        "packed_token_ids": torch.zeros(6, dtype=torch.int32),
        "seg_indptr": torch.zeros(6, dtype=torch.int32),
        "top_k": 2,
    }
    return ExpertExecutionMetadata(**{**fields, **changes})


INT = torch.int32
BROKEN = [
    (router, {"topk_ids": torch.zeros(3, dtype=INT)}, MoEShapeError, "topk_ids of shape"),
    (router, {"topk_ids": torch.zeros(2, 2, dtype=INT)}, MoEShapeError, r"topk_weights of shape \[2, 2\]"),
    (router, {"topk_weights": torch.zeros(3, 1)}, MoEShapeError, r"topk_weights of shape \[3, 2\], got shape \(3, 1\)"),
    (router, {"router_logits": torch.zeros(4, 5)}, MoEShapeError, r"router_logits of shape \[3, any\]"),
    (router, {"topk_ids": torch.zeros(3, 2)}, MoEDtypeError, "topk_ids in int32"),
    (router, {"topk_weights": torch.zeros(3, 2, dtype=INT)}, MoEDtypeError, "topk_weights in fp32"),
    (router, {"router_logits": torch.zeros(3, 5, dtype=INT)}, MoEDtypeError, "router_logits in fp32"),
    (router, {"topk_weights": torch.zeros(3, 2, device="meta")}, MoEDeviceError, "topk_weights on cpu"),
    (dispatch, {"splits_2R": torch.tensor([[3, 1], [2, 2]])}, MoERangeError, "none is negative, and 3 rows received"),
    (dispatch, {"splits_2R": torch.tensor([[-1, 1], [2, 1]])}, MoERangeError, r"\(-1, 1\) sent"),
    (dispatch, {"splits_2R": torch.ones(2, 0, dtype=torch.int64)}, MoERangeError, r"\(\) received"),
    (dispatch, {"splits_2R": torch.ones(2, 2, dtype=INT, device="meta")}, MoEDeviceError, "splits on cpu"),
    (dispatch, {"splits_2R": torch.tensor([3, 1, 2, 1])}, MoEShapeError, r"splits of shape \[2, any\]"),
    (dispatch, {"splits_2R": torch.ones(2, 2)}, MoEDtypeError, "splits in int32"),
    (dispatch, {"recv_hidden_states": torch.zeros(3)}, MoEShapeError, r"recv_hidden_states of shape \[any, any\]"),
    (dispatch, {"num_tokens": -1}, MoERangeError, "num_tokens >= 0"),
    (dispatch, {"recv_local_expert": torch.zeros(2, dtype=INT)}, MoEShapeError, "recv_local_expert"),
    (dispatch, {"recv_local_expert": torch.zeros(3)}, MoEDtypeError, "recv_local_expert"),
    (dispatch, {"recv_token_indices": torch.zeros(3)}, MoEDtypeError, "recv_token_indices"),
    (dispatch, {"recv_weights": torch.zeros(3, dtype=INT)}, MoEDtypeError, "recv_weights"),
    (dispatch, {"recv_hidden_states": torch.zeros(3, 8, dtype=INT)}, MoEDtypeError, "recv_hidden_states"),
    (dispatch, {"recv_weights": torch.zeros(3, device="meta")}, MoEDeviceError, "recv_weights"),
    (execution, {"packed_token_ids": torch.zeros(5, dtype=INT)}, MoEShapeError, "packed_token_ids"),
    (execution, {"seg_indptr": torch.zeros(2, 3, dtype=INT)}, MoEShapeError, "seg_indptr"),
    (execution, {"seg_indptr": torch.zeros(6)}, MoEDtypeError, "seg_indptr"),
    (execution, {"seg_indptr": torch.zeros(1, dtype=INT)}, MoERangeError, "at least one expert"),
    (execution, {"top_k": 4}, MoERangeError, "divides the number of slots"),
    (execution, {"top_k": 0}, MoERangeError, "top_k >= 1"),
    (execution, {"seg_indptr": torch.zeros(6, dtype=INT, device="meta")}, MoEDeviceError, "seg_indptr"),
]


@pytest.mark.parametrize(("make", "changes", "error", "text"), BROKEN)
def test_debug_mode_refuses_what_does_not_fit(make, changes, error, text):
    with pytest.raises(error, match=text):
        make(**changes)


@pytest.mark.parametrize(("make", "changes"), [case[:2] for case in BROKEN])
def test_without_debug_mode_nothing_is_checked_until_asked(make, changes, monkeypatch):
    monkeypatch.setattr(metadata, "SETTINGS", Settings())
    record = make(**changes)
    with pytest.raises((MoEShapeError, MoEDtypeError, MoERangeError, MoEDeviceError)):
        record.check()


@pytest.mark.parametrize("make", [router, dispatch, execution])
def test_records_are_frozen(make):
    record = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, None)


def test_empty_is_the_record_of_a_rank_without_tokens():
    record = RouterMetadata.empty(5, 2, dtype=torch.bfloat16)
    assert (record.num_tokens, record.top_k) == (0, 2)
    assert (record.router_logits.shape, record.router_logits.dtype) == ((0, 5), torch.bfloat16)
    assert (record.topk_ids.dtype, record.topk_weights.dtype) == (torch.int32, torch.float32)
    assert ExpertExecutionMetadata.from_topk_ids(record.topk_ids, 5).num_slots == 0


@pytest.mark.parametrize("top_k", [0, 6])
def test_empty_refuses_a_meaningless_k(top_k):
    with pytest.raises(MoERangeError, match="0 < top_k <= 5"):
        RouterMetadata.empty(5, top_k)


def test_from_topk_output_keeps_the_tensors():
    output = TopKOutput(torch.ones(3, 2), torch.ones(3, 2, dtype=INT), torch.ones(3, 5))
    record = RouterMetadata.from_topk_output(output)
    assert (record.topk_weights, record.topk_ids, record.router_logits) == tuple(output)


def test_counts():
    assert dispatch().total_recv_slots == 3
    assert (execution().num_slots, execution().num_experts) == (6, 5)
    assert [stage.name for stage in DispatcherStage] == ["INITIAL", "DISPATCHED", "COMBINED"]


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_execution_is_the_sorted_slots(tokens, top_k, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, experts + 2, (tokens, top_k), generator=generator, dtype=INT)
    record, slots = ExpertExecutionMetadata.from_topk_ids(ids_TK, experts), sort_slots(ids_TK, experts)
    assert torch.equal(record.sorted_slot_ids, slots.order_N)
    assert torch.equal(record.packed_token_ids, slots.token_N)
    assert torch.equal(record.seg_indptr, slots.offsets_E1)
    assert (record.num_slots, record.num_experts, record.top_k) == (tokens * top_k, experts, top_k)
