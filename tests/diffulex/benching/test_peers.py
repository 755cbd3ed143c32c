"""The registry: who is there, who is left out and why, and what the adapters call."""

import dataclasses
import functools
import importlib.util

import pytest
import torch

from diffulex.benching import peers
from diffulex.benching.check import Checker
from diffulex.benching.peers import PEERS, choose, gathered_bytes
from diffulex.integrations import vllm as adapter
from lowering.errors import MoEOptionError, MoEUnsupportedError, ReasonCode
from lowering.state import disabled
from tests.support import vllm_stub
from tests.support.benching import CPU, tiny_inputs, tiny_layer

CUDA = torch.device("cuda")
no_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


def peer(name, device="cpu"):
    (found,) = [one for one in PEERS if (one.name, one.device) == (name, device)]
    return found


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("name", ["diffulex", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("source", ["topk", "logits"])
def test_the_peers_of_a_cpu_are_right(name, source):
    layer, inputs = tiny_layer(), tiny_inputs(9, sets=2)
    runner = peer(name).build(layer, source)
    found = Checker(layer, inputs, source=source)(lambda number: runner.run(*runner.prepare(inputs[number])))
    assert not found.problem
    assert runner.prepare(inputs[0]) == inputs[0].of(source)


@no_vllm
def test_without_names_all_that_can_run(hopper):
    found, left_out = choose(None, device=CUDA, dtype=torch.bfloat16)
    assert [one.name for one in found] == ["diffulex", "stock"]
    assert list(left_out) == ["vllm"] and left_out["vllm"].code is ReasonCode.ABSENT
    assert "No module named 'vllm'" in str(left_out["vllm"])


@no_vllm
def test_diffulex_without_its_kernels_is_not_timed_under_its_name(hopper):
    with disabled():
        found, left_out = choose(None, device=CUDA, dtype=torch.bfloat16)
        assert [one.name for one in found] == ["stock"] and left_out["diffulex"].code is ReasonCode.DISABLED
        with pytest.raises(MoEUnsupportedError, match=r"--peers diffulex.*DISABLED"):
            choose(None, device=CUDA, dtype=torch.float16)  # nobody is left


def test_names_are_taken_in_the_order_of_the_registry():
    found, left_out = choose(["eager", "diffulex"], device=CPU, dtype=torch.float32)
    assert [one.name for one in found] == ["diffulex", "eager"] and left_out == {}


@pytest.mark.parametrize("name", ["no_such", "stock"])
def test_a_name_that_is_unknown_here(name):
    with pytest.raises(MoEOptionError, match=r"--peers: expected peers on cpu: diffulex, eager, .* got '" + name):
        choose(["diffulex", name], device=CPU, dtype=torch.float32)


@no_vllm
def test_a_peer_that_is_asked_for_and_cannot_be_imported(hopper):
    with pytest.raises(MoEUnsupportedError, match=r"MOE006.*--peers vllm.*No module named 'vllm'"):
        choose(["diffulex", "vllm"], device=CUDA, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "capability", "code"),
    [
        (torch.bfloat16, (9, 0), None),
        (torch.bfloat16, (10, 0), None),
        (torch.float16, (9, 0), ReasonCode.DTYPE),
        (torch.bfloat16, (8, 0), ReasonCode.CAPABILITY),
    ],
)
def test_stock_needs_a_product_that_a_cuda_graph_can_hold(dtype, capability, code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    reason = peer("stock", "cuda").absent(dtype)
    assert (reason and reason.code) == code


def test_batched_mm_runs_where_what_it_gathers_fits(monkeypatch):
    layer = tiny_layer(dtype=torch.bfloat16)
    assert gathered_bytes(layer, 10) == 10 * 2 * (3 * 64 * 32) * 2
    refuses = peer("batched_mm").refuses
    monkeypatch.setattr(peers, "MOST_GATHERED_BYTES", gathered_bytes(layer, 10))
    assert refuses(layer, 10) is None
    reason = refuses(layer, 11)
    assert reason.code is ReasonCode.MEMORY and "gathers 0.0 GiB of weights" in str(reason)
    monkeypatch.setattr(peers, "free_memory", lambda device: 2 * gathered_bytes(layer, 5))
    assert refuses(layer, 5) is None and refuses(layer, 6) is not None


@pytest.mark.parametrize(("name", "captured"), [("diffulex", True), ("stock", False)])
@pytest.mark.parametrize("source", ["topk", "logits"])
def test_what_is_compiled_on_cuda(name, captured, source, monkeypatch, fresh_dynamo):
    """The ops in the one graph of diffulex, whose kernels may begin early, none in that of stock; both compute it."""
    graphs = []

    def backend(graph, _inputs, *, options):
        assert options == {"triton.enable_pdl": captured}
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    layer, inputs = tiny_layer(dtype=torch.bfloat16), tiny_inputs(64, dtype=torch.bfloat16)
    with torch.no_grad(), peer(name, "cuda").state():
        runner = peer(name, "cuda").build(layer, source)
        found = Checker(layer, inputs, source=source)(lambda number: runner.run(*runner.prepare(inputs[number])))
    assert not found.problem and len(graphs) == 1
    assert any("diffulex" in target for target in graphs[0]) == captured


@pytest.fixture
def stub(monkeypatch):
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(adapter, "_DEVICES", ("cpu",))


@pytest.mark.parametrize("form", ["plain", "gelu", "ungated"])
@pytest.mark.parametrize("source", ["topk", "logits"])
def test_vllm_gets_what_its_own_router_makes(form, source, stub):
    layer, inputs = tiny_layer(form, dtype=torch.bfloat16), tiny_inputs(64, dtype=torch.bfloat16)
    vllm = dataclasses.replace(peer("vllm", "cuda"), device="cpu")
    assert vllm.absent(torch.bfloat16) is None
    with torch.no_grad():
        runner = vllm.build(layer, source)
        arguments = runner.prepare(inputs[0])
        if source == "topk":
            assert [t.dtype for t in arguments] == [torch.bfloat16, torch.int32, torch.float32]
        assert not Checker(layer, inputs, source=source)(lambda number: runner.run(*arguments)).problem


def test_what_vllm_does_not_run_is_a_reason(stub):
    refuses = peer("vllm", "cuda").refuses
    assert refuses(tiny_layer(), 1) is None
    assert refuses(tiny_layer("gpt_oss"), 1).code is ReasonCode.LAYOUT
    limited = dataclasses.replace(tiny_layer().case.spec, act="tanh(g) * u")
    layer = dataclasses.replace(tiny_layer(), case=dataclasses.replace(tiny_layer().case, spec=limited))
    assert refuses(layer, 1).code is ReasonCode.OPTION


def test_a_vllm_with_another_router_is_absent(monkeypatch):
    vllm_stub.install(monkeypatch, fused_topk=lambda hidden_states, gating_output: None)
    assert "no topk, renormalize" in str(peer("vllm", "cuda").absent(torch.bfloat16))
