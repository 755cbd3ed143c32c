"""The grouped-GEMM spine: transformers' own function in every form is rewritten and stays what it computes, inference
and training; what is not that spine is left alone, with a reason.
"""

import dataclasses

import pytest
import torch
from torch._dynamo import mark_dynamic

from lowering.errors import ReasonCode
from lowering.graph.dataflow import aten
from lowering.graph.spine_pass import spine_pass
from lowering.state import disabled
from tests.support import spines
from tests.support.experts import make_case, output_and_gradients
from tests.support.graphs import applied, backend_with, calls, trace
from tests.support.inputs import WIDE
from tests.support.models import FAMILIES, TINY, build_model
from tests.support.oracle import assert_oracle_ratio
from tests.support.spines import MATCHED, REFUSED

moe = torch.ops.diffulex
OPS = (moe.moe_dispatch.default, moe.moe_expert_up.default, moe.moe_expert_down.default, moe.moe_combine.default)


def gemms(graph):
    """The grouped GEMMs of the forward: torch's own and transformers'."""
    import transformers.integrations.moe  # noqa: F401  registers the op

    return calls(graph, aten._grouped_mm.default, torch.ops.transformers.grouped_mm_fallback.default)


def rewritten(spine, *inputs):
    """The graph of a function after the pass, what was recorded, and what the graph computed before."""
    records, module = [], trace(spine, *inputs)
    before = flat(module(*inputs))
    return applied(lambda graph: spine_pass(graph, record=records.append), module), records, before


def flat(value):
    return list(value) if isinstance(value, tuple | list) else [value]


# The steps one by one


@pytest.mark.parametrize("spine", MATCHED.values(), ids=MATCHED)
def test_a_spine_is_rewritten_and_computes_the_same(spine):
    inputs = spines.make_inputs()
    module, records, before = rewritten(spine, *inputs)
    assert [record.reason for record in records] == [None]
    assert [len(calls(module.graph, op)) for op in OPS] == [1, 1, 1, 1]
    assert not gemms(module.graph)
    assert not calls(module.graph, aten.sort.default, aten.sort.stable)
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    for ours, eager, oracle in zip(flat(module(*inputs)), before, flat(spine(*doubles)), strict=True):
        if eager.is_floating_point():
            assert_oracle_ratio(ours, eager, oracle)
        else:
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", REFUSED)
def test_another_spine_is_left_alone(name):
    spine, code, detail = REFUSED[name]
    inputs = spines.make_inputs()
    module, records, before = rewritten(spine, *inputs)
    assert records and records[0].reason is not None, "rewritten"
    assert (records[0].reason.code, detail in records[0].reason.detail) == (code, True), records[0].reason
    assert not calls(module.graph, *OPS)
    for ours, expected in zip(flat(module(*inputs)), before, strict=True):
        assert torch.equal(ours, expected)


def test_a_sum_that_stays_wider_than_the_gemms_is_left_alone():
    """The op's result has the dtype of its rows: in 16 bits, a sum over K that stays in fp32 holds more."""
    inputs = spines.make_inputs(torch.bfloat16)
    wide = spines.changed(mm=lambda self, rows, weight, offsets: torch._grouped_mm(rows, weight, offsets))
    module, records, before = rewritten(wide, *inputs)
    assert [record.reason and record.reason.code for record in records][:1] == [ReasonCode.DTYPE]
    assert torch.equal(module(*inputs), before[0])
    narrowed = spines.changed(wide, result=lambda self, total: (total.bfloat16(), total.bfloat16()))
    module, records, before = rewritten(narrowed, *inputs)
    assert [record.reason for record in records] == [None]
    exact = spines.changed()(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert_oracle_ratio(module(*inputs)[1], before[1], exact)


def _add_bias(up, down):
    up.kwargs = {"bias": up.args[1]}


def _widen(up, down):
    up.meta["val"] = up.meta["val"].float()


def _drop_offsets(up, down):
    up.args = up.args[:2]


def _flatten_weight(up, down):
    down.args[1].meta["val"] = down.args[1].meta["val"][0]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (_add_bias, "bias of its own"),
        (_widen, "a grouped GEMM over the dtypes"),
        (_drop_offsets, "from None"),
        (_flatten_weight, "ranks (2, 2)"),
    ],
)
def test_options_of_the_grouped_gemm(change, detail):
    """Changed by hand, as no CPU kernel takes them: only the graph is looked at."""
    spine = spines.changed(
        mm=lambda self, rows, weight, offsets: torch._grouped_mm(rows, weight, offsets),
        result=lambda self, total: total.bfloat16(),
    )
    module = trace(spine, *spines.make_inputs(torch.bfloat16))
    change(*gemms(module.graph))
    records = []
    spine_pass(module.graph, record=records.append)
    assert detail in records[0].reason.detail


