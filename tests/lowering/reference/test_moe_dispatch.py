"""The oracle of dispatch, by hand and against Python's own stable sort."""

import pytest
import torch

from lowering.reference.moe_dispatch import moe_dispatch_reference


def test_by_hand():
    ids = torch.tensor([[2, 0], [7, 2], [0, -1]])
    order, token, offsets = moe_dispatch_reference(ids, 3)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]
    assert token.tolist() == [0, 2, 0, 1, 1, 2]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert {order.dtype, token.dtype, offsets.dtype} == {torch.int32}


@pytest.mark.parametrize("num_experts", [1, 4, 9])
def test_equals_a_stable_sort(num_experts):
    ids = torch.randint(-2, num_experts + 3, (30, 3), generator=torch.Generator().manual_seed(0))
    experts = [i if 0 <= i < num_experts else num_experts for i in ids.flatten().tolist()]
    order, token, offsets = moe_dispatch_reference(ids, num_experts)
    assert order.tolist() == sorted(range(90), key=experts.__getitem__)
    assert token.tolist() == [slot // 3 for slot in order.tolist()]
    assert offsets.tolist() == [sum(e < bound for e in experts) for bound in range(num_experts + 1)]


def test_no_tokens():
    order, token, offsets = moe_dispatch_reference(torch.zeros(0, 2, dtype=torch.int32), 3)
    assert order.shape == token.shape == (0,)
    assert offsets.tolist() == [0, 0, 0, 0]
