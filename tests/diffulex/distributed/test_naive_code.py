"""What generated code makes of an exchange whose sizes the routing decides: for a faked H100."""

import re

import pytest
import torch

from diffulex.moe.dispatcher import naive_dispatcher
from diffulex.moe.layer.experts import slots_by_ops
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.reference.moe_block import ExpertWeights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

K, H, WIDTH, EXPERTS, RANKS = 4, 256, 128, 8, 2


class Dispatcher(naive_dispatcher.NaiveA2ADispatcher):
    """One of two ranks, with tables that are given."""

    def __init__(self, tables):
        self._pending, self.group, self.size, self.num_experts = None, "0", RANKS, RANKS * EXPERTS
        self.ranks_of_expert, self.rows_of_expert = tables


def call(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, *tables):
    experts = ExpertWeights(w13_EJH, w2_EHI, None, None, "silu(g) * u", False)
    dispatcher = Dispatcher(tables)
    sent = dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
    slots = slots_by_ops(sent.recv_hidden_states, sent.recv_local_expert_ids, experts=experts)
    return dispatcher._combine(slots, sent.metadata)


@pytest.fixture
def code_of(monkeypatch):
    monkeypatch.setattr(naive_dispatcher, "exchange", lambda counts, *_, **__: counts.clone())  # there is no group
    register_lowerings()
    half = {"dtype": torch.bfloat16}
    weights = [torch.empty(EXPERTS, 2 * WIDTH, H, **half), torch.empty(EXPERTS, H, WIDTH, **half)]
    sizes = (RANKS * EXPERTS + 1, 1), (RANKS, RANKS * EXPERTS + 1)
    tables = [torch.zeros(size, dtype=torch.int32) for size in sizes]

    def code(tokens, function=call, **options):
        given = [torch.empty(tokens, H, **half), torch.zeros(tokens, K, dtype=torch.int64), torch.zeros(tokens, K)]
        with torch.no_grad():
            return offline_source(function, [*given, *weights, *tables], options=options)

    return code


def launches(code, what):
    return [name for name in code.calls if what in name]


def test_what_comes_goes_through_generated_kernels(code_of):
    code = code_of(64)
    assert re.findall(r"(u\d+) = \w+\[0\]\.size\(0\)", code.wrapper_source)
    assert [name.split(".")[-2] for name in code.extern_calls] == ["send_rows", "exchange_rows"]
    assert len(launches(code, "moe_expert_up")) == len(launches(code, "moe_expert_down")) == 1
    (combine,) = launches(code, "moe_combine")
    assert "index_select" in combine  # results are put into their places where they are added up


def test_a_rank_without_tokens_takes_part(code_of):
    """Its results have no elements, and so nothing in its graph reads what comes back."""
    assert [name.split(".")[-2] for name in code_of(0).extern_calls] == ["send_rows", "exchange_rows"]


def test_layers_of_a_rank_without_tokens_keep_their_order(code_of):
    """Nothing of the first one is data for the second one, where there are no tokens."""

    def twice(hidden_TH, *others):
        return call(hidden_TH + call(hidden_TH, *others), *others)

    for tokens in (0, 64):
        found = [name.split(".")[-2] for name in code_of(tokens, twice).extern_calls]
        assert found == ["send_rows", "exchange_rows"] * 2
    given = re.findall(r"exchange_rows\.default\((.*)\)", code_of(0, twice).wrapper_source)
    assert len(given) == 2 and all(re.search(r"follows=buf\d+$", text) for text in given)


def test_no_cuda_graph_holds_splits(code_of):
    """They are read on the host: a graph would keep those of the call that it was recorded in."""
    wrapper = code_of(64, **{"triton.cudagraphs": True}).wrapper_source
    parts = re.split(r"^\s*def ", wrapper, flags=re.MULTILINE)
    exchanges = {part.partition("(")[0]: re.findall(r"= torch\.ops\.diffulex_exchange\.(\w+)", part) for part in parts}
    assert {name: found for name, found in exchanges.items() if found} == {"call": ["send_rows", "exchange_rows"]}
    assert any("moe_expert_up" in part for part in parts if part.startswith("partition_"))


def test_code_is_for_as_many_rows_as_are_sent(code_of):
    """Few rows in small tiles, many in large ones, though only the call tells how many come."""
    tiles = []
    for tokens in (64, 4096):
        wrapper = code_of(tokens).wrapper_source
        (found,) = re.findall(r"moe_expert_up\w*\.run\(.* // (\d+)\)", wrapper)
        tiles.append(int(found))
    assert tiles[0] <= 32 and tiles[1] >= 64
