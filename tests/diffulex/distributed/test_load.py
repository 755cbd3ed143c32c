"""Counters of experts' slots against a count on the host, also compiled, faked and in a CUDA graph."""

import collections
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from diffulex.distributed import ExpertLoad
from lowering.errors import MoEDeviceError, MoEDtypeError, MoEOptionError, MoERangeError
from tests.support.catalogue import raises_catalogue
from tests.support.moe_layers import SPECS, make_layer

DTYPES = (torch.int32, torch.int64)


def counted(batches, num_experts):
    found = collections.Counter(expert for ids in batches for expert in ids.flatten().tolist())
    return [found[expert] for expert in range(num_experts)]


@st.composite
def batches(draw, num_experts):
    """Ids [T, K] of several calls, some of no expert, T = 0 among them."""
    ids = st.sampled_from([-(2**31), -1, *range(num_experts + 2), 2**31 - 1])
    found = []
    for _ in range(draw(st.integers(0, 3))):
        tokens, top_k, dtype = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
        flat = draw(st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k))
        found.append(torch.tensor(flat, dtype=dtype).reshape(tokens, top_k))
    return found


@given(st.data(), st.integers(1, 5))
def test_counts_equal_the_hosts(data, num_experts):
    load, calls = ExpertLoad(num_experts), data.draw(batches(num_experts))
    address = load.counts_E.data_ptr()
    for ids in calls:
        load(ids)
    assert load.snapshot() == counted(calls, num_experts)
    assert load.counts_E.data_ptr() == address and load.total().data_ptr() != address
    load.reset()
    assert load.snapshot() == [0] * num_experts and load.counts_E.data_ptr() == address


def test_counts_beyond_32_bits():
    load = ExpertLoad(2)
    load.counts_E.fill_(2**31 - 1)
    load(torch.tensor([[1, 1]], dtype=torch.int32))
    assert load.snapshot() == [2**31 - 1, 2**31 + 1]


def test_compiled_code_counts_without_a_break(fresh_dynamo):
    layer, load, graphs, calls = make_layer(SPECS["qwen2_moe"], "triton"), ExpertLoad(8), [], []
    load.watch(layer.router)
    plain = make_layer(SPECS["qwen2_moe"], "triton")
    plain.router.register_forward_hook(lambda _module, _args, chosen: calls.append(chosen.ids))

    def counting(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if node.op == "placeholder" and "counts_e" in node.name])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    for tokens in (0, 1, 5, 9, 0):
        hidden_TH = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)).double()
        with torch.no_grad():
            compiled(hidden_TH), plain(hidden_TH)
    assert load.snapshot() == counted(calls, 8) and sum(load.snapshot()) == 15 * 3
    assert len(graphs) <= 3
    for (counts,) in graphs:  # as for weights: what is written in place elsewhere keeps CUDA graphs from being used
        assert "_dynamo_static_input_type" in counts.meta["tensor_dict"]


def test_compiled_code_counts_from_then_until_removed(fresh_dynamo):
    """Who watches what has served for long, one after the other and two at once; only their number makes new code."""
    layer, graphs, calls = make_layer(SPECS["qwen2_moe"], "triton"), [], []
    plain = make_layer(SPECS["qwen2_moe"], "triton")
    plain.router.register_forward_hook(lambda _module, _args, chosen: calls.append(chosen.ids))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph)

    def serve(*watching):
        for load in watching:
            load.reset()
        calls.clear()
        for tokens in (5, 9, 5):
            hidden_TH = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)).double()
            with torch.no_grad():
                compiled(hidden_TH), plain(hidden_TH)
        assert all(load.snapshot() == counted(calls, 8) for load in watching)
        return len(graphs)

    unwatched = serve()
    first, second = ExpertLoad(8), ExpertLoad(8)
    watching = first.watch(layer.router)
    once = serve(first)
    assert once == unwatched + 1
    with second.watch(layer.router):
        assert serve(first, second) == once + 1
        watching.remove()
        watching.remove()
        first.reset()
        assert serve(second) == once + 1 and not any(first.snapshot())
    second.reset()
    assert serve() == once + 1 and not any(second.snapshot())


def test_a_watched_router_is_copied_and_saved_as_any():
    layer, load = make_layer(SPECS["qwen2_moe"], "triton"), ExpertLoad(8)
    router, names = layer.router, [*layer.state_dict()]
    plain = pickle.dumps(router)
    with load.watch(router):
        assert [*layer.state_dict()] == names and load not in [*layer.modules()]
        assert pickle.dumps(router) == plain
        for other in (copy.deepcopy(router), copy.copy(router), pickle.loads(plain)):
            other(torch.randn(3, 8))
        assert not any(load.snapshot())
        router(torch.randn(3, 8))
    assert sum(load.snapshot()) == 3 * layer.router.spec.top_k


def test_the_same_counter_twice_counts_twice():
    layer, load = make_layer(SPECS["qwen3"], "triton"), ExpertLoad(8)
    first, second = load.watch(layer.router), load.watch(layer.router)
    layer.router(torch.randn(3, 8))
    first.remove()
    layer.router(torch.randn(3, 8))
    assert sum(load.snapshot()) == 3 * layer.router.spec.top_k * 3
    second.remove()
    assert layer.router.watchers == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_depends_on_what_the_ids_are(dtype):
    """Fake tensors have no values: a mask as an index or a read by the host would raise."""
    with FakeTensorMode():
        load = ExpertLoad(4)
        load(torch.zeros(3, 2, dtype=dtype))
        assert load.total().shape == (4,)


def test_counts_are_not_saved():
    assert not ExpertLoad(3).state_dict()


def test_what_cannot_be_counted_is_refused():
    with raises_catalogue(MoERangeError, where="ExpertLoad", got="0"):
        ExpertLoad(0)
    with raises_catalogue(MoEDtypeError, where="ExpertLoad", got="torch.float32"):
        ExpertLoad(2)(torch.zeros(1, 1))
    with raises_catalogue(MoEDeviceError, where="ExpertLoad", got="meta"):
        ExpertLoad(2)(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    with raises_catalogue(MoEOptionError, where="ExpertLoad", got="Linear"):
        ExpertLoad(2).watch(torch.nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_in_a_cuda_graph(dtype):
    load, ids = ExpertLoad(4, device="cuda"), torch.zeros(3, 2, dtype=dtype, device="cuda")
    load(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        load(ids)
    load.reset()
    calls = [torch.tensor([[0, 3], [4, -1], [3, 3]], dtype=dtype), torch.full((3, 2), 1, dtype=dtype)]
    for call in calls:
        ids.copy_(call)
        graph.replay()
    assert load.snapshot() == counted(calls, 4)
