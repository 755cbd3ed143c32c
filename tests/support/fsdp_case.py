"""What a rank of an FSDP2 test runs: a stock model, sharded, its decoder layers compiled one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import diffulex  # noqa: F401  captures the layers
from tests.support.graphs import Captured
from tests.support.models import ModelSizes, build_model, token_ids

LAYERS = 2


def loss_gradients(model: Any, ids: Tensor, *, call: Any = None) -> dict[str, Tensor]:
    """The gradient of every parameter that asks for one, of the mean loss over ids [B, T]."""
    model.zero_grad()
    (model if call is None else call)(ids, labels=ids, use_cache=False).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}


def sharded_gradients(rank: int, size: int, batch: int) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
    """(gradients over all ranks' rows, the ops in every graph); rank r takes an equal part of the rows."""
    model = build_model("qwen3_moe", ModelSizes(layers=LAYERS)).train()
    ids_BT = token_ids(model, batch, 9)
    captured = Captured()
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        layer.compile(backend=captured.backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = batch // size
    torch._dynamo.reset()
    return loss_gradients(model, ids_BT[rank * part : (rank + 1) * part]), captured.graphs
