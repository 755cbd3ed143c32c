"""MoE blocks -> checkpoint, under the names and in the layout that transformers reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowering.errors import MoECheckpointError, MoEOptionError, MoEUnsupportedError

from .block import Block, Stored, block_of, stored_tensors
from .load import Blocks
from .schemes import scheme_of
from .writer import Entry, bytes_of, write_shards


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """How to write a checkpoint.

    form            naming form of the scheme: "v5", or "v4" where the model type has one
    prefix          what stands in front of a layer's number; None: as in a plain causal language model of the type
    max_shard_size  bytes, or like "5GB"
    rest            the model's other tensors, by the names they get; saved as they are
    """

    form: str = "v5"
    prefix: str | None = None
    max_shard_size: int | str = "5GB"
    rest: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@torch.no_grad()
def save_checkpoint(blocks: Blocks, folder: str | Path, *, model_type: str, options: SaveOptions | None = None) -> None:
    """Write MoE blocks and the rest of a model as safetensors: what `load_checkpoint` and `from_pretrained` read.

    blocks      layer number -> MoE layer or `Block`, with all experts: w13 [E, J, H], w2 [E, H, I] and so on, any dtype
    folder      made if need be; may not hold a checkpoint yet
    model_type  picks the naming scheme

    Beside the model, memory holds one tensor of one expert.
    """
    options = options or SaveOptions()
    scheme = scheme_of(model_type)
    if options.form not in scheme.forms:
        raise MoEOptionError.of(
            "checkpoint",
            expected=f"a form of {', '.join(scheme.forms)}",
            got=repr(options.form),
            hint=f"{model_type} has no other names.",
        )
    prefix = scheme.layers if options.prefix is None else options.prefix
    entries: list[Entry] = []
    for layer, module in sorted(blocks.items()):
        block = block_of(module)
        block.check(f"checkpoint, layer {layer}")
        _check_all_experts(block, layer)
        stored = stored_tensors(block, scheme.forms[options.form], prefix=f"{prefix}{layer}.")
        entries += [Entry(t.key, t.shape, t.dtype, functools.partial(_pieces, t)) for t in stored]
    entries += [Entry(name, tuple(t.shape), t.dtype, functools.partial(_whole, t)) for name, t in options.rest.items()]
    twice = {entry.key for entry in entries[: len(entries) - len(options.rest)]} & {*options.rest}
    if twice:
        raise MoECheckpointError.of(
            f"checkpoint {folder}",
            expected="a rest without tensors of the MoE blocks",
            got=", ".join(sorted(twice)[:5]),
            hint="`load_checkpoint` returns the names that are the rest.",
        )
    write_shards(Path(folder), entries, max_shard_size=bytes_of(options.max_shard_size))


def _check_all_experts(block: Block, layer: int) -> None:
    if block.experts != tuple(range(block.total)):
        raise MoEUnsupportedError.of(
            f"checkpoint, layer {layer}",
            expected=f"all {block.total} experts, in order",
            got=str(list(block.experts))[:80],
            hint="Gather the experts of all ranks before saving.",
        )


def _whole(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _pieces(stored: Stored) -> Iterator[Tensor]:
    """The contents of a stored tensor in order, one expert's part at a time, each in the place of the one before."""
    if not stored.parts:  # no experts at all
        return
    first = stored.parts[0]
    shape = stored.shape if stored.whole else (first.stop - first.start, *stored.shape[1:])
    rows = torch.empty(shape, dtype=stored.dtype)
    for part in stored.parts:
        views = stored.views(part, rows)
        if views is None:
            rows.zero_()
        else:
            views[1].copy_(views[0])
        yield rows
