"""The adapters to vLLM, against a package with vLLM's published signatures; on a GPU with vLLM, against vLLM itself."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from diffulex.integrations import vllm as adapters
from diffulex.moe import MoESpec, NaiveFusedMoE, TopKOutput
from lowering.errors import MoEDtypeError, MoEUnsupportedError
from lowering.spec import ExpertSpec, RoutingSpec
from tests.support import vllm_stub
from tests.support.oracle import assert_oracle_ratio

IMPLS = ("vllm", "vllm_modular")
CLAMPED = "silu(min(g, 2.5)) * max(min(u, 2.5), -2.5)"
OAI = "(max(min(u, 3.0), -3.0) + 1.0) * (min(g, 3.0) * sigmoid(min(g, 3.0) * 1.25))"
# activation -> does "vllm" take it; "vllm_modular" takes all of these
ACTS = {
    "silu(g) * u": True,
    "geglu": True,
    "geglu_tanh": True,
    "silu": True,
    "gelu": True,
    "gelu_tanh": True,
    "relu2": True,
    CLAMPED: False,
    OAI: False,
    "swiglu_oai": False,
}


def make_spec(impl="vllm", act="silu(g) * u", routing=None, **experts):
    gated = act not in ("silu", "gelu", "gelu_tanh", "relu2", "relu")
    routing = routing or RoutingSpec(2)
    return MoESpec(8, routing, ExpertSpec(5, 8, 6, act, gated=gated, **experts), moe_gemm_impl=impl)


def layers(spec, *, dtype=torch.float32, device="cpu"):
    """The layer of a spec, the same by the ops and by the fp64 loop."""
    made = NaiveFusedMoE(spec, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    others = [NaiveFusedMoE(dataclasses.replace(spec, moe_gemm_impl=impl)) for impl in ("triton", "naive")]
    for other in others:
        other.load_state_dict(made.state_dict())
    return made, others[0].to(device, dtype), others[1].to(device).double()


def inputs(tokens=7, dtype=torch.float32, device="cpu"):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.fixture
def stub(monkeypatch):
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(adapters, "_DEVICES", ("cpu",))


def check(spec, *, tokens=7, dtype=torch.float32, **given):
    layer, ops_layer, oracle = layers(spec, dtype=dtype)
    hidden = inputs(tokens, dtype)
    with torch.no_grad():
        found, logits = layer(hidden, **given)
        eager = ops_layer(hidden, router_logits=logits, **given)[0]
        wanted = oracle(hidden.double(), router_logits=logits.double(), **given)[0]
    assert_oracle_ratio(found, eager, wanted)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", ACTS)
def test_equals_the_loop(act, impl, bias):
    if impl == "vllm" and not ACTS[act]:
        with pytest.raises(MoEUnsupportedError, match=r"an activation and a layout .* one half after the other"):
            NaiveFusedMoE(make_spec(impl, act, bias=bias))
        return
    check(make_spec(impl, act, bias=bias))


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
def test_interleaved_swiglu_oai_is_the_only_interleaved_form(impl):
    check(make_spec(impl, "swiglu_oai", bias=True, interleaved=True))
    for act in ("silu(g) * u", OAI):
        with pytest.raises(MoEUnsupportedError, match="interleaved"):
            NaiveFusedMoE(make_spec(impl, act, interleaved=True))


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_token_counts(impl, tokens, dtype):
    check(make_spec(impl), tokens=tokens, dtype=dtype)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
def test_ids_outside_are_skipped_not_read_out_of_bounds(impl):
    ids = torch.tensor([[0, 5], [-1, 7], [4, 2**31 - 1]], dtype=torch.int32)
    check(make_spec(impl), tokens=3, topk_ids=ids)
    layer, hidden = NaiveFusedMoE(make_spec(impl)), inputs(3)
    ids = torch.tensor([[5, 6], [-1, 7], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    with torch.no_grad():
        nothing = layer.mix(hidden, TopKOutput(torch.ones(3, 2), ids, hidden))
    assert torch.equal(nothing, torch.zeros_like(hidden))


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_weights_on_the_input_are_the_layers_work(impl, top_k):
    check(make_spec(impl, routing=RoutingSpec(top_k, score="sigmoid", apply_weight_on="input")))


@pytest.mark.usefixtures("stub")
def test_the_modular_kernel_is_built_once_for_a_dtype():
    layer = NaiveFusedMoE(make_spec("vllm_modular"))
    with torch.no_grad():
        for tokens in (3, 5, 9):
            layer(inputs(tokens))
        assert vllm_stub.FusedMoEKernel.built == 1
        layer.bfloat16()(inputs(3, torch.bfloat16))
    assert vllm_stub.FusedMoEKernel.built == 2


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("name", ["b13", "b2"])
def test_a_replaced_bias_is_the_one_that_counts(name):
    layer, ops_layer, _ = layers(make_spec("vllm_modular", bias=True))
    with torch.no_grad():
        before = layer(inputs())[0]
        for one in (layer, ops_layer):
            setattr(one, name, torch.nn.Parameter(torch.ones_like(getattr(one, name))))
        after = layer(inputs())[0]
        torch.testing.assert_close(after, ops_layer(inputs())[0])
    assert not torch.equal(after, before)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("bias", [False, True])
def test_fused_experts_stays_in_the_graph(bias):
    """vLLM's function is an op; what the adapter does around it must not break the graph either."""
    layer = NaiveFusedMoE(make_spec("vllm", bias=bias))

    def an_op(*, hidden_states, topk_weights, topk_ids, expert_map, **rest):
        return hidden_states * topk_weights.sum(1, keepdim=True) + expert_map[topk_ids.long()].sum(1, keepdim=True)

    layer._run._fused_experts = an_op
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for tokens in (0, 1, 7, 12):
            torch.testing.assert_close(compiled(inputs(tokens))[0], layer(inputs(tokens))[0])


