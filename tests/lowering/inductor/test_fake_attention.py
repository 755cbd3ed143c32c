"""Attention in a graph traced for the faked device is the library call that the device would make."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from lowering.inductor.fake_attention import sdpa_choice
from lowering.inductor.offline import offline_source

sdpa = torch.nn.functional.scaled_dot_product_attention
FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def tensors(heads=4, kv_heads=4, head_dim=32, dtype=torch.bfloat16):
    query = torch.empty(2, heads, 17, head_dim, dtype=dtype)
    return [query, *(torch.empty(2, kv_heads, 17, head_dim, dtype=dtype) for _ in range(2))]


MASK = torch.ones(2, 1, 17, 17, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shape", "mask", "choice"),
    [
        ({}, None, FLASH),
        ({"kv_heads": 2}, None, FLASH),
        ({"head_dim": 256}, None, FLASH),
        ({"head_dim": 512}, None, EFFICIENT),
        ({"dtype": torch.float32}, None, EFFICIENT),
        ({}, MASK, EFFICIENT),
        ({"kv_heads": 2}, MASK, MATH),
        ({"head_dim": 30}, None, MATH),
        ({"dtype": torch.float64}, None, MATH),
    ],
)
def test_choice(shape, mask, choice):
    query, key, value = tensors(**shape)
    assert sdpa_choice(query, key, value=value, mask=mask) is choice


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("fn", "inputs", "called"),
    [
        (lambda q, k, v: sdpa(q, k, v, is_causal=True), tensors(), "_scaled_dot_product_flash_attention"),
        (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), tensors(kv_heads=2), "_scaled_dot_product_flash_attention"),
        (lambda q, k, v, mask: sdpa(q, k, v, mask), [*tensors(), MASK], "_scaled_dot_product_efficient_attention"),
        (lambda q, k, v: sdpa(q, k, v), tensors(head_dim=30), "bmm"),
    ],
    ids=["flash", "grouped", "masked", "mathematics"],
)
def test_the_call_is_in_the_code(fn, inputs, called, dynamic):
    code = offline_source(fn, inputs, dynamic=dynamic)
    assert [call for call in code.extern_calls if called in call]
    assert ("bmm" in called) == any("bmm" in call for call in code.extern_calls)
