"""Expert products on a CPU: every way to compute them is right, and the faster one is taken."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering.ops import cpu_gemm
from lowering.ops.cpu_gemm import chunks, expert_products, has_no_units_for, hit_experts, is_transposed_faster
from tests.support.inputs import LOW_DTYPES
from tests.support.oracle import assert_oracle_ratio

COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 256, 257)  # rows of an expert, on both sides of every bound


def bounds_of(counts):
    return [0, *itertools.accumulate(counts)]


@pytest.fixture(params=[True, False], ids=["transposed", "direct"])
def ways(request, monkeypatch):
    """What this machine would find out, taken both ways."""
    monkeypatch.setattr(cpu_gemm, "is_transposed_faster", lambda: request.param)
    monkeypatch.setattr(cpu_gemm, "has_no_units_for", lambda dtype: request.param and dtype.itemsize == 2)
    return request.param


@given(st.lists(st.integers(0, 400), min_size=1, max_size=20))
def test_chunks_hold_every_row_once_in_order(counts):
    bounds = bounds_of(counts)
    found = list(chunks(hit_experts(bounds)))
    experts = [one for _, _, chunk in found for one in chunk]
    assert experts == [(e, bounds[e], bounds[e + 1]) for e, count in enumerate(counts) if count]
    for first, last, chunk in found:
        assert (first, last) == (chunk[0][1], chunk[-1][2])
        assert len(chunk) == 1 or last - first <= cpu_gemm._ROWS_AT_ONCE


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("row_major", [True, False], ids=["row-major", "column-major"])
@pytest.mark.parametrize("out_dtype", ["own", "fp32"])
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_error_ratio(ways, dtype, out_dtype, row_major, bias):
    torch.manual_seed(0)
    depth, height = 40, 48
    weight_EYX = torch.randn(len(COUNTS), height, depth).to(dtype)
    if not row_major:
        weight_EYX = weight_EYX.transpose(1, 2).contiguous().transpose(1, 2)
    bias_EY = torch.randn(len(COUNTS), height).to(dtype) if bias else None
    rows_RX = torch.randn(sum(COUNTS), depth).to(dtype)
    out_RY = torch.empty(sum(COUNTS), height, dtype=dtype if out_dtype == "own" else torch.float32)
    bounds = bounds_of(COUNTS)
    experts = [(e, bounds[e], bounds[e + 1]) for e, count in enumerate(COUNTS) if count]
    expert_products(rows_RX, weight_EYX, bias_EY, out_RY, experts=experts)
    for expert, start, end in experts:
        given_ = [rows_RX[start:end], weight_EYX[expert], None if bias_EY is None else bias_EY[expert]]
        exact = torch.nn.functional.linear(*(None if t is None else t.double() for t in given_))
        eager = torch.nn.functional.linear(*given_)
        assert_oracle_ratio(out_RY[start:end].to(dtype), eager, exact, what=f"{end - start} rows")


def test_wide_weights_are_widened_by_parts(monkeypatch):
    monkeypatch.setattr(cpu_gemm, "has_no_units_for", lambda dtype: True)
    monkeypatch.setattr(cpu_gemm, "_WIDENED", 7 * 32)
    torch.manual_seed(0)
    weight, rows = torch.randn(1, 50, 32).bfloat16(), torch.randn(9, 32).bfloat16()
    out = torch.empty(9, 50)
    expert_products(rows, weight, None, out, experts=[(0, 0, 9)])
    torch.testing.assert_close(out, rows.float() @ weight[0].float().t())


def test_products_are_those_that_were_found_faster(ways, monkeypatch):
    """Few fp32 rows, and six rows and more of 16 bits, take the transposed product where it pays, no others do."""
    taken = []
    original = cpu_gemm._transposed
    monkeypatch.setattr(
        cpu_gemm, "_transposed", lambda rows, *rest: taken.append(rows.shape[0]) or original(rows, *rest)
    )
    bounds = bounds_of(COUNTS)
    experts = [(e, bounds[e], bounds[e + 1]) for e, count in enumerate(COUNTS) if count]
    for dtype, wanted in ((torch.float32, lambda n: 1 < n <= 256), (torch.bfloat16, lambda n: n >= 6)):
        taken.clear()
        weight, rows = torch.randn(len(COUNTS), 4, 8).to(dtype), torch.randn(sum(COUNTS), 8).to(dtype)
        expert_products(rows, weight, None, rows.new_empty(sum(COUNTS), 4), experts=experts)
        assert taken == [count for count in COUNTS if ways and wanted(count)]


def test_autocast_does_not_reach_the_products(ways):
    rows, weight, out = torch.randn(6, 32), torch.randn(1, 16, 32), torch.empty(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expert_products(rows, weight, None, out, experts=[(0, 0, 6)])
    torch.testing.assert_close(out, rows @ weight[0].t())


@pytest.mark.parametrize(
    ("vendor", "mkl", "threads", "wanted"),
    [
        ("AuthenticAMD", True, 2, True),
        ("AuthenticAMD", True, 1, False),
        ("AuthenticAMD", False, 2, False),
        ("GenuineIntel", True, 2, False),
        ("", True, 2, False),
    ],
)
def test_transposed_where_mkl_divides_few_rows_badly(monkeypatch, vendor, mkl, threads, wanted):
    monkeypatch.setattr(cpu_gemm, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cpu_gemm._is_mkl_abroad.cache_clear()
    assert is_transposed_faster() == wanted
    cpu_gemm._is_mkl_abroad.cache_clear()


def test_the_maker_of_the_processor(monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_gemm, "Path", lambda _: told)
    assert cpu_gemm._vendor() == ""
    told.write_text("processor : 0\n")
    assert cpu_gemm._vendor() == ""
    told.write_text("processor : 0\nvendor_id\t: AuthenticAMD\ncpu family : 25\n")
    assert cpu_gemm._vendor() == "AuthenticAMD"


def test_only_16_bit_products_may_lack_units():
    assert not has_no_units_for(torch.float32)
    assert not has_no_units_for(torch.float64)
    assert has_no_units_for(torch.bfloat16) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
