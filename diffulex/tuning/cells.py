"""A cell of tuning: one of the two expert GEMMs of a layer at one token count, and the schedules to time for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.activation import canonical, is_gated
from lowering.schedule.cost_model import score
from lowering.schedule.device import DeviceSpec
from lowering.schedule.plan import candidates, exact_schedule, plan, range_of, schedule_for
from lowering.schedule.schedule import GemmShape, Schedule

from ..benching.shapes import Case

STAGES = ("up", "down")
BY_MODEL, BY_MODEL_FOR_ROWS, NOW = "the cost model", "the cost model for just these rows", "the plan in force"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One of the GEMMs of a layer's experts over the slots of so many tokens."""

    case: Case
    stage: str
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.case.name} {self.stage}, {self.tokens} tokens"

    @property
    def rows(self) -> int:
        """Slots, tokens times experts a token."""
        return self.tokens * self.case.shape.top_k

    @property
    def by_vectors(self) -> bool:
        """Whether compiled graphs have no schedule here, see `lowering.templates.vectors`."""
        return self.tokens == 1 and not (self.case.spec.bias or self.case.spec.transposed)

    @property
    def gemm(self) -> GemmShape:
        """The GEMM, as it is planned for."""
        return gemm_of(self.case, self.stage, dtype=self.dtype)


def cells_of(cases: Iterable[Case], tokens: Sequence[int], *, dtype: torch.dtype) -> list[Cell]:
    """The cells of some layers, without those that have the GEMM and the rows of one before."""
    cells: dict[tuple[GemmShape, int], Cell] = {}
    for case, count, stage in itertools.product(cases, tokens, STAGES):
        cell = Cell(case, stage, count, dtype)
        cells.setdefault((cell.gemm, cell.rows), cell)
    return list(cells.values())


def gemm_of(case: Case, stage: str, *, dtype: torch.dtype) -> GemmShape:
    """The GEMM of a stage of a layer, "up" or "down", with weights in a dtype."""
    weight = weights_of(case, stage, dtype=dtype, device="meta")
    gated = stage == "up" and is_gated(case.spec.act)
    return GemmShape.of_weight(tuple(weight.shape), weight.stride(), gated=gated, element_size=dtype.itemsize)


def weights_of(case: Case, stage: str, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Weights [E, J, H] or [E, H, I] of a stage in a dtype, not filled; a view as the ops see them."""
    spec = case.spec
    sizes = (2 if is_gated(spec.act) else 1) * spec.intermediate_size, spec.hidden_size
    rows, depth = sizes if stage == "up" else (spec.hidden_size, spec.intermediate_size)
    stored = (spec.num_experts, depth, rows) if spec.transposed else (spec.num_experts, rows, depth)
    weight = torch.empty(stored, dtype=dtype, device=device)
    return weight.transpose(1, 2) if spec.transposed else weight


def planned(cell: Cell, device: DeviceSpec) -> dict[str, Schedule]:
    """The schedules that a graph can have for these rows, by who chose them.

    By the cost model alone, in a graph for any number of tokens and in one for just these; and as plans are now.
    """
    gemms = tuple(dict.fromkeys(gemm_of(cell.case, stage, dtype=cell.dtype) for stage in STAGES))
    index = gemms.index(cell.gemm)
    model, now = (range_of(cell.rows, plan(gemms, device, tuned=tuned)).schedules[index] for tuned in (False, True))
    exact = exact_schedule(cell.rows, cell.gemm, device=device, tuned=False)
    return {BY_MODEL: model, BY_MODEL_FOR_ROWS: exact, NOW: now}


def to_time(cell: Cell, device: DeviceSpec, *, best: int) -> list[Schedule]:
    """The planned schedules, then those that the model ranks first, `best` of them; 0: all but hopeless ones."""
    gemm, rows = cell.gemm, cell.rows
    found = candidates(gemm, device)
    if best:
        found = sorted(found, key=lambda schedule: score(rows, gemm, schedule=schedule, device=device))[:best]
    else:  # tiles far from the rows that an expert gets cannot win and take long
        own = max(1.0, rows / gemm.num_experts)
        found = [schedule for schedule in found if min(64, own / 8) <= schedule.block_m <= max(16, 4 * own)]
    alone = schedule_for(rows, gemm, device=device)  # in eager mode, where GEMMs are planned one by one
    return list(dict.fromkeys([*planned(cell, device).values(), alone, *found]))


def tensors_of(cell: Cell, device: torch.device | str) -> dict[str, Any]:
    """Random operands by their names in the kernel, in the cell's dtype: A [T, H] or [N, I], W [E, J, H] or [E, H, I],
    BIAS [E, J] or None.
    """
    spec = cell.case.spec
    weight = weights_of(cell.case, cell.stage, dtype=cell.dtype, device=device)
    a = weight.new_empty(cell.tokens if cell.stage == "up" else cell.rows, weight.shape[2]).normal_()
    bias = weight.new_empty(weight.shape[:2]).normal_() if spec.bias else None
    weight.normal_(std=0.02)
    return {"A": a, "W": weight, "BIAS": bias}


def act_of(cell: Cell) -> str:
    """The formula that the up stage applies."""
    return canonical(cell.case.spec.act)
