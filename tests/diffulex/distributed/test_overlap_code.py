"""The order that generated code keeps of a call in parts, and what it does not write: for a faked H100."""

import re
from types import SimpleNamespace

import pytest
import torch

from diffulex.distributed.tokens import Route
from diffulex.moe.dispatcher.static_dispatcher import StaticDispatcher
from diffulex.moe.layer.experts import slots_by_ops
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.reference.moe_block import ExpertWeights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

T, K, H, WIDTH, EXPERTS, RANKS = 4096, 4, 256, 128, 8, 2
OWN = ("begin", "moe_expert_up")
PEERS = ("rows_of", "moe_expert_up", "moe_expert_down", "moe_combine", "send")
REST = ("moe_expert_down", "collect", "moe_combine")


class Dispatcher(StaticDispatcher):
    """One of two ranks, with tables that are given."""

    plan, exact = SimpleNamespace(top_k=K), False

    def __init__(self, chunks, tables):
        self._pending, self.chunks, self.capacity = None, chunks, T
        self.rank, self.size, self.num_experts, self.num_local_experts = 0, RANKS, RANKS * EXPERTS, EXPERTS
        self.most_rows, (self.ranks_of_expert, self.rows_of_expert) = EXPERTS, tables

    def _check(self, *tensors):
        """Everything fits."""

    def _route(self, name, needed):
        return Route("", RANKS, "nowhere")


def code_of(chunks, *, count=T):
    def call(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, *tables):
        experts = ExpertWeights(w13_EJH, w2_EHI, None, None, "silu(g) * u", False)
        dispatcher = Dispatcher(chunks, tables)
        if chunks == 1:
            sent = dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
            slots = slots_by_ops(sent.recv_hidden_states, sent.recv_local_expert_ids, experts=experts)
            return dispatcher._combine(slots, sent.metadata)
        first = lambda rows, ids: slots_by_ops.first(rows, ids, experts=experts)  # noqa: E731
        return dispatcher.run_in_parts(hidden_TH, ids_TK, weights_TK, first=first)

    half = {"dtype": torch.bfloat16}
    weights = [torch.empty(EXPERTS, 2 * WIDTH, H, **half), torch.empty(EXPERTS, H, WIDTH, **half)]
    sizes = (RANKS * EXPERTS + 1, 1), (RANKS, RANKS * EXPERTS + 1)
    tables = [torch.zeros(size, dtype=torch.int32) for size in sizes]
    register_lowerings()
    with torch.no_grad():
        tokens = [torch.empty(count, H, **half), torch.zeros(count, K, dtype=torch.int64), torch.zeros(count, K)]
        return offline_source(call, [*tokens, *weights, *tables])


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_rank_without_tokens_takes_part(chunks):
    """Its results have no elements, and so nothing in its graph reads what comes back."""
    found, wanted = (
        [call for call in code_of(chunks, count=count).extern_calls if "diffulex_exchange" in call] for count in (0, T)
    )
    assert found == wanted != []


@pytest.mark.parametrize("chunks", [2, 3])
def test_exchanges_stand_between_the_gemms_that_hide_them(chunks):
    code = code_of(chunks)
    body = code.wrapper_source.partition("def call")[2]
    calls = [line for line in body.splitlines() if re.search(r"\.run\(|torch\.ops\.\w+\.\w+\.default\(", line)]
    stages = r"(moe_expert_up|moe_expert_down|moe_combine)\w*\.run\(|diffulex_exchange\.(\w+)\.default\("
    found = [next(filter(None, match.groups())) for line in calls if (match := re.search(stages, line))]
    assert found == [*OWN, *PEERS * (chunks - 1), *REST]
    # neither slots nor sums in fp32, and slots of other ranks' experts are neither written nor read
    assert not re.search(r"empty_strided_cuda\(.*torch\.float32\)", body)
    gemms = [kernel.function for kernel in code.kernels if "moe_expert" in kernel.name]
    assert gemms and not any("no expert: zeros" in text or "if start >= end" in text for text in gemms)
    sums = [kernel.function for kernel in code.kernels if "moe_combine" in kernel.name]
    assert len(sums) == chunks and all("other=0.0" in text for text in sums)
