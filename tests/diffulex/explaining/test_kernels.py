"""Generated kernels belong to the stage they are called after, and to the layer whose turn it is."""

import pytest

from diffulex.explaining.kernels import named, shares, stage_of_kernel
from lowering.report import OWN_KERNEL, Decision

UP = Decision("lower", "moe_expert_up", "layers.0", "triton up")
ROUTE = Decision("lower", "moe_route", "layers.0", "triton moe_route_linear")
FIRST, SECOND = "triton_tem_fused_moe_expert_up_1", "triton_tem_fused_moe_expert_up_2"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("triton_tem_fused__to_copy_add_embedding_mean_moe_expert_up_mul_pow_rsqrt_view_12", "moe_expert_up"),
        ("triton_tem_fused_moe_expert_down_shared_18", "moe_expert_down"),
        ("triton_tem_fused_moe_route_linear_view_14", "moe_route"),
        ("triton_red_fused__to_copy_add_mean_moe_combine_moe_expert_up_16", "moe_expert_up"),
        ("triton_poi_fused_add_1", None),
        ("_moe_expert_up_kernel", None),
        ("_moe_expert_up_0123abcd_kernel", "moe_expert_up"),
        ("_moe_expert_down_0123abcd_unread_kernel", "moe_expert_down"),
        ("_moe_expert_up_0123abcd_kernel_2", None),
    ],
)
def test_the_stage_of_a_kernel(name, stage):
    assert stage_of_kernel(name) == stage


def test_layers_get_the_launches_of_their_turn():
    found = named([UP, UP], [FIRST, "triton_poi_fused_add_0", SECOND])
    assert [decision.kernels for decision in found] == [(FIRST,), (SECOND,)]


def test_a_stage_of_two_kernels_has_both_and_one_launched_twice_is_named_once():
    launched = ["triton_tem_fused_moe_route_linear_1", "triton_tem_fused_moe_route_linear_2"]
    assert named([ROUTE], launched)[0].kernels == tuple(launched)
    assert named([ROUTE], launched[:1] * 2)[0].kernels == (launched[0],)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_launches_that_do_not_come_out_even_are_nobodys(count):
    assert [decision.kernels for decision in named([UP, UP], [FIRST] * count)] == [(), ()]


def test_ops_with_their_own_kernel_have_no_generated_one():
    own = Decision("lower", "moe_expert_up", "layers.1", OWN_KERNEL)
    assert [decision.kernels for decision in named([own, UP], [FIRST])] == [(), (FIRST,)]


def test_kernels_that_the_code_calls_by_an_op_are_told_by_the_decision():
    called = Decision("lower", "moe_expert_up", "layers.1", "gluon moe_expert_up_0123abcd 192x128x64")
    found = named([UP, called, UP], [FIRST, SECOND])
    assert [decision.kernels for decision in found] == [(FIRST,), ("_moe_expert_up_0123abcd_kernel",), (SECOND,)]


def test_shares_are_in_order():
    assert shares("abcdef", 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert shares("abc", 2) == shares("", 2) == shares("abc", 0) == []
