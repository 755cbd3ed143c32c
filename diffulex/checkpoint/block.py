"""The parameters of one MoE block, and the stored tensors they correspond to under a naming scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowering.errors import MoECheckpointError, MoEDeviceError, MoERangeError

from .rules import Rule, pair

Owned = Collection[int] | Callable[[int], bool] | None


@dataclasses.dataclass(frozen=True)
class Block:
    """What a checkpoint's tensors go into and come from.

    params       parameter name -> tensor, see `rules`; any strides, any device but meta
    num_experts  experts E of the model; None: as many as w2 [E, H, I] has
    num_shared   shared experts that lie side by side in shared_experts.*
    interleaved  gate and up rows alternate in w13 and b13
    owned        the experts that w13, w2, b13, b2 have rows for, in this order; None: all
    """

    params: Mapping[str, Tensor]
    num_experts: int | None = None
    num_shared: int = 1
    interleaved: bool = False
    owned: tuple[int, ...] | None = None

    @property
    def total(self) -> int:
        """Experts of the model."""
        return self.params["w2"].shape[0] if self.num_experts is None else self.num_experts

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that there are rows for, in the order of the rows."""
        return tuple(range(self.total)) if self.owned is None else self.owned

    def check(self, where: str) -> None:
        """Raise where there is no w2, the rows are not the owned experts', or a parameter has no memory."""
        if "w2" not in self.params:
            raise MoECheckpointError.of(
                where,
                expected="the parameters of a MoE block, w2 [E, H, I] among them",
                got=", ".join(self.params) or "none",
                hint="Pass the MoE block itself, not the layer around it.",
            )
        rows, experts = self.params["w2"].shape[0], self.experts
        if len(experts) != rows or len({*experts}) != rows or any(not 0 <= e < self.total for e in experts):
            raise MoERangeError.of(
                where,
                expected=f"{rows} different experts of {self.total}, one per row of w2",
                got=f"{len(experts)}: {str(list(experts))[:80]}",
                hint="`owned` names the experts of this rank, `num_experts` all of the model.",
            )
        meta = [name for name, tensor in self.params.items() if tensor.is_meta]
        if meta:
            raise MoEDeviceError.of(
                where,
                expected="parameters with memory behind them",
                got=f"meta tensors: {', '.join(meta)}",
                hint="Call `block.to_empty(device=...)` first.",
            )


def block_of(module: nn.Module | Block, *, owned: Owned = None) -> Block:
    """The block of a MoE layer; `owned` picks experts by number or by predicate and overrides what the layer says."""
    if isinstance(module, Block):
        block = module
    else:
        module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
        spec: Any = module.spec
        shared = 1 if spec.shared is None else spec.shared.count
        params, held = dict(_tensors(module)), getattr(module, "owned_experts", None)
        block = Block(params, spec.experts.num_experts, shared, spec.experts.interleaved, held)
    if owned is None:
        return block
    chosen = filter(owned, range(block.total)) if callable(owned) else owned
    return dataclasses.replace(block, num_experts=block.total, owned=tuple(chosen))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, as `state_dict` names them; not what modules say of themselves beside them."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and name.rpartition(".")[2] != "_extra_state":
            yield name, value.detach()


class Part(NamedTuple):
    """Rows `start` to `stop` of a stored tensor, and the piece of a parameter they are; None: nothing reads them."""

    start: int
    stop: int
    piece: Tensor | None


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its full name, shape and dtype, and what is in it.

    whole: the stored tensor is one piece; else its rows are split among `parts`, in order.
    """

    key: str
    rule: Rule
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    interleaved: bool
    whole: bool

    def views(self, part: Part, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Views of the parameter and of stored rows [R, ...] of any dtype, alike in shape; None: no use."""
        if part.piece is None:
            return None
        if not self.whole and not self.rule.has("flat"):
            rows = rows[0]
        return pair(self.rule, part.piece, stored=rows, interleaved=self.interleaved)


def stored_tensors(block: Block, rules: tuple[Rule, ...], *, prefix: str) -> list[Stored]:
    """Every tensor that a checkpoint holds for the block under these rules.

    `prefix` ends in the layer's number and a dot. This is the one description that loading, saving and checking share.
    `MoECheckpointError` where a parameter has no name.
    """
    used = [rule for rule in rules if rule.param in block.params]
    nameless = sorted({*block.params} - {rule.param for rule in used})
    if nameless:
        raise MoECheckpointError.of(
            f"checkpoint {prefix.rstrip('.')}",
            expected="a naming scheme with a name for every parameter",
            got=f"none for {', '.join(nameless)}",
            hint="The model type is another one, or its row in diffulex/checkpoint/schemes.py lacks a rule.",
        )
    found: list[Stored] = []
    for rule in used:
        found.extend(_stored(block, rule, prefix))
    return found


def _stored(block: Block, rule: Rule, prefix: str) -> Iterator[Stored]:
    param = block.params[rule.param]
    if not rule.of_experts:
        shape = rule.piece_shape(tuple(param.shape), num_shared=block.num_shared)
        yield Stored(prefix + rule.key, rule, shape, param.dtype, (Part(0, shape[0], param),), False, True)
        return
    shape = rule.piece_shape(tuple(param.shape[1:]))
    if rule.per_expert:
        for row, expert in enumerate(block.experts):
            key = prefix + rule.key.format(e=expert)
            part = Part(0, shape[0], param[row])
            yield Stored(key, rule, shape, param.dtype, (part,), block.interleaved, True)
        return
    local = {expert: row for row, expert in enumerate(block.experts)}
    rows = block.params["gate.weight"].shape[0] if rule.has("null") else block.total
    step = shape[0] if rule.has("flat") else 1
    parts = tuple(
        Part(e * step, (e + 1) * step, param[local[e]] if e in local else None)
        for e in range(rows)
        if e in local or e >= block.total
    )
    full = (rows * step, *shape[1:]) if rule.has("flat") else (rows, *shape)
    yield Stored(prefix + rule.key, rule, full, param.dtype, parts, block.interleaved, False)
