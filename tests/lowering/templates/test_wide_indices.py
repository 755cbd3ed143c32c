"""No product of a number of rows and a stride is made in 32 bits: offsets pass 2^31 long before memory is full.

Read off Triton's own IR of the compiled kernels, as tensors of that size do not fit where tests run; on a GPU
`tests/lowering/ops/test_wide_indices_on_gpu.py` runs them.
"""

import re

import pytest
import torch

from lowering.schedule.schedule import Loop, Schedule
from lowering.templates import eager
from lowering.templates.render import GradWeightVariant
from tests.support.launches import compile_for_h100, on_meta

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

E, T, K, H, WIDTH = 8, 64, 2, 256, 128
INDEX = torch.int32
# Within one expert's weights, of which 2^31 elements would be 4 GiB in 16 bits: from its gate to its up rows, and,
# transposed, over the depth of one tile.
WITHIN_AN_EXPERT = {"up": {"up_shift"}, "up_transposed": {"w_ptr"}, "up_tma": {"w_desc"}}


def narrow_products(ttir):
    """The values, by the names that the text gives them, that are a product of a stride in 32 bits."""
    lines = [re.sub(r" loc\(.*", "", line).strip() for line in ttir.splitlines()]
    strides = {name for line in lines for name in re.findall(r"%stride_\w+", line)}
    found = set()
    for line in lines:
        match = re.match(r"(%\w+)(?::\d+)? = (?:tt\.splat|tt\.broadcast|tt\.expand_dims) (%\w+)", line)
        if match and match[2] in strides and "i64" not in line:
            strides.add(match[1])
        match = re.match(r"%(\w+) = arith\.muli (%\w+), (%\w+) .*: (\S+)$", line)
        if match and {match[2], match[3]} & strides and not match[4].endswith(("i64", "i64>")):
            found.add(re.sub(r"_\d+$", "", match[1]))
    return found, strides


def gemm(variant, a, rows, width, *, schedule, transposed=False, gated=True):
    w = on_meta(E, (2 if gated else 1) * width, a.shape[1])
    w = w.mT.contiguous().mT if transposed else w
    variant = variant.scheduled(schedule, depth=a.shape[1], strides=w.stride())
    constants = eager.gemm_constants(E, K, width=width, schedule=schedule) | {"INDEX_DTYPE": "tl.int64"}
    tensors = {"A": a, "W": w, "OUT": on_meta(rows, width)}
    tensors |= {"ORDER": on_meta(rows, dtype=INDEX), "OFFSETS": on_meta(E + 1, dtype=INDEX)}
    kernel, _ = compile_for_h100(variant.source(), tensors, constants=constants, num_warps=4, num_stages=3)
    return kernel.asm["ttir"]


PLAIN = Schedule(16, 32, 64, 4, 3)
TMA = Schedule(64, 64, 64, 4, 3, Loop(tma=True), group_m=2)
UP = eager.up_variant(torch.bfloat16, act="silu(g) * u", bias=False)
DOWN = eager.down_variant(torch.bfloat16, bias=False)


def grad_weight():
    variant = GradWeightVariant(left_index=True, right_index=True)
    tensors = {"LEFT": on_meta(T * K, H), "RIGHT": on_meta(T, WIDTH), "OUT": on_meta(E, H, WIDTH)}
    tensors |= {f"{side}_INDEX": on_meta(T * K, dtype=INDEX) for side in ("LEFT", "RIGHT")}
    tensors["OFFSETS"] = on_meta(E + 1, dtype=INDEX)
    constants = {"BLOCK_L": 64, "BLOCK_R": 64, "BLOCK_K": 32, "INDEX_DTYPE": "tl.int64"}
    kernel, _ = compile_for_h100(variant.source(), tensors, constants=constants, num_warps=4, num_stages=3)
    return kernel.asm["ttir"]


KERNELS = {
    "up": lambda: gemm(UP, on_meta(T, H), T * K, WIDTH, schedule=PLAIN),
    "up_transposed": lambda: gemm(UP, on_meta(T, H), T * K, WIDTH, schedule=PLAIN, transposed=True),
    "down": lambda: gemm(DOWN, on_meta(T * K, WIDTH), T * K, H, schedule=PLAIN, gated=False),
    "up_tma": lambda: gemm(UP, on_meta(T, H), T * K, WIDTH, schedule=TMA),
    "grad_weight": grad_weight,
}


@pytest.mark.parametrize("name", KERNELS)
def test_rows_times_strides_are_64_bits_wide(name):
    narrow, strides = narrow_products(KERNELS[name]())
    assert {"%stride_LEFT_0", "%stride_OUT_1"} <= strides or {"%stride_A_0", "%stride_W_0"} <= strides
    assert narrow == WITHIN_AN_EXPERT.get(name, set())


def test_narrow_products_are_seen():
    ttir = """
      %a = tt.splat %stride_A_0 : i32 -> tensor<16xi32> loc(#loc3)
      %b_7 = arith.muli %row, %a : tensor<16xi32> loc(#loc3)
      %c = arith.extsi %stride_A_0 : i32 to i64 loc(#loc3)
      %d = arith.muli %row, %c : i64 loc(#loc3)
      %e = arith.muli %stride_W_0, %c8 : i32 loc(#loc3)
    """
    assert narrow_products(ttir)[0] == {"b", "e"}
