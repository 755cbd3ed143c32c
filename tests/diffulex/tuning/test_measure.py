"""What the measuring does around the timing itself: kernels are compiled once, and only right ones are timed."""

import functools
import math
import multiprocessing
import time
from multiprocessing.pool import ThreadPool
from unittest import mock

import pytest
import torch

from diffulex.benching.inputs import ROUTINGS
from diffulex.benching.shapes import Case, case_of_shape
from diffulex.tuning import measure
from diffulex.tuning.cells import Cell, tensors_of
from diffulex.tuning.measure import OnGpu, compare, compile_job, kernel_of, launch, stays_in_place, tolerance
from lowering.inductor.fake_device import fake_gpu
from lowering.reference.moe_expert_down import moe_expert_down_reference
from lowering.reference.moe_expert_up import moe_expert_up_reference
from lowering.schedule.device import H100
from lowering.schedule.plan import candidates
from lowering.schedule.schedule import Loop, Schedule
from tests.support.benching import FORMS, SHAPE
from tests.support.launches import interpret

PLAIN = Case("plain", SHAPE, FORMS["plain"])
FIRST, SECOND = Schedule(16, 32, 32, 4, 3), Schedule(16, 16, 64, 4, 3, Loop(grouped=True))


def routing(cell, law="uniform"):
    return measure.draw_routing(cell, law, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("stage", ["up", "down"])
def test_schedules_that_compute_the_same_are_right(form, tokens, stage, monkeypatch):
    """The launches themselves, in Triton's interpreter; for one token the first schedule leaves the slots in place."""
    interpret(monkeypatch)
    cell = Cell(Case(form, SHAPE, FORMS[form]), stage, tokens, torch.float32)
    assert stays_in_place(cell, FIRST) == (tokens == 1) and not stays_in_place(cell, SECOND)
    tensors = tensors_of(cell, "cpu")
    calls = {s: functools.partial(launch, cell, tensors, schedule=s) for s in (FIRST, SECOND)}
    slots = routing(cell)
    errors, refused = compare(cell, calls, routing=slots)
    assert list(errors) == [FIRST, SECOND] and not refused
    a, weight, bias = (value if value is None else value.double() for value in tensors.values())
    if stage == "up":
        form = {"act": cell.case.spec.act, "interleaved": cell.case.spec.interleaved, "top_k": 2}
        exact = moe_expert_up_reference(a, weight, *slots[1:], b13_EJ=bias, **form)
    else:
        exact = moe_expert_down_reference(a, weight, *slots[1:], b2_EH=bias)
    assert (calls[FIRST](*slots) - exact).norm() < tolerance(cell) * exact.norm()
    assert errors[FIRST] == 0 <= errors[SECOND] < tolerance(cell)


def calling(*results):
    """A schedule for each result; an exception is raised."""

    def call(result, ids, order, offsets):
        if isinstance(result, Exception):
            raise result
        return result

    return {Schedule(16, 16, 16, 4, n): functools.partial(call, result) for n, result in enumerate(results)}


CELL = Cell(PLAIN, "up", 5)
OUT = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))


def test_what_differs_or_does_not_run_is_not_timed():
    wrong, stray = OUT.clone(), OUT.clone()
    wrong[3] = 0.0
    stray[0, 0] = math.nan
    near = OUT * (1 + tolerance(CELL) / 2)
    calls = calling(OUT, near, wrong, stray, RuntimeError("out of resource"), -OUT, OUT)
    errors, refused = compare(CELL, calls, routing=(None, None, None))
    assert [s.num_stages for s in errors] == [0, 1, 6] and [s.num_stages for s in refused] == [2, 3, 4, 5]
    assert "differs from the planned schedule's result by" in next(iter(refused.values()))
    assert list(refused.values())[2] == "RuntimeError: out of resource"


@pytest.mark.parametrize("first", [RuntimeError("no"), OUT * math.nan, OUT * 0], ids=["raises", "nan", "zero"])
def test_without_a_result_to_compare_with_nothing_is_right(first):
    errors, refused = compare(CELL, calling(first, OUT, OUT), routing=(None, None, None))
    assert not errors and len(refused) == 1


