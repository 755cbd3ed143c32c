"""The expert stage on a CPU in one go: what the ops compute, and only where nobody watches the ops."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lowering.activation import evaluate, split_gate
from lowering.ops import cpu_gemm
from lowering.ops.cpu_experts import CpuExperts, is_plain_inference
from lowering.state import batch_invariant
from tests.support.inputs import FORMS, LOW_DTYPES, WIDE_FORMS, make_block
from tests.support.oracle import CountOps, assert_near_exact, assert_oracle_ratio

ops = torch.ops.diffulex


def activation(form, pre_RJ):
    return evaluate(form.act, *split_gate(pre_RJ, form.act, interleaved=form.interleaved))


def experts_of(form, **options):
    block = make_block(form)
    w13, w2, b13, b2 = block.w13_EJH, block.w2_EHI, block.b13_EJ, block.b2_EH
    experts = CpuExperts(w13, w2, b13, b2, functools.partial(activation, form), **options)
    return experts, (block.hidden_TH, block.ids_TK, block.weights_TK)


def through_ops(form, experts, inputs, finish=None):
    hidden, ids, weights = inputs
    order, _, offsets = ops.moe_dispatch(ids, form.experts)
    pre = ops.moe_expert_up(hidden, experts.w13, experts.b13, order, offsets, form.top_k)
    slots = ops.moe_expert_down(activation(form, pre).contiguous(), experts.w2, experts.b2, order, offsets)
    return ops.moe_combine(slots if finish is None else finish(slots), weights)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_ops(form):
    experts, inputs = experts_of(form)
    assert_near_exact(experts(*inputs), through_ops(form, experts, inputs))


@pytest.mark.parametrize("rows_at_once", [1, 16, 256])
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_error_ratio(form, dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(cpu_gemm, "_ROWS_AT_ONCE", rows_at_once)
    exact, exact_inputs = experts_of(form)
    experts, inputs = experts_of(form.replace(dtype=dtype))
    oracle = through_ops(form, exact, exact_inputs)
    assert_oracle_ratio(experts(*inputs), through_ops(form, experts, inputs), oracle)


def test_a_step_before_the_weights():
    form, norm = (
        FORMS["plain"],
        functools.partial(torch.nn.functional.rms_norm, normalized_shape=(FORMS["plain"].hidden,)),
    )
    experts, inputs = experts_of(form, finish=norm)
    assert_near_exact(experts(*inputs), through_ops(form, experts, inputs, finish=norm))


def test_the_same_bits_every_time():
    experts, inputs = experts_of(WIDE_FORMS["plain"].replace(dtype=torch.bfloat16, tokens=300))
    first = experts(*inputs)
    assert all(torch.equal(experts(*inputs), first) for _ in range(5))


# Where it is used


def test_plain_inference():
    plain, parameter = torch.randn(2, 2), torch.nn.Parameter(torch.randn(2, 2))
    assert not is_plain_inference(plain, parameter), "gradients are wanted"
    with torch.no_grad():
        assert is_plain_inference(plain, parameter)
        assert not is_plain_inference(plain, plain.to("meta"))
        assert not is_plain_inference(plain, plain.as_subclass(Tagged))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_plain_inference(plain)
        with FakeTensorMode():
            assert not is_plain_inference(plain)
        with CountOps():
            assert not is_plain_inference(plain)
        with batch_invariant():
            assert not is_plain_inference(plain)
    with torch.inference_mode():
        assert is_plain_inference(torch.randn(2, 2))


class Tagged(torch.Tensor):
    """A subclass that may compute otherwise."""


def test_tracers_and_transforms_are_noticed():
    found = []

    def watched(x):
        found.append(is_plain_inference(x))
        return x + 1

    with torch.no_grad():
        make_fx(watched)(torch.randn(2))
        torch.vmap(watched)(torch.randn(2, 2))
        torch.jit.trace(watched, torch.randn(2), check_trace=False)
        torch.func.jvp(watched, (torch.randn(2),), (torch.randn(2),))
        torch.compile(watched, backend="eager")(torch.randn(2))
    assert found == [False] * 5
