"""Tensor descriptors that the host makes, for kernels with specialised warps: made on the device, the address of each
is computed of all of the grid, which takes a register where there is none, and each launch waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def host_descriptors(tensors: Mapping[str, Tensor], *, block_k: int, gather: bool) -> dict[str, Any]:
    """W_DESC of weights W [E, J, D] and, without `gather`, A_DESC of A [N, D], fp16 or bf16, as
    `moe_expert_gemm_specialized.jinja` reads them, `block_k` elements of D at a time.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    a, weight = tensors["A"], tensors["W"]
    num_experts, rows, depth = weight.shape
    stride = weight.stride(1)
    # of each 32 weight rows 0, 1, 8, 9, 16, 17, 24, 25, 2, 3 and so on: a thread of a product has columns 0, 1, 8,
    # 9 ... of 32, and here they are the weight rows 0 to 7
    descriptors = {
        "W_DESC": TensorDescriptor(
            weight,
            [num_experts * (rows // 32), 4, 4, 2, depth],
            [32 * stride, 2 * stride, 8 * stride, stride, 1],
            [4, 4, 4, 2, block_k],
            _layout(block_k, 5),
        )
    }
    if not gather:
        descriptors["A_DESC"] = TensorDescriptor(a, list(a.shape), list(a.stride()), [64, block_k], _layout(block_k, 2))
    return descriptors


@functools.cache  # an object takes the host 3 us, for each descriptor of each launch
def _layout(block_k: int, rank: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(2 * block_k, 16, rank)