# transformers' own function

FORMS = {
    "plain": WIDE,
    "gpt_oss": WIDE.replace(act="swiglu_oai", bias=True, interleaved=True, transposed=True),
    "nemotron_h": WIDE.replace(act="relu2"),
    "aria": WIDE.replace(transposed=True),
    "biased": WIDE.replace(act="geglu_tanh", bias=True),
    "sentinels": WIDE.replace(ids="sentinels", bias=True),
    "top1": WIDE.replace(top_k=1, ids="sparse"),
}


class Capture:
    """A stock module compiled with the pass; `graphs` are the rewritten ones, inference or joint."""

    def __init__(self, case, *, dynamic=False):
        torch._dynamo.reset()
        self.case, self.dynamic = case, dynamic
        self.records, self.graphs = [], []
        self.compiled = torch.compile(case.module, backend=backend_with(self.apply), fullgraph=True)

    def apply(self, graph):
        spine_pass(graph, record=self.records.append)
        self.graphs.append(graph)

    def __call__(self, *inputs):
        if self.dynamic:
            for tensor in inputs:
                mark_dynamic(tensor, 0)
        return self.compiled(*inputs)

    def check(self, *, joint):
        """One spine, rewritten; nothing of the stock forward is left, the backward has no permutation of its own."""
        assert [record.reason for record in self.records] == [None]
        (graph,) = self.graphs
        assert [len(calls(graph, op)) for op in OPS] == [1, 1, 1, 1]
        assert not calls(graph, aten.sort.default)
        assert bool(calls(graph, aten.cumsum.default)) == joint
        if not joint:
            assert not gemms(graph)
            assert not calls(graph, aten.histc.default)


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16", "fp32-dynamic"]
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_stock_inference(form, dtype, dynamic):
    case = make_case(form.replace(dtype=dtype))
    capture = Capture(case, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (form.tokens, 20) if dynamic else (form.tokens,):
            inputs = tuple(tensor[:tokens] for tensor in case.inputs)
            exact = case.oracle(*(tensor[:tokens] for tensor in case.oracle_inputs))
            assert_oracle_ratio(capture(*inputs), case.module(*inputs), exact, what=f"{tokens} tokens")
    capture.check(joint=False)


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.bfloat16, True), (torch.float32, False)], ids=["bf16-dynamic", "fp32"]
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_stock_training(form, dtype, dynamic):
    if dtype == torch.float32 and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this transformers cannot capture the backward of its fp32 grouped GEMM")
    case = make_case(form.replace(dtype=dtype))
    capture = Capture(case, dynamic=dynamic)
    ours = output_and_gradients(capture, case.module, case.inputs)
    capture.check(joint=True)
    eager = output_and_gradients(case.module, case.module, case.inputs)
    exact = output_and_gradients(case.oracle, case.oracle, case.oracle_inputs)
    for name, value in ours.items():
        assert_oracle_ratio(value, eager[name], exact[name], what=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_models_that_run_the_stock_function(family):
    """The registry switched off: the spine is found behind each family's router, for a symbolic number of tokens."""
    block = build_model(family, dataclasses.replace(TINY, layers=1), dtype=torch.bfloat16).model.layers[0].mlp
    records = []
    torch._dynamo.reset()
    backend = backend_with(lambda graph: spine_pass(graph, record=records.append))
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    hidden_BTH = torch.randn(1, 17, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    mark_dynamic(hidden_BTH, 1)
    with torch.no_grad(), disabled():
        ours, eager = flat(compiled(hidden_BTH))[0], flat(block(hidden_BTH))[0]
        block.experts.config._experts_implementation = "eager"  # no grouped GEMM takes fp64
        exact = flat(block.double()(hidden_BTH.double()))[0]
    assert [record.reason for record in records] == [None]
    assert_oracle_ratio(ours, eager, exact)
