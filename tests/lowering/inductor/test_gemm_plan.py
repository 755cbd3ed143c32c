"""GEMMs that share a routing share their row ranges: one schedule each, one guard a bound, one graph a range."""

import dataclasses
import functools
import re

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from lowering.inductor import _compat, gemm_plan, offline
from lowering.inductor.fake_device import H100 as FAKE
from lowering.inductor.fake_device import fake_gpu
from lowering.inductor.gemm_plan import row_range, rows_bound
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.device import H100, DeviceSpec
from lowering.schedule.plan import exact_schedule, plan
from lowering.schedule.schedule import GemmShape, RowRange
from tests.support.blocks import Block
from tests.support.inputs import BlockForm
from tests.support.tuned import keep, model_times, some_factor, tuned_folder

moe = torch.ops.diffulex
UP, DOWN = GemmShape(128, 2048, 768, True), GemmShape(128, 768, 2048, False)
BOUNDS = [found.max_rows for found in plan((UP, DOWN), H100)]


def test_shapes():
    sizes, strides = (8, 64, 32), (2048, 32, 1)
    of_weight = functools.partial(GemmShape.of_weight, element_size=2)
    assert of_weight(sizes, strides, gated=True) == GemmShape(8, 32, 32, True, 2)
    assert GemmShape.of_weight(sizes, strides, gated=False, element_size=4) == GemmShape(8, 32, 64, False, 4)
    assert of_weight(sizes, (2048, 1, 64), gated=False) == GemmShape(8, 32, 64, False, 2, rows_follow=False)
    apart = GemmShape(8, 32, 64, False, 2, False, rows_follow=False)
    assert of_weight(sizes, (4096, 64, 2), gated=False) == apart
    assert of_weight(sizes, (4096, 32, 1), gated=False) == dataclasses.replace(apart, descriptors=True)


def graph_of(*stages):
    """A graph with one dispatch and the given stages, each ("up" or "down", weight shape), as planning reads it."""
    graph = Graph()

    def value(name, *shape):
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return node

    dispatch = graph.call_function(moe.moe_dispatch.default, (graph.placeholder("ids"), 8))
    order, offsets = (graph.call_function(lambda pair, i: pair[i], (dispatch, index)) for index in (0, 2))
    for index, (stage, shape) in enumerate(stages):
        weight = value(f"w{index}", *shape)
        if stage == "up":
            args = (graph.placeholder(f"x{index}"), weight, None, order, offsets, 2, "silu(g) * u")
            graph.call_function(moe.moe_expert_up.default, args)
        else:
            graph.call_function(
                moe.moe_expert_down.default, (graph.placeholder(f"x{index}"), weight, None, order, offsets)
            )
    return dispatch, offsets


def test_siblings_are_the_gemms_over_the_same_offsets():
    _, offsets = graph_of(("up", (8, 64, 32)), ("down", (8, 32, 32)), ("down", (8, 32, 32)))
    assert gemm_plan._siblings(offsets) == (GemmShape(8, 32, 32, True), GemmShape(8, 32, 32, False))


def answering(monkeypatch, rows):
    """Guards are answered for `rows` rows; returns the list of bounds asked for."""
    asked = []
    monkeypatch.setattr(_compat, "may_guard", lambda size: True)
    monkeypatch.setattr(_compat, "guard_less_equal", lambda size, bound: asked.append(bound) or rows <= bound)
    return asked


def test_a_range_is_found_by_the_guards_up_to_it(monkeypatch):
    symbol = sympy.Symbol("s0")
    for index, bound in enumerate(BOUNDS):
        rows = 1 << 30 if bound is None else bound
        asked = answering(monkeypatch, rows)
        assert row_range(symbol, (UP, DOWN), device=H100) == plan((UP, DOWN), H100)[index]
        assert asked == [b for b in BOUNDS[: index + 1] if b is not None]


@pytest.mark.parametrize("hint", [1, BOUNDS[0], BOUNDS[0] + 1, 1 << 30, None])
def test_without_guards_the_rows_compiled_for_choose_schedules_for_any_number(monkeypatch, hint):
    monkeypatch.setattr(_compat, "may_guard", lambda size: False)
    monkeypatch.setattr(_compat, "size_hint", lambda size: hint)
    monkeypatch.setattr(_compat, "known_less_equal", lambda size, bound: False)
    index = next(i for i, bound in enumerate(BOUNDS) if bound is None or (hint is not None and hint <= bound))
    expected = plan((UP, DOWN), H100)[index].schedules
    assert row_range(sympy.Symbol("s0"), (UP, DOWN), device=H100) == RowRange(None, expected)


def test_without_guards_a_bound_that_is_known_is_kept(monkeypatch):
    monkeypatch.setattr(_compat, "may_guard", lambda size: False)
    monkeypatch.setattr(_compat, "known_less_equal", lambda size, bound: bound >= BOUNDS[1])
    assert row_range(sympy.Symbol("u0"), (UP, DOWN), device=H100) == plan((UP, DOWN), H100)[1]


