"""Cells: the GEMM that a graph of the layer is planned for, and the schedules that are timed."""

import pytest
import torch

from diffulex.benching.shapes import MORE_SHAPES, SHAPES, Case, Shape, case_of_shape
from diffulex.tuning.cells import BY_MODEL, Cell, cells_of, gemm_of, planned, tensors_of, to_time
from lowering.activation import is_gated
from lowering.schedule.device import H100
from lowering.schedule.plan import candidates, exact_schedule, plan
from lowering.schedule.schedule import GemmShape
from lowering.spec import ExpertSpec
from tests.support.benching import FORMS
from tests.support.benching import SHAPE as TINY


def tiny(form, **sizes):
    return Case(form, Shape(8, 2, 64, 32), FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gemm_is_what_a_graph_of_the_layer_plans_for(form, dtype):
    """By the weights that the ops are given, their strides too."""
    case = tiny(form)
    for stage in ("up", "down"):
        weight = tensors_of(Cell(case, stage, 4, dtype), "meta")["W"]
        gated = stage == "up" and is_gated(case.spec.act)
        sizes, size = tuple(weight.shape), dtype.itemsize
        expected = GemmShape.of_weight(sizes, weight.stride(), gated=gated, element_size=size)
        assert gemm_of(case, stage, dtype=dtype) == expected


def test_rows_that_no_descriptor_reads():
    spec = ExpertSpec(8, 60, 33, "silu(g) * u")
    case = Case("odd", Shape(8, 2, 60, 33), spec)
    assert [gemm_of(case, stage, dtype=torch.bfloat16).descriptors for stage in ("up", "down")] == [False, False]


@pytest.mark.parametrize("form", FORMS)
def test_operands_fit_one_another(form):
    for stage in ("up", "down"):
        cell = Cell(tiny(form), stage, 5, torch.float16)
        tensors = tensors_of(cell, "cpu")
        a, weight, bias = tensors["A"], tensors["W"], tensors["BIAS"]
        assert a.shape == (5 if stage == "up" else 10, weight.shape[2]) and a.dtype == weight.dtype == torch.float16
        assert weight.shape == (8, cell.gemm.width * (2 if cell.gemm.gated else 1), cell.gemm.depth)
        assert weight.is_contiguous() != cell.case.spec.transposed
        assert (bias is not None) == cell.case.spec.bias and (bias is None or bias.shape == weight.shape[:2])
        assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in tensors.values() if tensor is not None)


def test_equal_gemms_with_equal_rows_are_timed_once():
    plain = tiny("plain")
    again, other = Case("again", TINY, plain.spec), Case("other", Shape(8, 4, 64, 32), plain.spec)
    cells = cells_of([plain, again, other], [1, 2], dtype=torch.bfloat16)
    assert [(cell.case.name, cell.stage, cell.rows) for cell in cells] == [
        ("plain", "up", 2),
        ("plain", "down", 2),
        ("plain", "up", 4),
        ("plain", "down", 4),
        ("other", "up", 8),
        ("other", "down", 8),
    ]


@pytest.mark.parametrize("name", [*SHAPES, *MORE_SHAPES])
def test_planned_schedules_come_first_then_the_models_best(name):
    case = case_of_shape(name)
    gemms = tuple(gemm_of(case, stage, dtype=torch.bfloat16) for stage in ("up", "down"))
    ranges = plan(gemms, H100)
    for index, stage in enumerate(("up", "down")):
        for tokens in (1, 512, 16384):
            cell = Cell(case, stage, tokens)
            found = to_time(cell, H100, best=6)
            assert found[0] == planned(cell, H100)[BY_MODEL] in [r.schedules[index] for r in ranges]
            assert exact_schedule(cell.rows, cell.gemm, device=H100) in found
            assert (
                len(found) == len(set(found))
                and 6 <= len(found) <= 9
                and set(found) <= set(candidates(cell.gemm, H100))
            )


def test_all_that_could_win():
    cell = Cell(case_of_shape("qwen3"), "up", 16384)
    found = to_time(cell, H100, best=0)
    assert len(found) > 50 and min(s.block_m for s in found[3:]) == 64
    assert {s.block_m for s in to_time(Cell(cell.case, "up", 1), H100, best=0)} == {16}