def test_two_roundings_are_allowed_for():
    wide = torch.randn(64, 256, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = wide.to(dtype).double()
        assert (rounded - wide).norm() / wide.norm() < tolerance(Cell(PLAIN, "up", 5, dtype)) / 4
    assert tolerance(Cell(PLAIN, "up", 5, torch.float32)) < 1e-4


def test_a_kernel_is_compiled_once_for_all_row_counts_it_is_the_same_for():
    kernels = [kernel_of((Cell(PLAIN, "up", tokens), FIRST)) for tokens in (2, 3, 8, 64, 4096)]
    assert len(set(kernels)) == 2 and kernels[0] == kernels[1] != kernels[2] == kernels[4]
    assert kernel_of((Cell(PLAIN, "up", 1), FIRST)) != kernels[0]  # whose slots stay in place
    assert kernel_of((Cell(PLAIN, "up", 8), SECOND)) != kernels[2] != kernel_of((Cell(PLAIN, "down", 8), FIRST))


class Results:
    """Of a pool: one problem, then nothing for ever."""

    def __init__(self, count):
        self.left = count

    def next(self, timeout):
        self.left -= 1
        if self.left < 0:
            raise multiprocessing.TimeoutError
        return "too large"


class Pool:
    def imap(self, function, jobs):
        self.function, self.jobs = function, list(jobs)
        return Results(1)


def test_problems_of_a_kernel_are_those_of_all_its_cells_and_time_is_kept():
    pool = Pool()
    jobs = [(Cell(PLAIN, "up", tokens), schedule) for schedule in (FIRST, SECOND) for tokens in (8, 16)]
    problems = OnGpu(pool, most_shared=7, routing="uniform").prepare(jobs, deadline=time.monotonic() - 1)
    assert problems == dict.fromkeys(jobs[:2], "too large")
    assert len(pool.jobs) == 2 and pool.function.func is compile_job and pool.function.keywords == {"most_shared": 7}


def test_without_a_limit_all_kernels_are_waited_for(monkeypatch):
    """By a real pool: its timeouts are limited."""
    monkeypatch.setattr(measure, "compile_job", lambda job, most_shared: f"no {job[0].stage}")
    jobs = [(Cell(PLAIN, stage, 8), FIRST) for stage in ("up", "down")]
    with ThreadPool(1) as pool:
        problems = OnGpu(pool, most_shared=7, routing="uniform").prepare(jobs, deadline=math.inf)
    assert list(problems.values()) == ["no up", "no down"]


@pytest.mark.parametrize("law", ROUTINGS)
def test_tokens_choose_as_asked_for(law):
    """Slots in the order of experts, then tokens; a token's experts ascend; so many tokens go to the popular one."""
    cell = Cell(PLAIN, "up", 2048)
    ids_TK, order_N, offsets_E1 = routing(cell, law)
    sorted_N, stable_N = ids_TK.reshape(-1).sort(stable=True)
    assert torch.equal(order_N, stable_N.int()) and offsets_E1.dtype == order_N.dtype == torch.int32
    assert torch.equal(offsets_E1, torch.searchsorted(sorted_N, torch.arange(9)).int())
    assert (ids_TK[:, 0] < ids_TK[:, 1]).all()
    most = int(offsets_E1.diff().max()) / cell.tokens
    assert {"uniform": 0.23 < most < 0.29, "zipf": 0.5 < most < 0.75, "one-hot": most == 1}[law]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
@pytest.mark.parametrize("stage", ["up", "down"])
@pytest.mark.parametrize("shape", ["qwen3", "mixtral"])
def test_kernels_with_specialised_warps_are_compiled_ahead(stage, shape):
    cell = Cell(case_of_shape(shape), stage, 512)
    assert cell.gemm.specialized in candidates(cell.gemm, H100)
    with fake_gpu():
        assert compile_job((cell, cell.gemm.specialized), most_shared=232_448) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
@pytest.mark.parametrize(("form", "stage", "tokens"), [("gpt_oss", "up", 8), ("plain", "down", 8), ("plain", "up", 1)])
def test_kernels_are_compiled_for_the_device_ahead(form, stage, tokens):
    cell = Cell(Case(form, SHAPE, FORMS[form]), stage, tokens)
    schedule = Schedule(64, 32, 32, 4, 3, Loop(tma=True)) if stage == "down" else FIRST
    with fake_gpu():
        assert compile_job((cell, schedule), most_shared=232_448) == ""
        assert "bytes of shared memory of 1" in compile_job((cell, schedule), most_shared=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                measure.standalone, "compile_only", mock.Mock(side_effect=RuntimeError("PassManager::run failed"))
            )
            assert compile_job((cell, schedule), most_shared=1) == "RuntimeError: PassManager::run failed"
            patch.setattr(measure.standalone, "compile_only", lambda *a, **k: {}["W_DESC"])
            with pytest.raises(KeyError):  # a mistake of ours is no schedule that cannot be
                compile_job((cell, schedule), most_shared=1)
