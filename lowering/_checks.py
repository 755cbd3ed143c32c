"""Checks of arguments and records: static properties only, so they hold for symbolic sizes and cost a few 100 ns."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import MoEDeviceError, MoEDtypeError, MoEShapeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int32, torch.int64)
_FLOAT_WORDS = ("fp32, fp16, bf16 or fp64", "Cast it; quantised values are not taken here.")
_INT_WORDS = ("int32 or int64", "Use what moe_route and moe_dispatch return.")


def check_rank(where: str, name: str, tensor: Tensor, rank: int) -> None:
    """`MoEShapeError` unless `tensor` (any dtype) has `rank` dimensions, e.g. [T, H] for rank 2."""
    if tensor.dim() != rank:
        raise MoEShapeError.of(
            where,
            expected=f"{name} of rank {rank}",
            got=f"shape {tuple(tensor.shape)}",
            hint="Flatten batch and sequence to one token dimension first.",
        )


def check_shape(where: str, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """`MoEShapeError` unless `tensor`, of any dtype, has this shape, e.g. (T, None) for [T, anything]."""
    sizes = zip(shape, tensor.shape, strict=False)
    if tensor.dim() != len(shape) or not all(want in (None, size) for want, size in sizes):
        raise MoEShapeError.of(
            where,
            expected=f"{name} of shape [{', '.join('any' if size is None else str(size) for size in shape)}]",
            got=f"shape {tuple(tensor.shape)}",
            hint="Pass tensors that describe the same tokens.",
        )


def check_float(where: str, name: str, tensor: Tensor) -> None:
    """`MoEDtypeError` unless `tensor` of any shape [..., H] is fp32, fp16, bf16 or fp64."""
    _check_dtype(where, name, tensor, FLOATS, _FLOAT_WORDS)


def check_int(where: str, name: str, tensor: Tensor) -> None:
    """`MoEDtypeError` unless `tensor` of any shape [N] is int32 or int64."""
    _check_dtype(where, name, tensor, INTS, _INT_WORDS)


def _check_dtype(
    where: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], words: tuple[str, str]
) -> None:
    if tensor.dtype not in dtypes:
        listed, hint = words
        raise MoEDtypeError.of(where, expected=f"{name} in {listed}", got=str(tensor.dtype), hint=hint)


def check_same(where: str, first: tuple[str, Tensor], other: tuple[str, Tensor | None]) -> None:
    """`MoEDtypeError` / `MoEDeviceError` unless both tensors, of any shape [..., H], share dtype and device."""
    (name, tensor), (other_name, other_tensor) = first, other
    if other_tensor is None:
        return
    if tensor.dtype != other_tensor.dtype:
        raise MoEDtypeError.of(
            where,
            expected=f"{other_name} in the dtype of {name} ({tensor.dtype})",
            got=str(other_tensor.dtype),
            hint=f"Cast one of them: {other_name}.to({name}.dtype).",
        )
    check_device(where, first, other)


def check_device(where: str, first: tuple[str, Tensor], other: tuple[str, Tensor | None]) -> None:
    """`MoEDeviceError` unless both tensors, of any shape [..., H] and dtype, live on one device."""
    (name, tensor), (other_name, other_tensor) = first, other
    if other_tensor is not None and tensor.device != other_tensor.device:
        raise MoEDeviceError.of(
            where,
            expected=f"{other_name} on {tensor.device} like {name}",
            got=str(other_tensor.device),
            hint="Move all tensors of the block to one device.",
        )


def check_size(where: str, what: str, size: int, wanted: int) -> None:
    """`MoEShapeError` unless a static size (e.g. H of a weight [E, J, H], any dtype) is `wanted`; symbols pass."""
    if isinstance(size, int) and isinstance(wanted, int) and size != wanted:
        raise MoEShapeError.of(
            where, expected=f"{what} = {wanted}", got=str(size), hint="Check that the tensors belong to one layer."
        )