# --- refusals: each says what is wrong, none falls back ---------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("impl", IMPLS)
def test_without_vllm(impl):
    with pytest.raises(MoEUnsupportedError, match=rf"MOE006.*{impl}.*ModuleNotFoundError: No module named 'vllm'"):
        NaiveFusedMoE(make_spec(impl))


def broken_import(name):
    def import_module(module):
        raise RuntimeError("no device found")

    return import_module


def test_a_vllm_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(adapters.importlib, "import_module", broken_import("vllm"))
    with pytest.raises(MoEUnsupportedError, match="RuntimeError: no device found"):
        NaiveFusedMoE(make_spec("vllm"))


def without_expert_map(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu"):
    raise AssertionError("must not be called")


def anything(*args, **kwargs):
    raise AssertionError("must not be called")


CHANGED = [
    ("vllm", {"fused_experts": without_expert_map}, "no apply_router_weight_on_input, global_num_experts, expert_map"),
    ("vllm", {"fused_experts": anything}, "no hidden_states, w1"),
    ("vllm", {"fused_experts": None}, "nothing of that name"),
    ("vllm", {"MoEActivation": None}, "MoEActivation.*nothing of that name"),
    ("vllm", {"MoEActivation": vllm_stub.RoutingMethodType}, "no such member"),
    ("vllm_modular", {"FusedMoEKernel": None}, "FusedMoEKernel.*nothing of that name"),
    ("vllm_modular", {"FusedMoEConfig": vllm_stub.FusedMoEQuantConfig}, "no num_experts"),
    ("vllm_modular", {"TritonExperts": None}, "TritonExperts"),
    ("vllm_modular", {"init_workspace_manager": None}, "init_workspace_manager"),
]


@pytest.mark.parametrize(("impl", "changes", "text"), CHANGED)
def test_other_signatures_are_an_error_that_names_the_version(impl, changes, text, monkeypatch):
    vllm_stub.install(monkeypatch, **changes)
    with pytest.raises(MoEUnsupportedError, match=r"vLLM 0\.33\.0 with") as error:
        NaiveFusedMoE(make_spec(impl))
    assert re.search(text, str(error.value))


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_is_refused(impl):
    layer = NaiveFusedMoE(make_spec(impl))
    with pytest.raises(MoEUnsupportedError, match="no backward"):
        layer(inputs())
    layer.requires_grad_(False)(inputs())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("impl", IMPLS)
def test_fp64_is_refused(impl):
    with pytest.raises(MoEDtypeError, match="fp32, fp16 or bf16"), torch.no_grad():
        NaiveFusedMoE(make_spec(impl)).double()(inputs(dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_cpu_is_refused(impl, monkeypatch):
    vllm_stub.install(monkeypatch)
    with pytest.raises(MoEUnsupportedError, match=r"a device of .*cuda.*got cpu"), torch.no_grad():
        NaiveFusedMoE(make_spec(impl))(inputs())


@pytest.mark.usefixtures("stub")
def test_vllms_own_refusal_is_passed_on(monkeypatch):
    monkeypatch.setattr(vllm_stub.TritonExperts, "refusal", "kernel does not support current device")
    with pytest.raises(MoEUnsupportedError, match="kernel does not support current device"), torch.no_grad():
        NaiveFusedMoE(make_spec("vllm_modular"))(inputs())


# --- the stub against vLLM -------------------------------------------------------------------------------------------


@pytest.mark.skipif(vllm_stub.vllm_root() is None, reason="vLLM's files are not here")
@pytest.mark.parametrize("name", vllm_stub.SOURCES)
def test_the_stub_has_the_published_signatures(name):
    root = vllm_stub.vllm_root()
    published = vllm_stub.signature_in((root / vllm_stub.SOURCES[name]).read_text(), name)
    ours = vllm_stub.signature_in(Path(inspect.getfile(vllm_stub)).read_text(), name)
    assert ours == published


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
def test_vllm_itself(impl, bias):
    pytest.importorskip("vllm")
    layer, ops_layer, oracle = layers(make_spec(impl, bias=bias), dtype=torch.bfloat16, device="cuda")
    hidden = inputs(33, torch.bfloat16, "cuda")
    with torch.no_grad():
        found, logits = layer(hidden)
        eager, wanted = ops_layer(hidden, router_logits=logits)[0], oracle(hidden.double())[0]
    assert_oracle_ratio(found, eager, wanted)
