"""The attention kernel torch picks on an H100, for graphs traced where there is none.

`scaled_dot_product_attention` chooses in C++, from the device it finds; without one it falls to plain mathematics,
which would show kernels nobody runs on a GPU. The choice here follows the main rules of the CUDA dispatcher. The
kernel of cuDNN, which newer releases prefer in some cases, is shown as flash attention: both are one library call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


def sdpa_choice(
    query: torch.Tensor, key: torch.Tensor, *, value: torch.Tensor, mask: torch.Tensor | None
) -> SDPBackend:
    """Backend for query [B, N, T, D], key and value [B, G, S, D] and a bool or additive mask [B | 1, N | 1, T, S].

    Flash for 16-bit dtypes without a mask; memory-efficient for the rest when N = G; otherwise plain mathematics.
    """
    head_dim = query.shape[-1]
    if query.dim() != 4 or head_dim % 8 or head_dim != value.shape[-1] or query.dtype is torch.float64:
        return SDPBackend.MATH
    if mask is None and query.dtype in (torch.float16, torch.bfloat16) and head_dim <= 256:
        return SDPBackend.FLASH_ATTENTION
    return SDPBackend.EFFICIENT_ATTENTION if query.shape[1] == key.shape[1] else SDPBackend.MATH


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as CUDA decomposes it: shapes and dtypes of `sdpa_choice`, to [B, N, T, D]."""
    op = aten.scaled_dot_product_attention.default
    choice = sdpa_choice(query, key, value=value, mask=attn_mask) if query.device.type == "cuda" else SDPBackend.MATH
    if choice is SDPBackend.MATH:
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return op._op_dk(composite, query, key, value, attn_mask, dropout_p, is_causal, **options)
    scale = options.get("scale")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if choice is SDPBackend.FLASH_ATTENTION:
        flash = aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    efficient = aten._scaled_dot_product_efficient_attention.default
    return efficient(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The additive mask [B, N, T, S], its rows padded to 8 elements in memory as the kernel wants them."""
    if mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    keys = key.shape[-2]
    if not isinstance(keys, int) or keys % 8:
        mask = torch.nn.functional.pad(mask, (0, (-keys) % 8))[..., :keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[-2], keys)


# Composite ops that CUDA decomposes by what the device can do, and how it does on an H100.
GPU_DECOMPOSITIONS = {aten.scaled_dot_product_attention.default: _sdpa}
