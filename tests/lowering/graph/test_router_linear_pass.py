"""The router's product reads 16-bit operands only where that loses nothing, and only on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lowering import ops
from lowering.errors import ReasonCode
from lowering.graph.router_linear_pass import RouterLinearRecord, router_linear_pass

T, H, E = 6, 16, 8


def _route(logits):
    return ops.moe_route(logits, None, None, 2)


FORMS = {
    "cast": lambda x, w: _route(x.float() @ w.float().t()),
    "cast_after_transpose": lambda x, w: _route(x.float() @ w.t().float()),
    "no_cast": lambda x, w: _route(x @ w.t()),
    "scaled": lambda x, w: _route((x.float() * 2) @ w.float().t()),
    "one_side": lambda x, w: _route(x.float() @ (w.float() + 1).t()),
    "no_product": lambda x, w: _route(x.float()[:, :E]),
}


def _graph(form, device="cuda", dtype=torch.bfloat16):
    """A graph of fake tensors, so that CUDA needs no device; slices do, that form is traced on the CPU."""
    with FakeTensorMode():
        x, w = torch.empty(T, H, dtype=dtype, device=device), torch.empty(E, H, dtype=dtype, device=device)
        return make_fx(FORMS[form])(x, w).graph


def _run(graph) -> list[RouterLinearRecord]:
    found: list[RouterLinearRecord] = []
    router_linear_pass(graph, record=found.append)
    graph.lint()
    return found


def _products(graph):
    return [node for node in graph.nodes if node.target in (torch.ops.aten.mm.default, torch.ops.aten.mm.dtype)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["cast", "cast_after_transpose"])
def test_cast_operands_are_read_as_they_are(form, dtype):
    graph = _graph(form, dtype=dtype)
    (found,) = _run(graph)
    assert found.reason is None
    (product,) = _products(graph)
    assert product.target is torch.ops.aten.mm.dtype
    assert [arg.meta["val"].dtype for arg in product.args[:2]] == [dtype, dtype]
    assert [tuple(arg.meta["val"].shape) for arg in product.args[:2]] == [(T, H), (H, E)]
    assert product.meta["val"].dtype == torch.float32
    casts = [node for node in graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert not casts, "the casts are gone"


@pytest.mark.parametrize("form", ["no_cast", "scaled", "one_side"])
def test_other_products_stay(form):
    graph = _graph(form)
    before = [node.target for node in graph.nodes]
    (found,) = _run(graph)
    assert found.reason is not None
    assert found.reason.code is ReasonCode.DTYPE
    assert [node.target for node in graph.nodes] == before


def test_logits_that_are_no_product_stay():
    (found,) = _run(_graph("no_product", device="cpu"))
    assert found.reason is not None
    assert found.reason.code is ReasonCode.STRUCTURE


def test_the_cpu_has_no_such_product():
    (found,) = _run(_graph("cast", device="cpu"))
    assert found.reason is not None
    assert found.reason.code is ReasonCode.NOT_CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_far_more_exact_than_its_operands(dtype):
    """The matrix units' fp32 sums are off by some 1e-6, a thousandth of the rounding that made the operands."""
    x = torch.randn(300, 1024, device="cuda").to(dtype)
    w = torch.randn(64, 1024, device="cuda").to(dtype)
    exact = x.double() @ w.double().t()
    error = torch.mm(x, w.t(), out_dtype=torch.float32) - exact
    assert error.norm() <= exact.norm() * torch.finfo(dtype).eps / 500
