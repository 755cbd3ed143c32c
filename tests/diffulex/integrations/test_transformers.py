"""The functions in transformers' registry: stock in eager mode, the ops in captured graphs, "diffulex" in both."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

import diffulex
from diffulex.cli.accuracy import Oracle
from diffulex.integrations import transformers as module_under_test
from diffulex.integrations.transformers import diffulex_experts_forward, register
from lowering.graph.dataflow import aten
from lowering.graph.pipeline import run_passes
from tests.support.experts import make_case, output_and_gradients, stock_function
from tests.support.graphs import backend_with, calls, no_pass
from tests.support.inputs import WIDE
from tests.support.models import TINY, build_model, token_ids
from tests.support.oracle import CountOps, assert_oracle_ratio

ops = torch.ops.diffulex
OPS = (
    ops.moe_dispatch.default,
    ops.moe_expert_up.default,
    ops.moe_expert_down.default,
    ops.moe_combine.default,
)
NAMES = ("grouped_mm", "batched_mm")
FORMS = {
    "plain": WIDE,
    "gpt_oss": WIDE.replace(act="swiglu_oai", bias=True, interleaved=True, transposed=True),
    "nemotron_h": WIDE.replace(act="relu2"),
    "biased": WIDE.replace(act="geglu", bias=True),
    "sentinels": WIDE.replace(ids="sentinels", bias=True),
    "top1": WIDE.replace(top_k=1),
}
ONE_LAYER = dataclasses.replace(TINY, layers=1)


def registered(name):
    """The function transformers finds under a name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[name]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs it is given, inference or joint, and runs them."""

    def __init__(self, graph_pass=no_pass):
        self.graphs, self.graph_pass = [], graph_pass

    def compile(self, function, **options):
        return torch.compile(function, backend=backend_with(self.apply), fullgraph=True, **options)

    def apply(self, graph):
        self.graph_pass(graph)
        self.graphs.append(graph)

    def ops(self):
        return [[len(calls(graph, op)) for op in OPS] for graph in self.graphs]


# Eager mode


@pytest.fixture
def one_thread():
    """Stock `batched_mm` adds up weight gradients in the order its threads come by."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def identical(ours, stock):
    assert ours.keys() == stock.keys()
    assert [name for name in ours if not torch.equal(ours[name], stock[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("one_thread")
def test_stock_names_are_untouched_in_eager_mode(name, form, dtype):
    """Bitwise, outputs and gradients."""
    ours = make_case(form.replace(dtype=dtype), registered(name))
    stock = make_case(form.replace(dtype=dtype), stock_function(name))
    identical(
        output_and_gradients(ours.module, ours.module, ours.inputs),
        output_and_gradients(stock.module, stock.module, stock.inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_diffulex_in_eager_mode(form, dtype):
    """Values and gradients against the fp64 loop, by the error of stock experts."""
    ours = make_case(form.replace(dtype=dtype), registered("diffulex"))
    stock = make_case(form.replace(dtype=dtype))
    found = output_and_gradients(ours.module, ours.module, ours.inputs)
    eager = output_and_gradients(stock.module, stock.module, stock.inputs)
    exact = output_and_gradients(ours.oracle, ours.oracle, ours.oracle_inputs)
    for name, value in found.items():
        assert_oracle_ratio(value, eager[name], exact[name], what=name)


def test_hidden_states_of_another_dtype():
    """Weights in 16 bits, hidden states in 32, as norms leave them under autocast: the result has their dtype."""
    case = make_case(WIDE.replace(dtype=torch.bfloat16), registered("diffulex"))
    stock = make_case(WIDE.replace(dtype=torch.bfloat16))
    hidden, *others = case.inputs
    with torch.no_grad():
        ours, eager = (each.module(hidden.float(), *others) for each in (case, stock))
        assert ours.dtype == eager.dtype == torch.float32
        # both round to 16 bits on the way
        assert_oracle_ratio(ours.bfloat16(), eager.bfloat16(), case.oracle(*case.oracle_inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    ours = make_case(WIDE.replace(dtype=dtype), registered("diffulex"))
    stock = make_case(WIDE.replace(dtype=dtype))
    hidden, *others = ours.inputs
    graphs = Graphs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        eager = stock.module(hidden.float(), *others)
        for run in (ours.module, graphs.compile(ours.module), graphs.compile(stock.module)):
            value = run(hidden.float(), *others)
            assert value.dtype == eager.dtype
            assert_oracle_ratio(value.to(dtype), eager.to(dtype), ours.oracle(*ours.oracle_inputs))


def test_a_norm_behind_the_experts():
    """Newer transformers have it: rows are normalised before they are weighted."""
    ours, stock = make_case(WIDE.replace(dtype=torch.float32), registered("diffulex")), make_case(WIDE)
    norm = torch.nn.LayerNorm(WIDE.hidden, bias=False)
    ours.module.has_post_expert_norm, ours.module.post_expert_norm = True, norm
    order, _, offsets = ops.moe_dispatch(ours.inputs[1], WIDE.experts)
    hidden, ids, weights = ours.inputs
    with torch.no_grad():
        pre = ops.moe_expert_up(hidden, ours.module.gate_up_proj, None, order, offsets, WIDE.top_k)
        rows = ops.moe_expert_down(ours.module._apply_gate(pre), ours.module.down_proj, None, order, offsets)
        wanted = (norm(rows).view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(ours.module(*ours.inputs), wanted)
    assert stock.module.has_post_expert_norm is False


# Captured graphs


@pytest.mark.parametrize(("form", "train"), [*((name, False) for name in FORMS), ("gpt_oss", True)])
@pytest.mark.parametrize("name", [*NAMES, "diffulex"])
def test_captured_graphs_run_the_ops(name, form, train):
    """Every form for inference; one form is enough to see the gradients of each name."""
    form = FORMS[form].replace(dtype=torch.float32)
    case, stock = make_case(form, registered(name)), make_case(form)
    graphs = Graphs(run_passes)
    compiled = graphs.compile(case.module)
    if train:
        ours = output_and_gradients(compiled, case.module, case.inputs)
        eager = output_and_gradients(stock.module, stock.module, stock.inputs)
        exact = output_and_gradients(case.oracle, case.oracle, case.oracle_inputs)
    else:
        with torch.no_grad():
            ours, eager, exact = (
                {"output": run(*inputs)}
                for run, inputs in (
                    (compiled, case.inputs),
                    (stock.module, stock.inputs),
                    (case.oracle, case.oracle_inputs),
                )
            )
    (counts,) = graphs.ops()
    # the backward of one expert stage is made of the other
    assert counts == ([1, 2, 2, 1] if train else [1, 1, 1, 1])
    assert not calls(graphs.graphs[0], aten._grouped_mm.default, aten.bmm.default, aten.sort.default)
    for key, value in ours.items():
        assert_oracle_ratio(value, eager[key], exact[key], what=key)


def test_exported_programs_hold_the_ops():
    case = make_case(WIDE.replace(dtype=torch.float32), registered("grouped_mm"))
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(case.module, case.inputs, dynamic_shapes=({0: length}, {0: length}, {0: length}))
    assert [len(calls(program.graph, op)) for op in OPS] == [1, 1, 1, 1]
    shorter = tuple(tensor[:5] for tensor in case.inputs)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*shorter), case.module(*shorter))


def test_programs_exported_while_switched_off_are_stock():
    """They load without diffulex."""
    case = make_case(WIDE.replace(dtype=torch.float32), registered("grouped_mm"))
    with diffulex.disabled():
        program = torch.export.export(case.module, case.inputs)
    assert not [node for node in program.graph.nodes if "diffulex" in str(node.target)]


def test_disabled_restores_the_stock_graph_and_back():
    case = make_case(WIDE.replace(dtype=torch.float32), registered("grouped_mm"))
    unwrapped = make_case(WIDE.replace(dtype=torch.float32), stock_function("grouped_mm"))
    graphs = Graphs()
    compiled = graphs.compile(case.module)
    with torch.no_grad():
        ours = compiled(*case.inputs)
        with diffulex.disabled():
            stock = compiled(*case.inputs)
            assert torch.equal(stock, Graphs().compile(unwrapped.module)(*case.inputs))
        assert torch.equal(compiled(*case.inputs), ours)
    assert graphs.ops() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_disabled_does_not_concern_the_explicit_name():
    """Who asks for the ops by name gets them."""
    case = make_case(WIDE.replace(dtype=torch.float32), registered("diffulex"))
    graphs = Graphs()
    with torch.no_grad(), diffulex.disabled():
        graphs.compile(case.module)(*case.inputs)
    assert graphs.ops() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("device", "ours"), [("cpu", True), ("cuda", True), ("meta", True), ("mps", False), ("xpu", False)]
)
def test_devices_without_kernels_keep_the_stock_function(device, ours, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(module_under_test, "diffulex_experts_forward", lambda *_args: "ours")
    forward = module_under_test._captured(lambda *_args: "stock")
    hidden = SimpleNamespace(device=torch.device(device))
    assert forward(torch.nn.Module(), hidden, None, None) == ("ours" if ours else "stock")


# The registry


def test_registering_again_changes_nothing():
    from transformers.integrations import moe

    before = {name: registered(name) for name in (*NAMES, "diffulex")}
    register(moe)
    assert {name: registered(name) for name in before} == before
    assert before["diffulex"] is diffulex_experts_forward
    for name in NAMES:
        assert before[name].__wrapped__ is stock_function(name)


def test_a_transformers_without_a_name_is_left_without_it():
    """An older or newer release may lack one of the functions."""

    class Functions(dict):
        def register(self, name, function):
            self[name] = function

    functions = Functions(grouped_mm=stock_function("grouped_mm"), other=len)
    register(type("Module", (), {"ALL_EXPERTS_FUNCTIONS": functions}))
    assert set(functions) == {"grouped_mm", "other", "diffulex"}
    assert functions["other"] is len
    assert functions["grouped_mm"].__name__ == "grouped_mm_experts_forward"


def test_the_hook_waits_for_one_module():
    assert module_under_test._MODULE == "transformers.integrations.moe"


# Models


def test_a_checkpoint_is_loaded_for_the_ops(tmp_path):
    stock = build_model("qwen3_moe", ONE_LAYER)
    stock.save_pretrained(tmp_path)
    model = type(stock).from_pretrained(tmp_path, experts_implementation="diffulex").eval()
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "diffulex"
    ids = token_ids(stock, 2, 5)
    wanted = stock.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_an_implementation_is_set_afterwards():
    model = build_model("gpt_oss", ONE_LAYER)
    ids = token_ids(model, 1, 5)

    def logits(which):
        return which(ids, use_cache=False).logits

    oracle = Oracle(model)
    with torch.no_grad(), CountOps() as counted:
        before = logits(model)
        assert not counted.calls
        model.set_experts_implementation("diffulex")
        after = logits(model)
    assert counted.calls["moe_combine"] == 1
    assert_oracle_ratio(after, before, oracle(logits, oracle.model))


class Scaled(torch.Tensor):
    """Integers with a scale for each row, which knows grouped GEMMs and no op of ours, as quantized weights do."""

    @staticmethod
    def __new__(cls, values, scale):
        options = {"dtype": scale.dtype, "device": values.device, "strides": values.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **options)

    def __init__(self, values, scale):
        self.values_ERD, self.scale_ER1 = values, scale

    def __repr__(self):  # torch's reads the values, which a traced one has not
        return f"Scaled({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["values_ERD", "scale_ER1"], None

    @staticmethod
    def __tensor_unflatten__(parts, meta, size, stride):
        return Scaled(parts["values_ERD"], parts["scale_ER1"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        first = args[0]
        if function in (aten.detach.default, aten.alias.default):
            parts = function(first.values_ERD), function(first.scale_ER1)
            return return_and_correct_aliasing(function, args, kwargs or {}, Scaled(*parts))
        if function is aten.transpose.int:
            return Scaled(first.values_ERD.transpose(*args[1:]), first.scale_ER1.transpose(*args[1:]))
        if function.namespace == "diffulex":
            raise NotImplementedError(str(function))
        plain = [a.values_ERD.to(a.scale_ER1.dtype) * a.scale_ER1 if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def scaled(weight):
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return torch.nn.Parameter(Scaled((weight / scale).round().to(torch.int8), scale), requires_grad=False)


def test_weights_of_a_subclass_keep_the_stock_function():
    """In the graph their products are plain ones again, which the passes rewrite."""
    block = build_model("qwen3_moe", ONE_LAYER, dtype=torch.bfloat16).model.layers[0].mlp
    for name in ("gate_up_proj", "down_proj"):
        setattr(block.experts, name, scaled(getattr(block.experts, name).data))
    hidden = torch.randn(1, 16, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    graphs = Graphs(run_passes)
    with torch.no_grad():
        out, eager = graphs.compile(block)(hidden), block(hidden)
    assert graphs.ops() == [[1, 1, 1, 1]]
    assert (out - eager).norm() < 1e-2 * eager.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_training_a_stock_block_through_inductor(family):
    """The whole road, C++ included: gradients of every parameter and of the input, by the error of eager mode."""
    block = build_model(family, ONE_LAYER).train().model.layers[0].mlp
    exact = build_model(family, ONE_LAYER, dtype=torch.float64).train().model.layers[0].mlp
    exact.experts.config._experts_implementation = "eager"
    hidden = torch.randn(1, 33, TINY.hidden, generator=torch.Generator().manual_seed(0))

    def gradients(run, module, hidden):
        hidden = hidden.detach().requires_grad_()
        out = run(hidden)
        out = out[0] if isinstance(out, tuple) else out
        weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        leaves = {"hidden": hidden, **dict(module.named_parameters())}
        found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
        return {"output": out.detach(), **dict(zip(leaves, found, strict=True))}

    ours = gradients(torch.compile(block), block, hidden)
    eager = gradients(block, block, hidden)
    wanted = gradients(exact, exact, hidden.double())
    for name, value in ours.items():
        assert_oracle_ratio(value, eager[name], wanted[name], what=name)