def test_dispatch_is_bounded_by_the_gemms_behind_it(monkeypatch):
    monkeypatch.setattr(gemm_plan, "device_spec", lambda index: H100)
    device, symbol = torch.device("cuda", 0), sympy.Symbol("s0")
    dispatch, _ = graph_of(("up", (128, 1536, 2048)), ("down", (128, 2048, 768)))
    assert rows_bound(640, dispatch, device=device) == 640
    asked = answering(monkeypatch, 1)
    assert rows_bound(symbol, dispatch, device=device) == BOUNDS[0] == asked[0]
    answering(monkeypatch, 1 << 30)
    assert rows_bound(symbol, dispatch, device=device) is None
    alone, _ = graph_of()
    assert rows_bound(symbol, alone, device=device) is None
    assert rows_bound(symbol, None, device=device) is None


# Whole graphs

WIDE = BlockForm(tokens=6, experts=64, top_k=4, hidden=256, width=128, dtype=torch.bfloat16)


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_gemm_of_a_graph_reports_the_same_ranges(dynamic):
    """Known row counts have the best schedules for them, not those of a range."""
    register_lowerings()
    function, device = Block(WIDE), DeviceSpec.of_properties(FAKE)
    inputs = function.inputs()
    for tensor in inputs[:3] if dynamic else []:
        torch._dynamo.mark_dynamic(tensor, 0)
    with collect() as decisions:
        offline.offline_source(function, inputs)
    (text,) = {decision.outcome for decision in decisions if decision.subject == "row_ranges"}
    shapes = (GemmShape(64, 256, 128, True), GemmShape(64, 128, 256, False))
    best = " and ".join(str(exact_schedule(24, shape, device=device)) for shape in shapes)
    assert text == ("; ".join(map(str, plan(shapes, device))) if dynamic else f"24 rows: {best}")


class Graphs:
    """Compiles for a faked H100 and counts; nothing runs: the result is an empty tensor of the right shape."""

    def __init__(self, block):
        self.inputs, self.codes = block.inputs(), []
        self.compiled = torch.compile(block, backend=self.backend, fullgraph=True)

    def backend(self, graph, examples):
        from torch._inductor.compile_fx import compile_fx

        output = next(node for node in graph.graph.nodes if node.op == "output").args[0][0]
        try:
            compile_fx(graph, examples)
        except offline._Captured as captured:
            self.codes.append(captured.wrapper_source)
        return lambda *args: (torch.empty(1, device="meta").expand(output.meta["example_value"].shape[1]),)

    def __call__(self, tokens, mode):
        hidden_TH, ids_TK, weights_TK, *weights = self.inputs
        tensors = (hidden_TH[:1].expand(tokens, -1), ids_TK[:1].expand(tokens, -1), weights_TK[:1].expand(tokens, -1))
        fakes = offline.fake_cuda([t.contiguous() for t in tensors] + weights, mode=mode)
        for tensor in fakes[:3]:
            torch._dynamo.mark_dynamic(tensor, 0)
        self.compiled(*fakes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
def test_one_graph_per_range_of_rows():
    """Symbolic T: row counts of one range share a graph, however many there are; each range has its own tiles."""
    register_lowerings()
    torch._dynamo.reset()
    shapes = (GemmShape(64, 256, 128, True), GemmShape(64, 128, 256, False))
    ranges = plan(shapes, DeviceSpec.of_properties(FAKE))
    bounds = [found.max_rows // WIDE.top_k for found in ranges[:-1]]
    assert bounds, "one range only: nothing to see"
    graphs = Graphs(Block(WIDE, tail=False))
    starts = [2, *(bound + 1 for bound in bounds)]
    stops = [*bounds, 20_000]
    with fake_gpu(), offline._quiet_compiler(None), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            for tokens in (start, (start + stop) // 2, stop):
                graphs(tokens, mode)
            assert len(graphs.codes) == index + 1, f"{start} to {stop} tokens"
    torch._dynamo.reset()
    for found, code in zip(ranges, graphs.codes, strict=True):
        for schedule in found.schedules:
            if schedule.loop.specialized:
                assert re.search(
                    rf"_expert_gemm_specialized\.default\(.*\[{schedule.block_m}, {schedule.block_n}, ", code
                )
            else:
                assert f"BLOCK_M : tl.constexpr = {schedule.block_m}" in code


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_says_whether_its_schedules_were_tuned(dynamic, tmp_path):
    """Times of the device that is faked, by its name; known row counts have the fastest measured schedules."""
    register_lowerings()
    function, device = Block(WIDE), DeviceSpec.of_properties(FAKE)
    shapes = (GemmShape(64, 256, 128, True), GemmShape(64, 128, 256, False))
    table = {shape: {24: model_times(shape, device, 24, factor=some_factor)} for shape in shapes}
    inputs = function.inputs()
    for tensor in inputs[:3] if dynamic else []:
        torch._dynamo.mark_dynamic(tensor, 0)

    def told():
        with collect() as decisions:
            offline.offline_source(function, inputs)
        return [{d.outcome for d in decisions if d.subject == name} for name in ("schedules", "row_ranges")]

    with tuned_folder(tmp_path):
        came_from, before = told()
        assert came_from == {"from the cost model"}
        keep(device, table)
        came_from, (after,) = told()
        assert came_from == {"from times measured on this device at 24 rows"}
        assert after not in before
        best = " and ".join(str(min(table[shape][24], key=table[shape][24].get)) for shape in shapes)
        assert after == ("; ".join(map(str, plan(shapes, device))) if dynamic else f"24 rows: {best}")
